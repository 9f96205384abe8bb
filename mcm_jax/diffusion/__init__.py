"""The mathematics of diffusion, in jax.numpy only: schedules, the process, steps, segments, sampling."""
