import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mcm_jax.data.pixels import lacks_scaling, to_float, to_uint8

ALL = np.arange(256, dtype=np.uint8)


@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray])
def test_every_value_survives_the_round_trip(kind):
    floats = to_float(kind(ALL))
    assert floats.dtype == np.float32
    np.testing.assert_allclose(np.asarray(floats), ALL / 127.5 - 1, rtol=0, atol=2e-7)
    assert floats[0] == -1 and floats[-1] == 1
    np.testing.assert_array_equal(np.asarray(to_uint8(floats)), ALL)


def test_round_trip_when_traced():
    np.testing.assert_array_equal(np.asarray(jax.jit(lambda x: to_uint8(to_float(x)))(ALL)), ALL)


def test_out_of_range_is_clipped_and_the_nearest_level_taken():
    images = np.array([-7, -1.001, 1.001, 40, (100.4 / 127.5) - 1, (100.6 / 127.5) - 1], np.float32)
    assert to_uint8(images).tolist() == [0, 0, 255, 255, 100, 101]
    assert to_uint8(jnp.asarray(images)).dtype == jnp.uint8


def test_the_floor_is_what_adms_scripts_take():
    """((x + 1) * 127.5).clamp(0, 255).to(uint8), exactly; off the levels, where rounding decides."""
    images = np.random.default_rng(0).uniform(-1.1, 1.1, 1000).astype(np.float32)
    exact = np.floor((np.clip(images.astype(np.float64), -1, 1) + 1) * 127.5)
    for kind in (np.asarray, jnp.asarray):
        np.testing.assert_array_equal(np.asarray(to_uint8(kind(images), rounding="floor")), exact)


@pytest.mark.parametrize(("image", "lacks"), [([0, 1], True), ([0, 0], False), ([0, 2], False), ([], False)])
def test_bytes_of_0_and_1_are_recognised(image, lacks):
    assert lacks_scaling(np.array(image, np.uint8)) == lacks


def test_bfloat16_is_scaled_in_float32():
    """In bfloat16 arithmetic (8 bits) x + 1 alone would miss levels."""
    images = jnp.linspace(-1, 1, 1000).astype(jnp.bfloat16)
    exact = np.rint((np.asarray(images, np.float64) + 1) * 127.5)
    np.testing.assert_array_equal(np.asarray(to_uint8(images)), exact)
