import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mcm_jax.models import blocks


def test_modulation_is_per_example():
    h = jnp.ones((2, 3, 3, 2))
    scale_shift = jnp.array([[0.0, 1.0, 0.5, 0.0], [1.0, 0.0, 0.0, 2.0]])
    out = blocks.modulate(h, scale_shift)
    np.testing.assert_allclose(out[:, 1, 2], [[1.5, 2.0], [2.0, 3.0]])


@pytest.mark.parametrize("length", [16, 50, 3])  # Also such as four values of a word do not divide.
def test_dropout_zeroes_its_share_and_scales_up_the_others(length):
    h = jnp.full((640, length, 7), 3.0)
    dropped = np.asarray(blocks.dropout(h, 0.2, jax.random.key(0)))
    stayed = dropped != 0
    share = 205 / 256  # 0.8 to the nearest 1/256
    np.testing.assert_allclose(dropped[stayed], 3.0 / share, rtol=1e-6)
    # Four standard deviations of the mean of independent draws, over all and at each place.
    deviation = np.sqrt(share * (1 - share))
    assert abs(stayed.mean() - share) < 4 * deviation / stayed.size**0.5
    assert np.abs(stayed.mean((0, 2)) - share).max() < 4 * deviation / (640 * 7) ** 0.5


def test_the_four_values_of_a_word_are_independent():
    stayed = np.asarray(blocks.dropout(jnp.ones((200, 16, 33)), 0.5, jax.random.key(1)) != 0)
    words = stayed.reshape(200, 4, 4, 33).swapaxes(0, 1).reshape(4, -1)
    # Four standard deviations of a correlation of independent draws.
    off_diagonal = np.corrcoef(words)[~np.eye(4, dtype=bool)]
    assert np.abs(off_diagonal).max() < 4 / words.shape[1] ** 0.5


def test_without_a_key_or_a_rate_nothing_is_dropped():
    h = jax.random.normal(jax.random.key(0), (2, 4, 3))
    np.testing.assert_array_equal(blocks.dropout(h, 0.5, None), h)
    for rate in (0.0, 0.001):  # The nearest 1/256 is 0.
        np.testing.assert_array_equal(blocks.dropout(h, rate, jax.random.key(0)), h)
    assert not jnp.any(jnp.isnan(jax.grad(lambda h: jnp.sum(blocks.dropout(h, 0.5, jax.random.key(0))))(h)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layer_norm_and_its_derivatives_in_float64(dtype):
    keys = jax.random.split(jax.random.key(0), 4)
    x = (3 + 2 * jax.random.normal(keys[0], (5, 4, 16))).astype(dtype)
    scale, bias, w = (jax.random.normal(k, s) for k, s in zip(keys[1:], ((16,), (16,), x.shape), strict=True))

    def loss(norm):
        return lambda x, scale, bias: jnp.sum(norm(x, scale, bias).astype(w.dtype) * w)

    def plain(x, scale, bias):
        mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
        return (x - mean) / jnp.sqrt(variance + 1e-6) * scale + bias

    value, gradients = jax.value_and_grad(loss(blocks.layer_norm), argnums=(0, 1, 2))(x, scale, bias)
    tangents = [
        jax.random.normal(jax.random.fold_in(keys[3], n), a.shape) for n, a in enumerate((x, scale, bias))
    ]
    tangents[0] = tangents[0].astype(dtype)
    _, slope = jax.jvp(blocks.plain_layer_norm, (x, scale, bias), tuple(tangents))
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(a, np.float64)) for a in (x, scale, bias, w)]
        expected, expected_gradients = jax.value_and_grad(
            lambda *arguments: jnp.sum(plain(*arguments) * wide[3]), argnums=(0, 1, 2)
        )(*wide[:3])
        directions = [jnp.asarray(np.asarray(a, np.float64)) for a in tangents]
        _, expected_slope = jax.jvp(plain, tuple(wide[:3]), tuple(directions))
    assert slope.dtype == dtype
    assert blocks.layer_norm(x, scale, bias).dtype == gradients[0].dtype == dtype
    # Half an ulp of the result's dtype, over sums of 320 numbers of order one.
    tolerance = {"float32": 1e-4, "bfloat16": 0.08}[dtype]
    np.testing.assert_allclose(value, expected, rtol=1e-2 if dtype == "bfloat16" else 1e-5, atol=tolerance)
    for gradient, right in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(np.asarray(gradient, np.float64), right, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(np.asarray(slope, np.float64), expected_slope, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_group_norm_in_float64_and_beside_flax(dtype):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(3, 2, size=(2, 5, 4, 12)), dtype)
    scale, bias = rng.normal(size=(2, 12)).astype(np.float32)
    norm = blocks.GroupNorm(12, groups=3)
    norm.scale[...], norm.bias[...] = jnp.asarray(scale), jnp.asarray(bias)
    grouped = np.asarray(x, np.float64).reshape(2, 20, 3, 4)
    mean, variance = grouped.mean((1, 3), keepdims=True), grouped.var((1, 3), keepdims=True)
    expected = ((grouped - mean) / np.sqrt(variance + 1e-6)).reshape(x.shape) * scale + bias
    found = norm(x)
    assert found.dtype == dtype
    # Rounding of the result, and of a variance from sums of squares in float32.
    tolerance = {"float32": 1e-5, "bfloat16": 2**-7}[dtype]
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=tolerance, atol=tolerance)
    theirs = nnx.GroupNorm(12, num_groups=3, dtype=dtype, rngs=nnx.Rngs(0))
    theirs.scale[...], theirs.bias[...] = jnp.asarray(scale), jnp.asarray(bias)
    np.testing.assert_allclose(
        np.asarray(found, np.float64), np.asarray(theirs(x), np.float64), rtol=tolerance, atol=tolerance
    )


def test_group_norm_sees_one_example_and_one_group():
    norm = blocks.GroupNorm(8, groups=2)
    x = jax.random.normal(jax.random.key(0), (2, 3, 3, 8))
    jacobian = jax.jacobian(norm)(x)
    across_examples = jacobian[0, ..., 1, :, :, :]
    across_groups = jacobian[:, :, :, :4, :, :, :, 4:]
    np.testing.assert_array_equal(across_examples, 0)
    np.testing.assert_array_equal(across_groups, 0)
    assert np.abs(jacobian[0, 0, 0, 0, 0, 2, 2, 3]) > 1e-3
