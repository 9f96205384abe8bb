"""What must hold for samplers, objectives and updates together, on problems whose answers are known.

Orders of convergence are counted in float64, where rounding leaves room for more than a decade of them.
"""

import functools
import itertools
import typing

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mcm_jax import sampling
from mcm_jax.diffusion import mixtures, process, schedules, steps
from tests import reference

COSINE = schedules.cosine()

# --- Samplers on a Gaussian, where the denoiser is linear, and with it every step of every sampler. ---


def anisotropic():
    """A Gaussian of correlated coordinates whose standard deviations are 0.10, 0.23 and 0.58."""
    rng = np.random.default_rng(0)
    root = rng.normal(size=(3, 3))
    return mixtures.gaussian(0.3 * rng.normal(size=3), 0.1 * root @ root.T)


GAUSSIAN = anisotropic()
# Of the eigen-directions.
MEANS, STDS = GAUSSIAN.means[:, 0], GAUSSIAN.stds[:, 0]


@functools.partial(jax.jit, static_argnames=("sampler",))
def draw(z_1, keys, logsnr, *, sampler):
    cond = jnp.zeros(len(z_1), jnp.int32)
    model_fn = mixtures.model_fn(GAUSSIAN)
    return sampling.sample(model_fn, z_1, cond, keys, logsnr=logsnr, sampler=sampler, clip="never")


def keys_and_noise(count, *, seed=0):
    keys = sampling.image_keys(jax.random.key(seed), jnp.arange(count))
    return keys, sampling.initial_noise(keys, (3,))


def x_hat_line(logsnr):
    """(a, b) of x_hat = a z + b in every eigen-direction: E[x | z] by Bayes' rule."""
    alpha, sigma = reference.alpha_sigma(logsnr)
    a = alpha * STDS**2 / (alpha**2 * STDS**2 + sigma**2)
    return a, MEANS - a * alpha * MEANS


def ddim_line(grid):
    """(a, b) of x = a z_1 + b in every eigen-direction: the steps' lines one after the other, in float64."""
    a, b = np.ones(3), np.zeros(3)
    for t, s in itertools.pairwise(grid):
        (alpha_t, sigma_t), (alpha_s, sigma_s) = reference.alpha_sigma(t), reference.alpha_sigma(s)
        x_a, x_b = x_hat_line(t)
        x_a, x_b = x_a * a, x_a * b + x_b
        a = alpha_s * x_a + sigma_s * (a - alpha_t * x_a) / sigma_t
        b = alpha_s * x_b + sigma_s * (b - alpha_t * x_b) / sigma_t
    x_a, x_b = x_hat_line(grid[-1])
    return x_a * a, x_a * b + x_b


@pytest.mark.parametrize("num_steps", [1, 2, 16, 129])
@pytest.mark.parametrize("low", [8, 64])
def test_ddim_of_a_gaussian_is_a_known_line(num_steps, low):
    """Uniform steps of the cosine and of an interpolated schedule; the line's bias included."""
    schedule = schedules.interpolated(
        noise_resolution_low=low, noise_resolution_high=64, image_resolution=64
    )
    grid = schedules.uniform_grid(schedule, num_steps)
    keys, z_1 = keys_and_noise(64)
    a, b = ddim_line(np.asarray(grid, np.float64))
    expected = (np.asarray(z_1, np.float64) @ GAUSSIAN.basis * a + b) @ GAUSSIAN.basis.T
    # Each step rounds z to 1e-7 and the denoiser is within 3e-6; all later steps together shrink errors.
    np.testing.assert_allclose(draw(z_1, keys, grid, sampler="ddim"), expected, rtol=0, atol=1e-5)


def test_ddim_loses_variance_and_the_more_the_fewer_its_steps():
    """The bias has a sign: the line is always flatter than the flow's, whose slope is the data's std."""
    slopes = np.array(
        [
            ddim_line(np.asarray(schedules.uniform_grid(COSINE, n), np.float64))[0] / STDS
            for n in (2, 8, 32, 128, 512)
        ]
    )
    assert np.all(slopes < 1) and np.all(np.diff(slopes, axis=0) > 0)
    np.testing.assert_allclose(slopes[-1], 1, atol=0.02)


@functools.partial(jax.jit, static_argnames=("denoised",))
def flow(z_1, t, s, *, denoised):
    """The flow's z_s, or the denoiser's x_hat there."""
    t, s = (jnp.full(len(z_1), value, jnp.float32) for value in (t, s))
    z_s = mixtures.probability_flow(GAUSSIAN, z_1, logsnr_t=t, logsnr_s=s)
    return mixtures.denoise(GAUSSIAN, z_s, logsnr_t=s) if denoised else z_s


def largest_error(grid, sampler, *, end=None):
    """Against the flow from the grid's first point to its last, and the denoiser there.

    With `end`, against the flow to that log-SNR: the last point's x_hat is then a step of its own.
    """
    keys, z_1 = keys_and_noise(16)
    exact = flow(z_1, grid[0], grid[-1] if end is None else end, denoised=end is None)
    return float(jnp.max(jnp.abs(draw(z_1, keys, grid, sampler=sampler) - exact)))


def orders(num_steps, errors):
    """p of error ~ 1 / N^p from each pair of neighbours."""
    return -np.diff(np.log(errors)) / np.diff(np.log(num_steps))


# Points of the grids: few sizes, since each is a program of its own.
POINTS = (33, 65, 129)


def test_ddim_has_order_one_over_all_of_time():
    """z = cos(phi) x + sin(phi) eps has dz / dphi = v_hat, which is smooth in phi, the cosine's own time.

    So nothing happens at the ends, though the log-SNR runs from -15 to 15, and x_hat of the last point is
    one more step of the same kind: it reaches the data, x_0.
    """
    errors = [largest_error(schedules.uniform_grid(COSINE, n), "ddim", end=15.0) for n in POINTS]
    # Measured: 0.987, 0.993.
    np.testing.assert_allclose(orders(POINTS, errors), 1, atol=0.03)


SMOOTH_GRIDS = {
    "middle": lambda n: COSINE(jnp.linspace(0.9, 0.1, n)),
    "karras": schedules.karras_grid,
}


@pytest.mark.parametrize("grid", SMOOTH_GRIDS)
@pytest.mark.parametrize(("sampler", "order"), [("ddim", 1), ("heun", 2)])
def test_order_of_convergence_where_the_grid_is_smooth(grid, sampler, order):
    """Heun's error is counted in sbar = sigma / alpha, so its grid must be smooth in sbar.

    Both grids are: a middle part of the cosine (log-SNR -3.7 to 3.7), and Karras' from sbar = 80 to 0.002.
    """
    errors = [largest_error(SMOOTH_GRIDS[grid](n), sampler) for n in POINTS]
    # Measured: DDIM 0.99, 0.99 and 0.97, 0.98, Heun 2.02, 2.03 and 2.05, 2.03. The last error of Heun is
    # 1e-4, of which float32 has 3e-6.
    np.testing.assert_allclose(orders(np.array(POINTS) - 1, errors), order, atol=0.08)


def test_heun_loses_to_ddim_on_the_whole_cosine():
    """Its first step ends at sbar = 2 N / pi however large sbar = 1808 was: no step of any small size.

    There eps_hat = k (1 - c^2 / 2 sbar^2) for a standard deviation c; the trapezoid over it is off by
    1808 / 4 (c / sbar)^2, which the flow to the data shrinks by c / sbar: ~ 1 / N^3, with a huge factor, as
    long as N is far below 1808. DDIM's first step has no such error: the paper's finding on Heun's grid.
    """
    points = (8, 16, 33)
    heun, ddim = (
        [largest_error(schedules.uniform_grid(COSINE, n), s, end=15.0) for n in points]
        for s in ("heun", "ddim")
    )
    # Measured: 3.0, 3.0; 12 and 3 times the error of DDIM, at twice the price.
    np.testing.assert_allclose(orders(points, heun), 3, atol=0.1)
    assert heun[0] > 10 * ddim[0] and heun[1] > 2 * ddim[1]


@pytest.mark.parametrize("num_steps", [3, 20])
def test_ddpm_of_a_gaussian_has_known_moments(num_steps):
    """Mean and covariance of x, by recursion over q(z_s | z_t, x_hat) in every eigen-direction."""
    grid = schedules.uniform_grid(COSINE, num_steps)
    mean, variance = np.zeros(3), np.ones(3)
    for t, s in itertools.pairwise(np.asarray(grid, np.float64)):
        x_a, x_b = x_hat_line(t)

        # reference.ddpm is linear in (x, z_t, noise).
        def response(x, z, noise, t=t, s=s):
            return reference.ddpm(x, z, noise, t, s)

        slope = response(x_a, 1.0, 0.0)
        mean = slope * mean + response(x_b, 0.0, 0.0)
        variance = slope**2 * variance + response(0.0, 0.0, 1.0) ** 2
    x_a, x_b = x_hat_line(np.float64(grid[-1]))
    mean, variance = x_a * mean + x_b, x_a**2 * variance
    # The bias that the moments of the data would hide.
    assert np.all(variance < 0.95 * STDS**2)

    count = 20_000
    keys, z_1 = keys_and_noise(count, seed=1)
    x = np.asarray(draw(z_1, keys, grid, sampler="ddpm"), np.float64) @ GAUSSIAN.basis
    scores = (x - mean) / np.sqrt(variance)
    # Standard errors: 1 / sqrt(n) of the mean, at most sqrt(2 / n) of the covariance; four of them.
    np.testing.assert_allclose(scores.mean(axis=0), 0, atol=4 / np.sqrt(count))
    np.testing.assert_allclose(scores.T @ scores / count, np.eye(3), atol=4 * np.sqrt(2 / count))


# --- aDDIM's overshoot. ---


@jax.jit
def one_step(mixture, z_t, t, s):
    """z_s by DDIM, by aDDIM with the true posterior variance, and by the flow."""
    x_hat = mixtures.denoise(mixture, z_t, logsnr_t=t)
    x_var = mixtures.posterior_variance(mixture, z_t, logsnr_t=t)
    return (
        steps.ddim(x_hat, z_t, logsnr_t=t, logsnr_s=s),
        steps.addim(x_hat, z_t, logsnr_t=t, logsnr_s=s, x_var=x_var),
        mixtures.probability_flow(mixture, z_t, logsnr_t=t, logsnr_s=s),
    )


@hypothesis.given(st.integers(0, 2**31 - 1), st.floats(0.05, 0.95), st.floats(0.1, 0.9))
def test_addim_overshoots_on_a_gaussian_by_its_cross_term(seed, t, s_over_t):
    """With the true posterior variance the promised norm is the flow's own; aDDIM is above it.

    In an eigen-direction of variance v, S^2 = alpha^2 v + sigma^2: the flow takes z_t to z_t S_s / S_t, DDIM
    to z_t Q / S_t^2 with Q = alpha_t alpha_s v + sigma_t sigma_s, and S_s^2 - Q^2 / S_t^2 = k^2 v sigma_t^2 /
    S_t^2 (Lagrange's identity) is k^2 times the posterior variance. So where z_t^2 = S_t^2 in all directions
    ||z_DDIM||^2 + d z_s_var = ||z_flow||^2. But x_hat = alpha_t v z_t / S_t^2 and eps_hat = sigma_t z_t / S_t^2
    are not orthogonal: ||z_aDDIM||^2 exceeds it by 2 alpha_s (c - sigma_s) <x_hat, eps_hat> > 0 with
    c^2 = sigma_s^2 + (d / ||eps_hat||^2) z_s_var.
    """
    rng, dimension = np.random.default_rng(seed), 4
    root = rng.normal(size=(dimension, dimension))
    mixture = mixtures.gaussian(np.zeros(dimension), 0.2 * root @ root.T)
    variances = mixture.stds[:, 0] ** 2
    logsnr_t, logsnr_s = (float(COSINE(jnp.float32(time))) for time in (t, s_over_t * t))
    (alpha_t, sigma_t), (alpha_s, sigma_s) = map(reference.alpha_sigma, (logsnr_t, logsnr_s))
    spread = alpha_t**2 * variances + sigma_t**2  # S_t^2
    u = np.sqrt(spread) * rng.choice([-1, 1], dimension)

    # In float64 from the formulas.
    x_hat, eps_hat = alpha_t * variances * u / spread, sigma_t * u / spread
    k = alpha_s - alpha_t * sigma_s / sigma_t
    z_s_var = k**2 * np.mean(variances * sigma_t**2 / spread)
    c = np.sqrt(sigma_s**2 + dimension / np.sum(eps_hat**2) * z_s_var)
    excess = 2 * alpha_s * (c - sigma_s) * np.sum(x_hat * eps_hat)
    assert excess > 0

    z_t = jnp.asarray((mixture.basis @ u)[None], jnp.float32)
    t, s = (jnp.full(1, value, jnp.float32) for value in (logsnr_t, logsnr_s))
    ddim, addim, exact_z = one_step(mixture, z_t, t, s)
    promised, actual, exact = (
        np.sum(np.square(np.asarray(z, np.float64))) + more
        for z, more in ((ddim, dimension * z_s_var), (addim, 0.0), (exact_z, 0.0))
    )
    # A norm of about 1 to 5 in float32: relative errors of 1e-6 (measured 3e-6 at most).
    np.testing.assert_allclose(promised, exact, rtol=2e-5)
    np.testing.assert_allclose(actual - exact, excess, rtol=0, atol=2e-5 * exact)
    if excess > 1e-4 * exact:
        assert actual > exact
