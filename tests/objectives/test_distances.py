import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.stats

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


def minimiser(loss, low, high):
    """The minimiser of a convex function of one float, in float64."""
    with jax.enable_x64(True):
        found = scipy.optimize.minimize_scalar(
            lambda f: float(loss(f)), bounds=(low, high), method="bounded", options={"xatol": 1e-12}
        )
    return found.x


@pytest.mark.parametrize(("epsilon", "expected"), [(1e-6, -1.0), (1e3, 0.7 * -1 + 0.3 * 2)])
def test_the_best_prediction_of_two_points_is_the_median_or_the_mean(epsilon, expected):
    """x = -1 with probability 0.7, otherwise 2: for epsilon far below and far above their distance."""

    def loss(f):
        x_diff = jnp.array([[-1.0], [2.0]], jnp.float64) - f
        return jnp.array([0.7, 0.3]) @ huber(x_diff, epsilon)

    # The slopes balance where (f + 1) / epsilon is about 0.5; the mean's error is of order 1 / epsilon^2. The
    # minimum is flat, so the search ends within the root of float64's precision.
    assert minimiser(loss, -3, 4) == pytest.approx(expected, abs=1e-5)


def test_the_median_of_many_independent_coordinates_is_nearly_their_mean():
    """Each is -1, 2 or 3 with probability 0.7, 0.2, 0.1; median - mean tends to -mu_3 / (2 n Var).

    All coordinates of the minimiser are equal by symmetry, and only the counts of the three values matter.
    """
    values, weights = np.array([-1.0, 2.0, 3.0]), np.array([0.7, 0.2, 0.1])
    limit = -(weights @ values**3) / (2 * weights @ values**2)  # the mean is 0

    def median(n):
        counts = np.array([(a, b, n - a - b) for a in range(n + 1) for b in range(n + 1 - a)])
        probability = scipy.stats.multinomial.pmf(counts, n, weights)
        return minimiser(
            lambda f: (
                probability
                @ distances.pseudo_huber(jnp.asarray(counts @ (values - f) ** 2 / n), epsilon=1e-6)
            ),
            -2,
            2,
        )

    assert median(1) == pytest.approx(-1, abs=1e-5)
    errors = [abs(n * median(n) / limit - 1) for n in (8, 16, 32)]
    # The corrections are of relative order 1 / n.
    assert errors[0] > 2 * errors[1] > 4 * errors[2] and errors[2] < 0.06
