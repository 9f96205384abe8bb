"""What objectives and samplers know of a network: a function, nothing else."""

from collections.abc import Callable

import jax
from jaxtyping import Array, Float, Int

# (z_t, logsnr_t, cond, key) -> v_hat = alpha_t eps_hat - sigma_t x_hat.
#
# The network predicts v (not in the paper; we chose it because the v-loss is the paper's choice and both
# x_hat and eps_hat follow from v without a division). `cond` are class labels; `key` is the randomness of
# dropout, None switches dropout off. The result is float32 whatever the network computes in.
ModelFn = Callable[
    [Float[Array, "B ..."], Float[Array, "B"], Int[Array, "B"], jax.Array | None],
    Float[Array, "B ..."],
]
