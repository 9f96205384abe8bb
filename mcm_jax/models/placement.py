"""What a network is told of the devices it runs on: three functions and no mesh."""

import dataclasses
from collections.abc import Callable

from flax import nnx
from jaxtyping import Array, Float

from mcm_jax.models import attention


def _nothing_said(h: Array) -> Array:
    return h


def _as_they_are(layer: nnx.Linear, x: Float[Array, "B E"]) -> Float[Array, "B F"]:
    return layer(x)


@dataclasses.dataclass(frozen=True)
class Placement:
    """How feature maps lie on several devices, and which attention these have; by default nothing is said.

    Attributes:
      constrain: applied to the feature maps around every block; the same values, said to be split by example.
      attend: computes attention, see `attention.einsum`.
      by_column: (layer, x) -> layer(x) where x has one row an example and the layer so many columns that all
        rows are less to send than its weights, which stay split by column.
    """

    constrain: Callable[[Array], Array] = _nothing_said
    attend: attention.AttentionFn = attention.einsum
    by_column: Callable[[nnx.Linear, Array], Array] = _as_they_are
