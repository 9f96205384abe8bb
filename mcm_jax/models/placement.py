"""How a network is placed on devices, given as functions, so that networks do not depend on a mesh."""

import dataclasses
from collections.abc import Callable

from flax import nnx
from jaxtyping import Array, Float, PyTree

from mcm_jax.models import attention, blocks


def _identity(h: PyTree) -> PyTree:
    return h


def _apply_layer(layer: nnx.Linear, x: Float[Array, "B E"]) -> Float[Array, "B F"]:
    return layer(x)


@dataclasses.dataclass(frozen=True)
class Placement:
    """How feature maps are split over devices, and how attention is computed; the default is for one device.

    Attributes:
      constrain: applied to the feature maps around every block; returns the same values, constrained to be
        split by example.
      attend: computes attention; see `attention.einsum`.
      head_norm: normalises the queries and keys of UViT's attention; see `blocks.layer_norm`.
      by_column: (layer, x) -> layer(x), for a layer with many columns and an x with one row per example.
        The weights stay split by column, as exchanging the rows of x costs less than gathering the weights.
      gather_block: applied to the parameters of a block before it computes; returns the same values, on every
        device.
    """

    constrain: Callable[[Array], Array] = _identity
    attend: attention.AttentionFn = attention.einsum
    by_column: Callable[[nnx.Linear, Array], Array] = _apply_layer
    gather_block: Callable[[PyTree], PyTree] = _identity
    head_norm: blocks.NormFn = blocks.layer_norm

    @property
    def with_forward_derivative(self) -> "Placement":
        """The same placement, without functions that have no forward derivative."""
        return dataclasses.replace(self, attend=attention.einsum, head_norm=blocks.plain_layer_norm)
