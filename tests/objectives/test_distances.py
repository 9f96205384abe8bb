import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mcm_jax.objectives import distances

SHAPE = (8, 4, 4, 3)
KEY = jax.random.key(7)


def huber(x_diff, epsilon, **options):
    return distances.distance(x_diff, kind="huber", huber_epsilon=epsilon, **options)


@hypothesis.given(st.floats(1e-6, 10), st.sampled_from([1e-4, 1e-2, 1.0]))
def test_pseudo_huber_equals_float64(scale, epsilon):
    x_diff = scale * jax.random.normal(KEY, SHAPE)
    m = np.mean(np.asarray(x_diff, np.float64) ** 2, axis=(1, 2, 3))
    np.testing.assert_allclose(
        huber(x_diff, epsilon),
        np.sqrt(m + epsilon**2) - epsilon,
        # float64's own difference cancels to 1e-16 of epsilon.
        rtol=3e-6,
        atol=2e-16,
    )
    # d / dx: x / (d sqrt(m + epsilon^2)).
    gradient = jax.grad(lambda x: huber(x, epsilon).sum())(x_diff)
    expected = np.asarray(x_diff, np.float64) / 48 / np.sqrt(m + epsilon**2)[:, None, None, None]
    np.testing.assert_allclose(gradient, expected, rtol=1e-5)


def test_pseudo_huber_gradient_is_finite_at_zero():
    np.testing.assert_array_equal(jax.grad(lambda d: huber(d, 1e-4).sum())(jnp.zeros(SHAPE)), 0)


@pytest.mark.parametrize("kind", ["huber", "squared"])
def test_sum_is_over_an_examples_own_pixels(kind):
    """sqrt(||x||^2 + epsilon^2) - epsilon, and ||x||^2."""
    x_diff = jax.random.normal(KEY, SHAPE)
    square = np.sum(np.asarray(x_diff, np.float64) ** 2, axis=(1, 2, 3))
    expected = square if kind == "squared" else np.sqrt(square + 0.25) - 0.5
    actual = distances.distance(x_diff, kind=kind, huber_epsilon=0.5, reduction="sum")
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


def test_squared_is_the_mean_square():
    x_diff = jax.random.normal(KEY, SHAPE)
    actual = distances.distance(x_diff, kind="squared", huber_epsilon=1.0)
    np.testing.assert_allclose(actual, np.mean(np.square(x_diff), axis=(1, 2, 3)), rtol=1e-5)


def test_a_large_epsilon_is_the_scaled_square():
    """What the paper says of epsilon = 1: m / 2 epsilon for m far below epsilon^2."""
    x_diff = 0.01 * jax.random.normal(KEY, SHAPE)
    squared = distances.distance(x_diff, kind="squared", huber_epsilon=1.0)
    np.testing.assert_allclose(huber(x_diff, 1.0), squared / 2, rtol=1e-3)


def test_weights():
    logsnr = jnp.array([-15.0, 0.0, 4.0])
    snr = np.exp([-15.0, 0.0, 4.0])
    weights = [distances.weight(logsnr, kind=k) for k in ("snr_plus_one", "sqrt_snr_plus_one", "max_snr_one")]
    np.testing.assert_allclose(weights, [1 + snr, np.sqrt(1 + snr), np.maximum(snr, 1)], rtol=1e-6)
    sigma = snr**-0.5
    expected = np.sqrt(sigma**2 + 0.25) / (0.5 * sigma)
    np.testing.assert_allclose(distances.weight(logsnr, kind="sqrt_edm"), expected, rtol=1e-6)
    np.testing.assert_array_equal(distances.weight(logsnr, kind="one"), np.ones(len(logsnr)))
