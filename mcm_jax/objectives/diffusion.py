"""The diffusion objective that trains the teacher (SPEC 5)."""

from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from einops import reduce
from jaxtyping import Array, Float, Int

from mcm_jax.diffusion import process
from mcm_jax.diffusion.network import ModelFn
from mcm_jax.diffusion.schedules import Schedule

LevelWeights = Literal["reciprocal", "equal"]


def diffusion_loss(
    model_fn: ModelFn,
    x: Float[Array, "B ..."],
    cond: Int[Array, "B"],
    key: jax.Array,
    *,
    schedule: Schedule,
    label_dropout: float = 0.0,
    null_class: int = -1,
    levels: Sequence[int] = (),
    level_weights: LevelWeights = "reciprocal",
) -> Float[Array, "B"]:
    """L = ||v - v_hat(z_t, lambda_t)||^2 / d, t ~ U(0, 1): the v-loss, one value an example.

    Args:
      x, cond, key: clean images, class labels, and the key of times, noise and both dropouts.
      label_dropout: share of the examples whose label becomes null_class, which guidance needs.
      levels, level_weights: see `multiscale_mean_square`; no levels: the plain loss.
    """
    key_t, key_eps, key_dropout, key_label = jax.random.split(key, 4)
    logsnr_t = schedule(jax.random.uniform(key_t, x.shape[:1]))
    eps = jax.random.normal(key_eps, x.shape)
    cond = jnp.where(jax.random.bernoulli(key_label, label_dropout, cond.shape), null_class, cond)
    z_t = process.diffuse(x, eps, logsnr_t=logsnr_t)
    v = process.v_from_x_eps(x, eps, logsnr_t=logsnr_t)
    error = v - model_fn(z_t, logsnr_t, cond, key_dropout)
    if not levels:
        return process.mean_square(error)
    return multiscale_mean_square(error, levels=levels, level_weights=level_weights)


def multiscale_mean_square(
    error: Float[Array, "B H W C"], *, levels: Sequence[int], level_weights: LevelWeights = "reciprocal"
) -> Float[Array, "B"]:
    """sum over r of w_r L_r, L_r = mean square of the error averaged over blocks down to side r, per example.

    The multiscale loss of simple diffusion (arXiv:2301.11093). Not in the paper: whether the weights 1/r sum
    to one; ours do ("reciprocal": 1/3 and 2/3 for the levels 128 and 64), so that the loss keeps its scale;
    "equal" gives every level the same.

    Args:
      levels: sides r in pixels; each must divide H = W.
    """
    pooled = [reduce(error, "b (r i) (q j) c -> b r q c", "mean", r=r, q=r) for r in levels]
    weights = jnp.reciprocal(jnp.array(levels, jnp.float32)) if level_weights == "reciprocal" else None
    return jnp.average(jnp.stack([process.mean_square(e) for e in pooled]), axis=0, weights=weights)
