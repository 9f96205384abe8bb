"""Converts between uint8 pixels and float32 in [-1, 1] (SPEC 1); both conversions are implemented only here.

Both functions accept NumPy arrays and JAX arrays, including tracers, and return the same kind.
"""

import typing
from typing import Literal, TypeVar

import jax
import numpy as np
from jaxtyping import Float, Float32, UInt8

Array = TypeVar("Array", np.ndarray, jax.Array)

# Rounding of samples to bytes: "nearest" as in EDM's scripts, "floor" as in ADM's.
Rounding = Literal["nearest", "floor"]


def to_float(images: UInt8[Array, "..."]) -> Float32[Array, "..."]:
    """x = u / 127.5 - 1: 0 becomes -1 and 255 becomes 1, both exactly."""
    return images.astype("float32") / 127.5 - 1


def to_uint8(images: Float[Array, "..."], *, rounding: Rounding = "nearest") -> UInt8[Array, "..."]:
    """u = round(127.5 (x + 1)), x clipped to [-1, 1]: the exact inverse of `to_float` on all 256 values.

    Ties round to even. With rounding="floor", u = floor(127.5 (x + 1)), which is half a grey level darker on
    average and not an inverse. NaN has no uint8 value, so check samples for NaN before the conversion.
    """
    if rounding not in typing.get_args(Rounding):
        raise ValueError(f"rounding {rounding!r} is not one of {', '.join(typing.get_args(Rounding))}")
    levels = (images.astype("float32").clip(-1, 1) + 1) * 127.5
    # The cast truncates, which equals the floor because no level is negative.
    return (levels.round() if rounding == "nearest" else levels).astype("uint8")


def lacks_scaling(images: UInt8[np.ndarray, "..."]) -> bool:
    """Whether images look like floats in [0, 1], or masks, cast to uint8 without multiplying by 255.

    Such images contain only 0 and 1; completely black images do not count.
    """
    return int(images.max(initial=0)) == 1
