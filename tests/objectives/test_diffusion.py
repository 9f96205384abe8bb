import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mcm_jax.diffusion import process, schedules
from mcm_jax.objectives.diffusion import Diffusion, multiscale_mean_square
from tests.objectives.test_consistency import (
    COND,
    KEY,
    SHAPE,
    X,
    linear_model,
    networks,
    perfect,
    quadratic_slope,
)

SCHEDULE = schedules.cosine()


def loss(model_fn, x=X, cond=COND, null_cond=-1, **settings):
    functions = networks(model_fn, null_cond=null_cond)
    return Diffusion(**settings)(functions, x, cond, KEY, jnp.int32(0))


def test_of_the_best_constant():
    """v_hat = 0: the expected v-loss is E[alpha^2 + sigma^2 x^2] = 1/2 + mean(x^2) / 2 over t ~ U."""
    x = jnp.tile(X, (512, 1, 1, 1))
    values = loss(linear_model(0.0), x, jnp.zeros(len(x), jnp.int32))
    # 4096 examples with standard deviation 0.3: standard error 0.005.
    np.testing.assert_allclose(values.mean(), 0.5 + 0.5 * jnp.mean(X**2), atol=0.02)


def test_examples_do_not_influence_each_other():
    function = functools.partial(loss, linear_model(0.3))
    for options in ({}, {"levels": (4, 2)}):
        whole, disturbed = function(X, **options), function(X.at[1:].multiply(-1), **options)
        np.testing.assert_array_equal(whole[0], disturbed[0])
        assert not np.any(np.asarray(whole[1:]) == np.asarray(disturbed[1:]))


def test_the_perfect_prediction_has_none():
    # Division by sigma of down to 5e-4 amplifies float32's rounding.
    assert loss(perfect).max() < 1e-4


def test_the_same_draws_by_hand():
    """One network call, of z_t at its own log-SNR, with the dropout's key."""
    calls = []

    def spy(z_t, logsnr_t, cond, key):
        calls.append((z_t, logsnr_t, cond, key))
        return 0.3 * z_t

    actual = loss(spy)
    ((z_t, logsnr_t, cond, key),) = calls
    key_t, key_eps, key_dropout, _ = jax.random.split(KEY, 4)
    t, eps = jax.random.uniform(key_t, (8,)), jax.random.normal(key_eps, SHAPE)
    assert float(jnp.std(t)) > 0.1
    np.testing.assert_array_equal(logsnr_t, SCHEDULE(t))
    alpha, sigma = (process.over_pixels(f(logsnr_t), X) for f in (process.alpha, process.sigma))
    np.testing.assert_allclose(z_t, alpha * X + sigma * eps, atol=1e-6)
    np.testing.assert_array_equal(cond, COND)
    np.testing.assert_array_equal(jax.random.key_data(key), jax.random.key_data(key_dropout))
    error = np.asarray(alpha * eps - sigma * X - 0.3 * z_t, np.float64)
    np.testing.assert_allclose(actual, np.mean(error**2, axis=(1, 2, 3)), rtol=1e-5)


def test_label_dropout():
    """A share of the labels becomes 'any class'; t and noise are unchanged."""
    cond = jnp.arange(8000) % 5
    seen = []

    def spy(z_t, logsnr_t, cond, key):
        seen.append((z_t, cond))
        return z_t

    x = jnp.zeros((8000, 1, 1, 1))
    for options in ({}, {"label_dropout": 0.1, "null_cond": 5}, {"label_dropout": 0.1}):
        loss(spy, x, cond, **options)
    (z_without, kept), (z_with, dropped), (_, unnamed) = seen
    np.testing.assert_array_equal(kept, cond)
    np.testing.assert_array_equal(z_without, z_with)
    # Each example by its own coin, from a key that nothing else uses.
    lost = jax.random.bernoulli(jax.random.split(KEY, 4)[3], 0.1, (8000,))
    np.testing.assert_array_equal(dropped, jnp.where(lost, 5, cond))
    np.testing.assert_array_equal(unnamed, jnp.where(lost, -1, cond))
    # 800 expected, standard deviation 27.
    assert abs(lost.sum() - 800) < 110


@pytest.mark.parametrize("level_weights", ["reciprocal", "equal"])
def test_multiscale_by_loops(level_weights):
    error = np.random.default_rng(0).normal(size=(3, 8, 8, 2))
    levels = (8, 4, 1)
    weights = [1 / 8, 1 / 4, 1] if level_weights == "reciprocal" else [1, 1, 1]
    expected = np.zeros(3)
    for n in range(3):
        for side, w in zip(levels, weights, strict=True):
            block = 8 // side
            cells = [
                error[n, i * block : (i + 1) * block, j * block : (j + 1) * block, c].mean() ** 2
                for i in range(side)
                for j in range(side)
                for c in range(2)
            ]
            expected[n] += w / sum(weights) * np.mean(cells)
    actual = multiscale_mean_square(
        jnp.asarray(error, jnp.float32), levels=levels, level_weights=level_weights
    )
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


def test_the_multiscale_loss_of_the_top_level_is_the_plain_one():
    np.testing.assert_allclose(loss(linear_model(0.3), levels=(4,)), loss(linear_model(0.3)), rtol=1e-6)
    assert not np.allclose(loss(linear_model(0.3), levels=(4, 2)), loss(linear_model(0.3)))


@pytest.mark.parametrize("levels", [(), (4, 2)])
def test_the_gradient_is_that_of_a_quadratic(levels):
    def of_theta(theta):
        return loss(linear_model(theta), levels=levels)

    _, slope = jax.jvp(of_theta, (0.3,), (1.0,))
    np.testing.assert_allclose(slope, quadratic_slope(of_theta, 0.3), rtol=1e-4)
