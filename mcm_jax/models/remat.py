"""What the gradient of a block recomputes instead of storing."""

from collections.abc import Callable
from typing import Literal

import jax
from flax import nnx
from jaxtyping import Array, PyTree

from mcm_jax.models.placement import Placement

Remat = Literal["none", "full", "dots", "names"]


def call_block(placement: Placement, remat: Remat, saved: tuple[str, ...] = ()) -> Callable[..., Array]:
    """Returns a function (block, x, ...) -> block(x, ...), placed on the devices.

    Args:
      remat: what the backward pass recomputes: nothing (none), every block (full), all of a block except its
        matrix products (dots), or all except the values in `saved` (names).
      saved: checkpoint names.
    """

    def call(block: nnx.Module, x: Array, *others: PyTree) -> Array:
        graphdef, params = nnx.split(block)
        return nnx.merge(graphdef, placement.gather_block(params))(x, *others)

    policies = {
        "full": None,
        "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        "names": jax.checkpoint_policies.save_only_these_names(*saved),
    }
    recomputed = call if remat == "none" else nnx.remat(call, policy=policies[remat])
    return lambda *arguments: placement.constrain(recomputed(*arguments))


def split_key(key: jax.Array | None, count: int) -> list[jax.Array | None]:
    """Splits the randomness of dropout; None stays None."""
    return [None] * count if key is None else list(jax.random.split(key, count))
