"""Checksums of arrays, computed on the devices that hold them."""

import math
import zlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree, Shaped, UInt32


def checksums(trees: Mapping[str, PyTree]) -> dict[str, int]:
    """For each tree, a 32-bit checksum of all its arrays.

    It ignores shapes, dtypes and sharding. A change of one element always changes it; any other change is
    missed with a probability of about 2^-32. If the arrays are sharded over several processes, all of them
    call this together.
    """
    sums = jax.device_get(_all_sums({name: jax.tree.leaves(tree) for name, tree in trees.items()}))
    return {name: zlib.crc32(np.array(each, "<u4").tobytes()) for name, each in sums.items()}


@jax.jit
def _all_sums(leaves: dict[str, list[Shaped[Array, "..."]]]) -> dict[str, list[UInt32[Array, ""]]]:
    """One program for all arrays: processes may run separate ones in different orders, and hang."""
    return jax.tree.map(_sum, leaves)


@jax.jit  # traced and lowered once for each shape
def _sum(x: Shaped[Array, "..."]) -> UInt32[Array, ""]:
    """sum_i mix(bits(x_i) + i c) modulo 2^32, which devices may add in any order; i counts all elements."""
    index = jnp.zeros(x.shape, jnp.uint32)
    for axis in range(x.ndim):
        stride = math.prod(x.shape[axis + 1 :]) % 2**32
        index += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(stride)
    return jnp.sum(_mix(_bits(x) + index * jnp.uint32(0x9E3779B9)), dtype=jnp.uint32)


def _bits(x: Shaped[Array, "..."]) -> UInt32[Array, "..."]:
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    return jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)


def _mix(h: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """The finalizer of MurmurHash3 (Appleby), a bijection of 32-bit numbers that spreads every bit."""
    h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
    return h ^ (h >> 16)
