"""What a network knows about the devices it runs on: three functions, and no mesh."""

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
    """How feature maps are split over devices, and how attention is computed; the default is for one device.

    Attributes:
      constrain: applied to the feature maps around every block. It returns the same values, with the
      constraint
        that they are split by example.
      attend: computes attention, see `attention.einsum`.
      by_column: (layer, x) -> layer(x), for a layer with many columns and an x with one row per example.
        Exchanging the rows costs less than gathering the weights, which stay split by column.
    """

    constrain: Callable[[Array], Array] = _nothing_said
    attend: attention.AttentionFn = attention.einsum
    by_column: Callable[[nnx.Linear, Array], Array] = _as_they_are
