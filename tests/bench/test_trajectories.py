"""The numbers of the trajectories' figure: the flow's against its theory, a student's against the sampler."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from mcm_jax.bench import trajectories
from mcm_jax.diffusion import mixtures, sampling, schedules
from tests import reference

MIXTURE = mixtures.two_components()
STARTS = trajectories.starts(32)


def cdf(z, logsnr):
    """Of z_t, in float64."""
    alpha, sigma = reference.alpha_sigma(logsnr)
    return sum(scipy.stats.norm.cdf(z, alpha * m, np.hypot(0.1 * alpha, sigma)) / 2 for m in (-0.6, 0.6))


def model_fn(z_t, logsnr_t, cond, key):
    """Neither exact nor linear, and another one at every noise level."""
    return jnp.tanh(3 * z_t + logsnr_t[:, None]) - 0.1 * z_t


def test_starts_are_the_noise_s_quantiles():
    np.testing.assert_allclose(scipy.stats.norm.cdf(STARTS), (np.arange(32) + 0.5) / 32, atol=1e-6)


@pytest.fixture(scope="module")
def exact():
    return trajectories.exact(MIXTURE, trajectories.starts(1000), num_samples=2000)


def test_exact_paths_keep_their_quantile_and_end_in_the_data(exact):
    assert exact.t.shape == (129,) and exact.z.shape == (129, 1000) and exact.samples.shape == (2000,)
    assert exact.t[0] == 1 and exact.t[-1] == 0 and np.all(np.diff(exact.t) < 0)
    np.testing.assert_allclose(exact.z[0], trajectories.starts(1000), atol=2e-6)
    for row in (32, 64, 96):
        logsnr = float(schedules.cosine()(jnp.float32(exact.t[row])))
        quantiles = cdf(exact.z[row].astype(np.float64), logsnr)
        np.testing.assert_allclose(quantiles, (np.arange(1000) + 0.5) / 1000, atol=1e-3)
    # Even quantiles: the only distance left is that of 1000 points to a density.
    assert mixtures.marginal_wasserstein(MIXTURE, exact.z[-1][:, None]) < 1e-4
    assert exact.distance == mixtures.marginal_wasserstein(MIXTURE, exact.samples[:, None])
    # The documented mean for 1000 is 0.007.
    assert exact.distance < 0.03


@pytest.mark.parametrize("student_steps", [1, 2, 4])
def test_a_students_path_ends_where_the_sampler_does(student_steps):
    z = trajectories.student_path(model_fn, jnp.asarray(STARTS)[:, None], student_steps=student_steps)
    x = sampling.sample(
        model_fn,
        jnp.asarray(STARTS)[:, None],
        jnp.zeros(32, jnp.int32),
        sampling.image_keys(jax.random.key(0), jnp.arange(32)),
        logsnr=schedules.uniform_grid(schedules.cosine(), student_steps),
        clip="never",
    )
    np.testing.assert_array_equal(z[0, :, 0], STARTS)
    np.testing.assert_allclose(z[-1], x, atol=1e-5)


@pytest.mark.parametrize("student_steps", [1, 2, 4])
def test_a_students_path_is_straight_from_boundary_to_boundary_and_bends_there(student_steps):
    z = trajectories.student_path(model_fn, jnp.asarray(STARTS)[:, None], student_steps=student_steps)
    # Not the last row, which is x_hat.
    t = np.arange(128, 0, -1) / 128
    logsnr = schedules.cosine()(jnp.asarray(t, jnp.float32))
    alpha, sigma = np.transpose([reference.alpha_sigma(float(value)) for value in logsnr])
    # The slope of y = z / sigma over rho = alpha / sigma is x_hat.
    y, rho = np.asarray(z, float)[:-1, :, 0] / sigma[:, None], alpha / sigma
    slopes = np.diff(y, axis=0) / np.diff(rho)[:, None]
    segments = np.split(slopes, range(128 // student_steps, 127, 128 // student_steps))
    assert len(segments) == student_steps
    for n, segment in enumerate(segments):
        np.testing.assert_allclose(segment, np.broadcast_to(segment[-1], segment.shape), atol=2e-4)
        if n:
            assert np.abs(segment[-1] - segments[n - 1][-1]).max() > 0.1


def test_a_student_is_trained_sampled_and_measured():
    config = trajectories.student_config(2, num_updates=3)
    found = trajectories.student(MIXTURE, STARTS, config=config, num_samples=100)
    assert found.t.shape == (129,) and found.z.shape == (129, 32) and found.samples.shape == (100,)
    assert np.all(np.isfinite(found.z)) and np.all(np.isfinite(found.samples))
    assert found.distance == mixtures.marginal_wasserstein(MIXTURE, found.samples[:, None])


def test_training_brings_a_student_near_the_data():
    before, after = (
        trajectories.student(
            MIXTURE, STARTS, config=trajectories.student_config(4, num_updates=n), num_samples=2000
        ).distance
        for n in (1, 1000)
    )
    assert after < before / 5, (before, after)


def test_marginals_are_densities():
    t, z = np.linspace(1, 0, 5), np.linspace(-6, 6, 4001)
    density = trajectories.marginals(MIXTURE, t, z)
    assert density.shape == (5, 4001)
    np.testing.assert_allclose(np.trapezoid(density, z, axis=1), 1, atol=1e-3)
    np.testing.assert_allclose(density[0], scipy.stats.norm.pdf(z), atol=1e-3)
    data = (scipy.stats.norm.pdf(z, -0.6, 0.1) + scipy.stats.norm.pdf(z, 0.6, 0.1)) / 2
    np.testing.assert_allclose(density[-1], data, atol=1e-3)


def test_exact_samples_have_the_documented_distance():
    distances = trajectories.exact_distances(MIXTURE, num_samples=1000, draws=100)
    assert distances.shape == (100,) and len(set(distances)) == 100
    assert 0.004 < distances.mean() < 0.01
