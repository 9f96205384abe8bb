import functools

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mcm_jax.diffusion import process
from tests import reference

LOGSNR = jnp.linspace(-16.4, 16.4, 9)


def images(seed):
    return jax.random.normal(jax.random.key(seed), (len(LOGSNR), 4, 4, 3))


def test_alpha_sigma_equal_float64():
    expected = np.array([reference.alpha_sigma(float(logsnr)) for logsnr in LOGSNR])
    np.testing.assert_allclose(process.alpha(LOGSNR), expected[:, 0], rtol=1e-6)
    np.testing.assert_allclose(process.sigma(LOGSNR), expected[:, 1], rtol=1e-6)


@hypothesis.given(hnp.arrays(np.float32, 5, elements=st.floats(-17, 17, width=32)))
def test_variance_is_preserved(logsnr):
    logsnr = jnp.asarray(logsnr)
    total = process.alpha(logsnr) ** 2 + process.sigma(logsnr) ** 2
    np.testing.assert_allclose(total, 1, rtol=1e-6)


def test_conversions_round_trip():
    x, eps, logsnr = images(0), images(1), LOGSNR
    z_t = process.diffuse(x, eps, logsnr_t=logsnr)
    v = process.v_from_x_eps(x, eps, logsnr_t=logsnr)
    # v is a rotation: errors are not amplified at any noise level.
    np.testing.assert_allclose(process.x_from_v(v, z_t, logsnr_t=logsnr), x, atol=2e-6)
    np.testing.assert_allclose(process.eps_from_v(v, z_t, logsnr_t=logsnr), eps, atol=2e-6)


def test_eps_from_x_inverts_diffuse():
    x, eps = images(0), images(1)
    logsnr = jnp.clip(LOGSNR, -15, 8)
    z_t = process.diffuse(x, eps, logsnr_t=logsnr)
    # Division by sigma = 0.018 at log-SNR 8 amplifies float32's 1e-7 to 1e-5.
    np.testing.assert_allclose(process.eps_from_x(x, z_t, logsnr_t=logsnr), eps, atol=5e-5)


def test_mean_square_is_per_example():
    x = images(0)
    expected = [np.mean(np.square(np.asarray(example, np.float64))) for example in x]
    np.testing.assert_allclose(process.mean_square(x), expected, rtol=1e-6)


def test_alpha_sigma_derivatives():
    """d alpha / d lambda = alpha sigma^2 / 2 and d sigma / d lambda = -sigma alpha^2 / 2."""
    alpha, sigma = np.array([reference.alpha_sigma(float(logsnr)) for logsnr in LOGSNR]).T
    np.testing.assert_allclose(jax.vmap(jax.grad(process.alpha))(LOGSNR), alpha * sigma**2 / 2, atol=5e-8)
    np.testing.assert_allclose(jax.vmap(jax.grad(process.sigma))(LOGSNR), -sigma * alpha**2 / 2, atol=5e-8)


@pytest.mark.parametrize(
    "convert",
    [process.diffuse, process.v_from_x_eps, process.x_from_v, process.eps_from_v, process.eps_from_x],
)
def test_conversions_are_linear_and_so_their_own_derivative(convert):
    convert = functools.partial(convert, logsnr_t=LOGSNR)
    directions = images(2), images(3)
    _, derivative = jax.jvp(convert, (images(0), images(1)), directions)
    np.testing.assert_allclose(derivative, convert(*directions), rtol=1e-5, atol=1e-6)
