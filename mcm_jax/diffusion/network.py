"""The type of a network, as objectives and samplers call it: a function."""

import functools
from collections.abc import Callable

import jax
from jaxtyping import Array, Float

from mcm_jax.diffusion.conditions import Cond

# (z_t, logsnr_t, cond, key) -> v_hat = alpha_t eps_hat - sigma_t x_hat.
#
# The network predicts v. The paper does not say what it predicts; we chose v because the paper uses the
# v-loss, and because x_hat and eps_hat follow from v without a division. `cond` is any pytree, see
# `conditions`. `key` is the randomness of dropout; None disables dropout. The result is float32, whatever
# precision the network computes in.
#
# Students of several numbers of steps and flow maps also take the log-SNR at the end of a step; see `until`.
ModelFn = Callable[
    [Float[Array, "B ..."], Float[Array, " B"], Cond, jax.Array | None],
    Float[Array, "B ..."],
]


def until(model_fn: Callable[..., Float[Array, "B ..."]], logsnr_u: Float[Array, " B"]) -> ModelFn:
    """model_fn with the log-SNR at the end u of each example's step, which it takes as logsnr_u."""
    return functools.partial(model_fn, logsnr_u=logsnr_u)
