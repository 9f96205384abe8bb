import math

import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest

from mcm_jax.diffusion import schedules
from tests import reference

T = jnp.linspace(0, 1, 1281)


def test_cosine_equals_float64_on_the_finest_grid():
    expected = [reference.cosine_logsnr(float(t)) for t in T]
    # float32 has 9e-7 absolute resolution at 15; the computation itself adds about as much.
    np.testing.assert_allclose(schedules.cosine()(T), expected, atol=3e-6)


def test_cosine_spans_its_limits_and_falls():
    logsnr = np.asarray(schedules.cosine(logsnr_min=-12.0, logsnr_max=10.0)(T))
    np.testing.assert_allclose(logsnr[[0, -1]], [10.0, -12.0], rtol=1e-6)
    assert np.all(np.diff(logsnr) < 0)


def test_cosine_is_antisymmetric():
    schedule = schedules.cosine()
    # 1 - t rounds by 3e-8, times the slope 2 / t = 2560 at the first step.
    np.testing.assert_allclose(schedule(T), -schedule(1 - T), atol=8e-5)


def test_cosine_is_pi_t_over_2_in_the_middle():
    """Far from the clip alpha = cos(pi t / 2) and sigma = sin(pi t / 2)."""
    t = jnp.array([0.25, 0.5, 0.75])
    tan = np.exp(-np.asarray(schedules.cosine()(t)) / 2)
    # The rescaling of t moves it by 3.5e-4 at most.
    np.testing.assert_allclose(tan, np.tan(np.pi * t / 2), rtol=2e-3)


@pytest.mark.parametrize(("n", "r"), [(32, 64), (64, 64), (32, 16)])
def test_shift_is_two_log_of_the_ratio(n, r):
    shift = schedules.shifted(noise_resolution=n, image_resolution=r)(T) - schedules.cosine()(T)
    np.testing.assert_allclose(shift, 2 * np.log(n / r), atol=4e-6)


@pytest.mark.parametrize("n", [16, 32, 256])
def test_kept_end_points_stay(n):
    schedule = schedules.shifted(noise_resolution=n, image_resolution=64, end_points="kept")
    np.testing.assert_allclose(schedule(jnp.array([0.0, 1.0])), [15.0, -15.0], rtol=1e-6)


def test_imagenet64_is_cosine_minus_1386_one_minus_t():
    schedule = schedules.interpolated(noise_resolution_low=32, noise_resolution_high=64, image_resolution=64)
    expected = [reference.cosine_logsnr(float(t)) - 2 * np.log(2) * (1 - float(t)) for t in T]
    np.testing.assert_allclose(schedule(T), expected, atol=4e-6)


@hypothesis.given(st.integers(8, 512), st.integers(8, 512), st.sampled_from(["moved", "kept"]))
def test_every_schedule_falls(low, high, end_points):
    if low > high:
        low, high = high, low
    schedule = schedules.interpolated(
        noise_resolution_low=low,
        noise_resolution_high=high,
        image_resolution=64,
        end_points=end_points,
    )
    logsnr = np.asarray(schedule(T[::10]), np.float64)
    assert np.all(np.isfinite(logsnr))
    assert logsnr[0] > logsnr[-1]


def test_karras():
    """Uniform steps are the grid of 1,281 points, but for the rounding of t times a slope of up to 50."""
    logsnr = schedules.karras()(T[::-1])
    np.testing.assert_allclose(logsnr, schedules.karras_grid(1281), rtol=0, atol=4e-6)
    t = np.float32([1e-6, 1e-3, 0.3, 0.7, 1 - 1e-6])
    ends = [math.exp(limit / 2 / 5) for limit in (-10.0, 6.0)]
    root = ends[0] + t.astype(np.float64) * (ends[1] - ends[0])
    actual = schedules.karras(logsnr_min=-6.0, logsnr_max=10.0, rho=5.0)(jnp.asarray(t))
    np.testing.assert_allclose(actual, -10 * np.log(root), rtol=0, atol=2e-6)


def test_uniform_grid():
    """t = 1, 1 - 1/N, ..., 1/N, divided in float64: the float32 nearest to each."""
    schedule = schedules.cosine()
    for num_steps in (1, 3, 7, 1280):
        t = [np.float32(n / num_steps) for n in range(num_steps, 0, -1)]
        np.testing.assert_array_equal(schedules.uniform_grid(schedule, num_steps), schedule(jnp.array(t)))


@pytest.mark.parametrize("num_steps", [2, 18, 256])
def test_karras_grid(num_steps):
    logsnr = schedules.karras_grid(num_steps)
    for i in range(num_steps):
        sigma = (80 ** (1 / 7) + i / (num_steps - 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
        # sigma / alpha of a variance preserving process is exp(-lambda / 2).
        np.testing.assert_allclose(logsnr[i], -2 * np.log(sigma), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(schedules.karras_grid(1), [-2 * np.log(80)], rtol=1e-6)


@pytest.mark.parametrize(
    ("kind", "position", "points"), [("published_cd", 22, 40), ("published_ct", 106, 201)]
)
def test_the_grids_of_published_consistency_models(kind, position, points):
    every = schedules.karras_grid(points)
    np.testing.assert_array_equal(schedules.published_grid(kind, 2), every[jnp.array([0, position])])
    np.testing.assert_array_equal(schedules.published_grid(kind, 1), every[:1])
    with pytest.raises(ValueError, match="1 or 2 steps, not 3"):
        schedules.published_grid(kind, 3)
