"""The diffusion objective that trains the teacher (SPEC 5)."""

import jax
from jaxtyping import Array, Float, Int

from mcm_jax.diffusion import process
from mcm_jax.diffusion.network import ModelFn
from mcm_jax.diffusion.schedules import Schedule


def diffusion_loss(
    model_fn: ModelFn,
    x: Float[Array, "B ..."],
    cond: Int[Array, "B"],
    key: jax.Array,
    *,
    schedule: Schedule,
) -> Float[Array, "B"]:
    """L = ||v - v_hat(z_t, lambda_t)||^2 / d, t ~ U(0, 1): the v-loss, one value an example."""
    key_t, key_eps, key_dropout = jax.random.split(key, 3)
    t = jax.random.uniform(key_t, x.shape[:1])
    eps = jax.random.normal(key_eps, x.shape)
    logsnr_t = schedule(t)
    z_t = process.diffuse(x, eps, logsnr_t=logsnr_t)
    v = process.v_from_x_eps(x, eps, logsnr_t=logsnr_t)
    return process.mean_square(v - model_fn(z_t, logsnr_t, cond, key_dropout))
