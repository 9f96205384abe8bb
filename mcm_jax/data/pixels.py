"""uint8 pixels <-> float32 in [-1, 1] (SPEC 1); the only place where either conversion is written.

Both take numpy and JAX arrays, traced ones too, and return the same kind.
"""

import jax
import numpy as np
from jaxtyping import Float, Float32, UInt8

Array = np.ndarray | jax.Array


def to_float(images: UInt8[Array, "..."]) -> Float32[Array, "..."]:
    """x = u / 127.5 - 1: 0 becomes -1 and 255 becomes 1, both exactly."""
    return images.astype("float32") / 127.5 - 1


def to_uint8(images: Float[Array, "..."]) -> UInt8[Array, "..."]:
    """u = round(127.5 (x + 1)), x clipped to [-1, 1]: the exact inverse of `to_float` on all 256 values.

    Halves round to even. NaN has no meaning here: check samples before, not after.
    """
    return ((images.astype("float32").clip(-1, 1) + 1) * 127.5).round().astype("uint8")
