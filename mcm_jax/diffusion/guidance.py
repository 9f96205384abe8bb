"""Guidance leads away from the prediction of a worse model.

In classifier-free guidance (Ho & Salimans 2022; SPEC 3), this is the network itself without condition, in
autoguidance (Karras et al. 2024, arXiv:2406.02507) a smaller or less trained one with the same condition.
"""

import jax
from jaxtyping import Array, Float

from mcm_jax.diffusion.conditions import Cond, NullCond, unconditional
from mcm_jax.diffusion.network import ModelFn


def guide(
    x: Float[Array, "B ..."], x_guide: Float[Array, "B ..."], *, guidance: float
) -> Float[Array, "B ..."]:
    """x_g = x + g (x - x_guide); g = 0 means no guidance.

    The same formula holds for v and eps, which are linear in x.

    Examples:
      >>> import jax.numpy as jnp
      >>> guide(jnp.full((1, 2), 3.0), jnp.full((1, 2), 2.0), guidance=0.5).tolist()
      [[3.5, 3.5]]
    """
    return x + guidance * (x - x_guide)


def guided(model_fn: ModelFn, guide_fn: ModelFn, *, guidance: float) -> ModelFn:
    """Returns a network that calls both and returns the guided prediction.

    Args:
      model_fn: the network to guide.
      guide_fn: a worse network for the same images, such as `without_condition`(model_fn).
      guidance: g; with 0 the result is model_fn itself. Autoguidance writes w = 1 + g.
    """
    if guidance == 0:
        return model_fn

    def guided_fn(
        z_t: Float[Array, "B ..."],
        logsnr_t: Float[Array, " B"],
        cond: Cond,
        key: jax.Array | None,
    ) -> Float[Array, "B ..."]:
        v = model_fn(z_t, logsnr_t, cond, key)
        v_guide = guide_fn(z_t, logsnr_t, cond, key)
        return guide(v, v_guide, guidance=guidance)

    return guided_fn


def without_condition(model_fn: ModelFn, null_cond: NullCond) -> ModelFn:
    """Returns model_fn with every condition replaced: the guide of classifier-free guidance.

    Args:
      null_cond: the condition that stands for none, such as the label that means 'any class'.
    """
    return lambda z_t, logsnr_t, cond, key: model_fn(z_t, logsnr_t, unconditional(cond, null_cond), key)
