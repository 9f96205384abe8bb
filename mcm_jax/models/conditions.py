"""Kinds of conditions: class labels, or captions as text encoders embed them."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float


class Caption(NamedTuple):
    """Embedded captions of B images.

    Attributes:
      tokens: one embedding for each of L tokens.
      mask: whether there is such a token, or the caption is shorter.
      pooled: one embedding for the whole caption.
    """

    tokens: Float[Array | np.ndarray, "*B L D"]
    mask: Bool[Array | np.ndarray, "*B L"]
    pooled: Float[Array | np.ndarray, "*B P"]


@dataclasses.dataclass(frozen=True)
class Classes:
    """int32 labels [B] in [0, num_classes]; the last one means 'any class'."""

    num_classes: int = 1

    @property
    def null(self) -> int:
        """The label that means 'any class'."""
        return self.num_classes

    def of(self, batch: Mapping[str, Any]) -> Any:
        """The condition of a batch of the data pipeline, or of abstract arrays."""
        return batch["label"]

    def abstract(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """The arrays that `of` reads."""
        return {"label": jax.ShapeDtypeStruct((batch_size,), jnp.int32)}


@dataclasses.dataclass(frozen=True)
class Captions:
    """`Caption`s of `length` tokens."""

    length: int
    width: int
    pooled_width: int

    @property
    def null(self) -> Caption:
        """No caption: no token exists, and the pooled embedding is zero. It is the empty prompt."""
        return Caption(
            np.zeros((self.length, self.width), np.float16),
            np.zeros(self.length, bool),
            np.zeros(self.pooled_width, np.float32),
        )

    def of(self, batch: Mapping[str, Any]) -> Caption:
        """The condition of a batch of the data pipeline, or of abstract arrays."""
        return Caption(*(batch[name] for name in Caption._fields))

    def abstract(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """The arrays that `of` reads."""
        return {
            name: jax.ShapeDtypeStruct((batch_size, *leaf.shape), leaf.dtype)
            for name, leaf in self.null._asdict().items()
        }


Condition = Classes | Captions
