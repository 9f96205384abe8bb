"""Checksums of arrays: of their bits and places, not of their sharding."""

import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mcm_jax.system import sharding
from mcm_jax.training.checksums import checksums


def checksum(tree):
    return checksums({"it": tree})["it"]


def by_hand(array):
    """The definition with Python's unbounded integers."""

    def mix(h):
        h = (h ^ (h >> 16)) * 0x85EBCA6B % 2**32
        h = (h ^ (h >> 13)) * 0xC2B2AE35 % 2**32
        return h ^ (h >> 16)

    words = np.ravel(array).view(f"u{array.dtype.itemsize}").tolist()
    return sum(mix((word + index * 0x9E3779B9) % 2**32) for index, word in enumerate(words)) % 2**32


def random(shape, dtype):
    bits = np.random.default_rng(0).integers(0, 256, (*shape, np.dtype(dtype).itemsize), np.uint8)
    return bits.view(dtype)[..., 0]


@pytest.mark.parametrize("dtype", [np.float32, np.int32, np.float16, jnp.bfloat16, np.uint8])
@pytest.mark.parametrize("shape", [(), (0,), (7,), (3, 4), (2, 3, 5)])
def test_the_sum_of_an_array(shape, dtype):
    array = random(shape, dtype)
    assert checksum(array) == zlib.crc32(np.array([by_hand(array)], "<u4").tobytes())


def test_truth_values_count_as_0_and_1():
    array = np.array([True, False, True])
    assert checksum(array) == checksum(array.astype(np.int32))


def test_every_bit_counts():
    array = random((5, 3), np.float32)
    sums = {checksum(array)}
    for number in range(array.size * 32):
        flipped = array.copy()
        flipped.reshape(-1).view(np.uint32)[number // 32] ^= np.uint32(1 << number % 32)
        sums.add(checksum(flipped))
    assert len(sums) == 1 + array.size * 32


def test_places_and_leaves_count():
    # A sum of bits times place misses the first two: their difference 2^23 times 2 * 256 is 2^32.
    array = np.zeros(300, np.float32)
    array[[0, 256]] = 1.0, 0.5
    swapped = array.copy()
    swapped[[0, 256]] = 0.5, 1.0
    one, two = np.float32(1), np.float32(2)
    trees = [array, swapped, array[::-1].copy(), [one, two], [two, one], [one], [one, one], []]
    assert len({checksum(tree) for tree in trees}) == len(trees)
    assert checksum({"a": one, "b": two}) == checksum([one, two])


@pytest.mark.multi_device
def test_the_sharding_does_not_count():
    mesh = sharding.make_mesh(data=2, fsdp=4)
    array = random((8, 12), np.float32)
    for spec in (P(), P("data"), P(None, "fsdp"), P("fsdp", "data"), P(("data", "fsdp"))):
        assert checksum(jax.device_put(array, NamedSharding(mesh, spec))) == checksum(array), spec
