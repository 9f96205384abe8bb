"""Classifier-free guidance (Ho & Salimans 2022; SPEC 3)."""

import jax
from jaxtyping import Array, Float

from mcm_jax.diffusion.conditions import Cond, NullCond, unconditional
from mcm_jax.diffusion.network import ModelFn


def guide(
    conditional: Float[Array, "B ..."], unconditional: Float[Array, "B ..."], *, guidance: float
) -> Float[Array, "B ..."]:
    """x_g = x_cond + g (x_cond - x_uncond); g = 0 means no guidance.

    The same formula holds for v and eps, which are linear in x.

    Examples:
      >>> import jax.numpy as jnp
      >>> guide(jnp.full((1, 2), 3.0), jnp.full((1, 2), 2.0), guidance=0.5).tolist()
      [[3.5, 3.5]]
    """
    return conditional + guidance * (conditional - unconditional)


def guided(model_fn: ModelFn, *, guidance: float, null_cond: NullCond) -> ModelFn:
    """Returns a network that calls model_fn twice and returns the guided prediction.

    Args:
      model_fn: the network to guide.
      guidance: g.
      null_cond: the condition that stands for none, such as the label that means 'any class'.
    """

    def guided_fn(
        z_t: Float[Array, "B ..."],
        logsnr_t: Float[Array, " B"],
        cond: Cond,
        key: jax.Array | None,
    ) -> Float[Array, "B ..."]:
        v_cond = model_fn(z_t, logsnr_t, cond, key)
        v_uncond = model_fn(z_t, logsnr_t, unconditional(cond, null_cond), key)
        return guide(v_cond, v_uncond, guidance=guidance)

    return guided_fn
