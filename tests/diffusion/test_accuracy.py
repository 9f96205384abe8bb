"""float32 against float64 over the whole range of times: what the docstrings state."""

import jax.numpy as jnp
import numpy as np
import pytest

from mcm_jax.diffusion import process, schedules, steps
from tests import reference

# (n_low, n_high, image resolution): plain, shifted and interpolated cosines of the paper's data sets.
RESOLUTIONS = [(64, 64, 64), (32, 32, 64), (32, 64, 64), (32, 128, 128), (32, 512, 512)]


def float64_logsnr(t, low, high, resolution, end_points):
    result = 0.0
    for noise_resolution, share in ((low, 1 - t), (high, t)):
        shift = 2 * np.log(noise_resolution / resolution)
        kept = shift if end_points == "kept" else 0.0
        result += share * (reference.cosine_logsnr(t, low=-15 - kept, high=15 - kept) + shift)
    return result


@pytest.mark.parametrize("resolutions", RESOLUTIONS)
@pytest.mark.parametrize("end_points", ["moved", "kept"])
def test_schedules(resolutions, end_points):
    low, high, resolution = resolutions
    schedule = schedules.interpolated(
        noise_resolution_low=low,
        noise_resolution_high=high,
        image_resolution=resolution,
        end_points=end_points,
    )
    near_the_ends = np.linspace(0, 1e-3, 50)
    t = np.concatenate([np.arange(1281) / 1280, near_the_ends, 1 - near_the_ends]).astype(np.float32)
    expected = [float64_logsnr(float(x), low, high, resolution, end_points) for x in t]
    np.testing.assert_allclose(schedule(jnp.asarray(t)), expected, rtol=0, atol=2e-6)


@pytest.fixture(scope="module", params=RESOLUTIONS[::2], ids=str)
def grid(request):
    """Every pair s < t of a grid of 64 and every eighth neighbour pair of 1280, the ends included."""
    low, high, resolution = request.param
    schedule = schedules.interpolated(
        noise_resolution_low=low, noise_resolution_high=high, image_resolution=resolution
    )
    neighbours = [(n, n - 1) for n in (*range(1, 1281, 8), 1280)]
    pairs = [(20 * a, 20 * b) for a in range(65) for b in range(a)] + neighbours
    t, s = (jnp.asarray(np.array(n) / 1280, jnp.float32) for n in zip(*pairs, strict=True))
    rng = np.random.default_rng(0)
    shape = (len(pairs), 2, 2, 3)
    x = rng.uniform(-1, 1, shape).astype(np.float32)
    eps, noise = rng.normal(size=(2, *shape)).astype(np.float32)
    logsnr_t, logsnr_s = schedule(t), schedule(s)
    return {
        "x": x,
        "noise": noise,
        "z_t": np.asarray(process.diffuse(jnp.asarray(x), jnp.asarray(eps), logsnr_t=logsnr_t)),
        "x_var": rng.uniform(0, 0.3, len(pairs)).astype(np.float32),
        "logsnr_t": np.asarray(logsnr_t),
        "logsnr_s": np.asarray(logsnr_s),
    }


def rows(grid, *names):
    return zip(*(np.asarray(grid[name], np.float64) for name in names), strict=True)


TIMES = ("logsnr_t", "logsnr_s")


@pytest.mark.parametrize(
    ("name", "arguments", "tolerance"),
    [
        ("ddim", ("x", "z_t", *TIMES), 1e-6),
        ("addim", ("x", "z_t", *TIMES, "x_var"), 1e-5),
        ("noisy_ddim", ("x", "z_t", "noise", *TIMES, "x_var"), 1e-6),
        ("ddpm", ("x", "z_t", "noise", *TIMES), 1e-6),
    ],
)
def test_steps(grid, name, arguments, tolerance):
    images = [jnp.asarray(grid[a]) for a in arguments if a in ("x", "z_t", "noise")]
    others = {a: jnp.asarray(grid[a]) for a in arguments if a not in ("x", "z_t", "noise")}
    actual = getattr(steps, name)(*images, **others)
    expected = [getattr(reference, name)(*row) for row in rows(grid, *arguments)]
    np.testing.assert_allclose(actual, np.stack(expected), rtol=0, atol=tolerance)


def test_inv_ddim(grid):
    """z_s alone is uncertain by 4e-7, which the division by x's gain in z_s makes larger: undo it."""
    z_s = np.stack([reference.ddim(*row) for row in rows(grid, "x", "z_t", *TIMES)]).astype(np.float32)
    times = {name: jnp.asarray(grid[name]) for name in TIMES}
    actual = steps.inv_ddim(jnp.asarray(z_s), jnp.asarray(grid["z_t"]), **times)
    with_z_s = {**grid, "z_s": z_s}
    expected = np.stack([reference.inv_ddim(*row) for row in rows(with_z_s, "z_s", "z_t", *TIMES)])
    gain = [reference.ddim(1.0, 0.0, t, s) for t, s in rows(grid, *TIMES)]
    error = np.abs(actual - expected).max(axis=(1, 2, 3)) * gain
    assert error.max() < 1e-6


def test_heun(grid):
    """The gain of the slopes' difference reaches 1800 on the first step of a cosine schedule: undo it."""
    times = {name: jnp.asarray(grid[name]) for name in TIMES}
    eps_t = np.stack(
        [
            (z_t - a * x) / s
            for x, z_t, t in rows(grid, "x", "z_t", "logsnr_t")
            for a, s in [reference.alpha_sigma(t)]
        ]
    ).astype(np.float32)
    eps_s = eps_t + 0.1 * grid["noise"]
    # The x_hat that belongs to eps_t as rounded: otherwise the two say different things of z_t.
    z_s, expected = [], []
    for z_t, e_t, e_s, t, s in rows({**grid, "e_t": eps_t, "e_s": eps_s}, "z_t", "e_t", "e_s", *TIMES):
        alpha_t, sigma_t = reference.alpha_sigma(t)
        z_s.append(reference.ddim((z_t - sigma_t * e_t) / alpha_t, z_t, t, s))
        expected.append(reference.heun(None, e_t, e_s, z_t, t, s))
    actual = steps.heun(
        jnp.asarray(np.stack(z_s), jnp.float32), jnp.asarray(eps_t), jnp.asarray(eps_s), **times
    )
    size = np.abs(np.stack(z_s)).max(axis=(1, 2, 3)) + np.abs(np.stack(expected)).max(axis=(1, 2, 3))
    error = np.abs(actual - np.stack(expected)).max(axis=(1, 2, 3)) / np.maximum(1, size)
    assert error.max() < 1e-6
