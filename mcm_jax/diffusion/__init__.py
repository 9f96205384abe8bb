"""The mathematics of diffusion: schedules, the process, steps and segments; jax.numpy only."""
