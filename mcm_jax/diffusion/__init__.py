"""The mathematics of diffusion in pure jax.numpy: schedules, the process, steps, segments, sampling."""
