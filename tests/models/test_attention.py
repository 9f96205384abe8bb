import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mcm_jax.models import attention


def draw(shape):
    """Queries, keys, values, and weights of a sum of the result."""
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, w = (jax.random.normal(key, shape) for key in keys)
    return q * shape[-1] ** -0.5, k, v, w


def test_written_out_is_the_formula_in_float64():
    q, k, v, _ = draw((2, 3, 5, 4))
    logits = np.einsum("bhqd,bhkd->bhqk", *(np.asarray(a, np.float64) for a in (q, k)))
    weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected = np.einsum("bhqk,bhkd->bhqd", weights, np.asarray(v, np.float64))
    np.testing.assert_allclose(attention.einsum(q, k, v), expected, rtol=2e-6, atol=1e-6)


def draw_masked(length, keys, width):
    """As `draw`, with `keys` keys, of which a different share exists for each of three examples."""
    q, _, _, w = draw((3, 2, length, width))
    k, v = draw((3, 2, keys, width))[1:3]
    return q, k, v, w, jnp.arange(keys) < jnp.array([[1], [keys // 2], [keys]])


def test_keys_that_do_not_exist_have_no_weight():
    q, k, v, _, mask = draw_masked(3, 6, 4)
    found = attention.einsum(q, k, v, mask)
    for n, existing in enumerate((1, 3, 6)):
        alone = attention.einsum(q[n : n + 1], k[n : n + 1, :, :existing], v[n : n + 1, :, :existing])
        np.testing.assert_allclose(found[n : n + 1], alone, rtol=1e-6, atol=1e-6)


def test_the_kernel_masks_keys_too():
    *arrays, w, mask = draw_masked(128, 256, 128)

    def value_and_grad(attend):
        return jax.value_and_grad(lambda *qkv: jnp.sum(attend(*qkv, mask) * w), argnums=(0, 1, 2))(*arrays)

    value, gradients = value_and_grad(functools.partial(attention.splash, interpret=True))
    expected, expected_gradients = value_and_grad(attention.einsum)
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-4)
    for gradient, expected in zip(gradients, expected_gradients, strict=True):
        # With a single key the queries' gradient is zero, as a difference of two sums of 128 products.
        np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(2, 2, 128, 128), (1, 1, 256, 128), (1, 2, 128, 64)])
def test_the_kernel_is_what_is_written_out(shape):
    """Value and gradients, by the kernel's text run on the CPU; it sums in another order, in float32."""
    q, k, v, w = draw(shape)

    def value_and_grad(attend):
        return jax.value_and_grad(lambda *qkv: jnp.sum(attend(*qkv) * w), argnums=(0, 1, 2))(q, k, v)

    value, gradients = value_and_grad(functools.partial(attention.splash, interpret=True))
    expected, expected_gradients = value_and_grad(attention.einsum)
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-4)
    for gradient, expected in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-5)


def test_the_kernel_names_what_its_gradient_needs():
    """So that it is not run again where that is kept: the result, and a sum for every query."""
    q, k, v, _ = draw((1, 2, 128, 128))
    attend = functools.partial(attention.splash, interpret=True)

    def kept(*names):
        policy = jax.checkpoint_policies.save_only_these_names(*names)
        _, pullback = jax.eval_shape(
            lambda *qkv: jax.vjp(jax.checkpoint(attend, policy=policy), *qkv), q, k, v
        )
        # JAX's version decides how many scalars and arrays of one element are among them.
        return sum(leaf.size for leaf in jax.tree.leaves(pullback) if leaf.size > 8)

    assert kept(attention.NAME) - kept() == q.size + q.size // 128


@pytest.mark.parametrize(
    ("shape", "dtype", "masked"),
    [
        ((1, 2, 64, 128), jnp.float32, False),
        ((1, 2, 64, 256), jnp.bfloat16, False),
        ((1, 2, 64, 20), jnp.bfloat16, False),
        ((1, 2, 63, 64), jnp.bfloat16, True),
    ],
)
def test_what_cudnn_does_not_support_is_written_out(shape, dtype, masked):
    q, k, v = (part.astype(dtype) for part in draw(shape)[:3])
    mask = jnp.arange(shape[2])[None] < 5 if masked else None
    np.testing.assert_array_equal(attention.cudnn(q, k, v, mask), attention.einsum(q, k, v, mask))


@pytest.mark.parametrize("masked", [False, True])
def test_cudnn_gets_positions_before_heads(masked, monkeypatch):
    """JAX's own written-out form takes the place of the kernel."""
    attend = jax.nn.dot_product_attention

    def written_out(*qkv, implementation, **options):
        assert implementation == "cudnn"
        return attend(*qkv, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", written_out)
    q, _, _, _ = draw((2, 3, 6, 8))
    k, v = draw((2, 3, 10, 8))[1:3]
    mask = jnp.arange(10) < jnp.array([[4], [10]]) if masked else None
    found = attention.cudnn(*(part.astype(jnp.bfloat16) for part in (q, k, v)), mask)
    # bfloat16 keeps 8 bits.
    np.testing.assert_allclose(found.astype(jnp.float32), attention.einsum(q, k, v, mask), atol=0.03)


@pytest.mark.parametrize("shape", [(1, 2, 64, 128), (1, 1, 1152, 128)])
def test_what_the_kernel_has_no_tiles_for_is_written_out(shape):
    q, k, v, _ = draw(shape)
    np.testing.assert_array_equal(attention.splash(q, k, v), attention.einsum(q, k, v))
