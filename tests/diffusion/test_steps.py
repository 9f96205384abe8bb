import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mcm_jax.diffusion import process, schedules, steps
from tests import reference

SCHEDULE = schedules.cosine()
SHAPE = (6, 4, 4, 3)


def problem(seed, *, t_low=0.02):
    """x_hat, z_t, log-SNR at t and at s < t, x_var; every example at another place of the grid."""
    keys = jax.random.split(jax.random.key(seed), 5)
    x_hat = 0.5 * jax.random.normal(keys[0], SHAPE)
    t = jax.random.uniform(keys[1], SHAPE[:1], minval=t_low, maxval=1.0)
    s = t * jax.random.uniform(keys[2], SHAPE[:1], maxval=0.95)
    logsnr_t, logsnr_s = SCHEDULE(t), SCHEDULE(s)
    z_t = process.diffuse(x_hat, jax.random.normal(keys[3], SHAPE), logsnr_t=logsnr_t)
    return x_hat, z_t, logsnr_t, logsnr_s, jax.random.uniform(keys[4], SHAPE[:1])


def in_float64(function, *images, per_example):
    """`function` of every example alone, in float64."""
    rows = zip(*(np.asarray(a, np.float64) for a in (*images, *per_example)), strict=True)
    return np.stack([function(*row) for row in rows])


@pytest.mark.parametrize("seed", range(3))
def test_ddim_equals_float64(seed):
    x_hat, z_t, t, s, _ = problem(seed)
    actual = steps.ddim(x_hat, z_t, logsnr_t=t, logsnr_s=s)
    expected = in_float64(reference.ddim, x_hat, z_t, per_example=(t, s))
    np.testing.assert_allclose(actual, expected, atol=3e-6)


@pytest.mark.parametrize("seed", range(3))
def test_addim_equals_float64(seed):
    """Catches the two mistakes of a public implementation: batch means, and alpha_t for alpha_s."""
    x_hat, z_t, t, s, x_var = problem(seed)
    actual = steps.addim(x_hat, z_t, logsnr_t=t, logsnr_s=s, x_var=x_var)
    expected = in_float64(reference.addim, x_hat, z_t, per_example=(t, s, x_var))
    np.testing.assert_allclose(actual, expected, atol=1e-5)


@hypothesis.given(st.integers(0, 2**31 - 1))
def test_inv_ddim_inverts_ddim(seed):
    x_hat, z_t, t, s, _ = problem(seed)
    z_s = steps.ddim(x_hat, z_t, logsnr_t=t, logsnr_s=s)
    x = steps.inv_ddim(z_s, z_t, logsnr_t=t, logsnr_s=s)
    # The step's gain of x is at least 0.02 here, so 1e-7 becomes 1e-5 at most.
    np.testing.assert_allclose(x, x_hat, atol=5e-5)


def test_addim_without_variance_is_ddim_exactly():
    x_hat, z_t, t, s, x_var = problem(0)
    addim = steps.addim(x_hat, z_t, logsnr_t=t, logsnr_s=s, x_var=0 * x_var)
    np.testing.assert_array_equal(addim, steps.ddim(x_hat, z_t, logsnr_t=t, logsnr_s=s))


def test_addim_restores_the_norm_for_orthogonal_predictions():
    """||z_aDDIM||^2 = ||z_DDIM||^2 + d z_s_var where x_hat is orthogonal to eps_hat."""
    x_hat, _, t, s, x_var = problem(0)
    eps = jax.random.normal(jax.random.key(9), SHAPE)
    dot = jnp.sum(x_hat * eps, axis=(1, 2, 3)) / jnp.sum(x_hat**2, axis=(1, 2, 3))
    eps = eps - process.over_pixels(dot, eps) * x_hat
    z_t = process.diffuse(x_hat, eps, logsnr_t=t)
    ddim = steps.ddim(x_hat, z_t, logsnr_t=t, logsnr_s=s)
    addim = steps.addim(x_hat, z_t, logsnr_t=t, logsnr_s=s, x_var=x_var)
    gain = process.alpha(s) - process.alpha(t) * process.sigma(s) / process.sigma(t)
    expected = process.mean_square(ddim) + gain**2 * x_var
    np.testing.assert_allclose(process.mean_square(addim), expected, rtol=1e-4)


def test_a_step_of_length_zero_changes_nothing():
    x_hat, z_t, t, _, x_var = problem(0)
    ddim = steps.ddim(x_hat, z_t, logsnr_t=t, logsnr_s=t)
    addim = steps.addim(x_hat, z_t, logsnr_t=t, logsnr_s=t, x_var=x_var)
    np.testing.assert_array_equal(ddim, z_t)
    np.testing.assert_array_equal(addim, z_t)


@pytest.mark.parametrize("step", ["ddim", "addim"])
def test_examples_do_not_influence_each_other(step):
    x_hat, z_t, t, s, x_var = problem(0)
    function = steps.ddim if step == "ddim" else functools.partial(steps.addim, x_var=x_var)
    whole = function(x_hat, z_t, logsnr_t=t, logsnr_s=s)
    disturbed = function(x_hat.at[1:].multiply(3.0), z_t, logsnr_t=t, logsnr_s=s)
    np.testing.assert_array_equal(whole[0], disturbed[0])


def test_two_ddim_steps_with_one_x_are_one():
    x_hat, z_t, t, s, _ = problem(0)
    middle = (t + s) / 2
    z_m = steps.ddim(x_hat, z_t, logsnr_t=t, logsnr_s=middle)
    np.testing.assert_allclose(
        steps.ddim(x_hat, z_m, logsnr_t=middle, logsnr_s=s),
        steps.ddim(x_hat, z_t, logsnr_t=t, logsnr_s=s),
        atol=3e-6,
    )


def gaussian_denoiser(z_t, logsnr, *, variance):
    """E[x | z_t] for x ~ N(0, variance I)."""
    alpha, sigma = process.alpha(logsnr), process.sigma(logsnr)
    gain = alpha * variance / (alpha**2 * variance + sigma**2)
    return process.over_pixels(gain, z_t) * z_t


def test_ddim_has_order_one_on_a_gaussian():
    """The exact flow scales z by the ratio of its standard deviations; the error halves with the step."""
    variance = 0.25
    z_1 = jnp.ones((1, 2))
    errors = []
    for num_steps in (64, 128, 256):
        z = z_1
        for n in range(num_steps, num_steps // 2, -1):
            t = jnp.full(1, SCHEDULE(jnp.float32(n / num_steps)))
            s = jnp.full(1, SCHEDULE(jnp.float32((n - 1) / num_steps)))
            z = steps.ddim(gaussian_denoiser(z, t, variance=variance), z, logsnr_t=t, logsnr_s=s)
        logsnr = SCHEDULE(jnp.array([1.0, 0.5]))
        std = jnp.sqrt(process.alpha(logsnr) ** 2 * variance + process.sigma(logsnr) ** 2)
        errors.append(float(jnp.abs(z[0, 0] - std[1] / std[0])))
    ratios = np.array(errors[:-1]) / np.array(errors[1:])
    np.testing.assert_allclose(ratios, 2, rtol=0.05)


def test_analytic_x_var():
    logsnr = jnp.array([-15.0, 0.0, 15.0])
    expected = [0.1 / (2 + np.exp(-15.0)), 0.1 / 3, 0.1 / (2 + np.exp(15.0))]
    np.testing.assert_allclose(steps.analytic_x_var(logsnr), expected, rtol=1e-6)


@pytest.mark.parametrize("name", ["ddim", "inv_ddim", "noisy_ddim", "ddpm", "heun", "composed_x"])
def test_steps_are_linear_in_images_and_so_their_own_derivative(name):
    _, _, t, s, x_var = problem(0)
    extra = {"noisy_ddim": {"x_var": x_var}, "composed_x": {"logsnr_m": (t + s) / 2}}.get(name, {})
    step = functools.partial(getattr(steps, name), logsnr_t=t, logsnr_s=s, **extra)
    count = 3 if name in ("noisy_ddim", "ddpm", "heun") else 2
    images, directions = jax.random.normal(jax.random.key(1), (2, count, *SHAPE))
    _, derivative = jax.jvp(step, tuple(images), tuple(directions))
    np.testing.assert_allclose(derivative, step(*directions), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("step", [steps.addim, steps.addim_x])
def test_addim_follows_eulers_theorem(step):
    """Images times c, x_var times c^2: c times the step. So its derivative along (x, z, 2 x_var) is it."""
    x_hat, z_t, t, s, x_var = problem(0)

    def of_three(x_hat, z_t, x_var):
        return step(x_hat, z_t, logsnr_t=t, logsnr_s=s, x_var=x_var)

    value, derivative = jax.jvp(of_three, (x_hat, z_t, x_var), (x_hat, z_t, 2 * x_var))
    np.testing.assert_allclose(derivative, value, rtol=1e-4, atol=1e-5)
