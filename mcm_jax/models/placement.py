"""What a network is told of the devices it runs on: two functions and no mesh."""

import dataclasses
from collections.abc import Callable

from jaxtyping import Array

from mcm_jax.models import attention


def _nothing_said(h: Array) -> Array:
    return h


@dataclasses.dataclass(frozen=True)
class Placement:
    """How feature maps lie on several devices, and which attention these have; by default neither is said.

    Attributes:
      constrain: applied to the feature maps around every block; the same values, said to be split by example.
      attend: computes attention, see `attention.einsum`.
    """

    constrain: Callable[[Array], Array] = _nothing_said
    attend: attention.AttentionFn = attention.einsum
