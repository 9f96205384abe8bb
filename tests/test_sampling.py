import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mcm_jax import sampling
from mcm_jax.diffusion import process, schedules

SCHEDULE = schedules.cosine()
COND = jnp.zeros(4, jnp.int32)
VARIANCE = 0.09


def exact_gaussian(z_t, logsnr_t, cond, key):
    """v of E[x | z_t] for x ~ N(0, VARIANCE I)."""
    del cond
    assert key is None  # no dropout in sampling
    alpha, sigma = (process.over_pixels(f(logsnr_t), z_t) for f in (process.alpha, process.sigma))
    x_hat = alpha * VARIANCE / (alpha**2 * VARIANCE + sigma**2) * z_t
    return (alpha * z_t - x_hat) / sigma


def noise(count=4):
    keys = sampling.image_keys(jax.random.key(0), jnp.arange(count))
    return sampling.initial_noise(keys, (4, 4, 3))


def test_many_ddim_steps_solve_the_ode_of_a_gaussian():
    """The flow from z_1 scales it by the data's standard deviation."""
    x = sampling.sample(exact_gaussian, noise(), COND, schedule=SCHEDULE, num_steps=1000)
    # Order one: the error is about 2 / num_steps of the scale.
    np.testing.assert_allclose(x, np.sqrt(VARIANCE) * noise(), rtol=0.01, atol=1e-4)


@pytest.mark.parametrize("sampler", ["ddim", "addim"])
def test_one_step_returns_x_hat(sampler):
    x = sampling.sample(exact_gaussian, noise(), COND, schedule=SCHEDULE, num_steps=1, sampler=sampler)
    logsnr = jnp.full(4, SCHEDULE(jnp.float32(1.0)))
    v_hat = exact_gaussian(noise(), logsnr, COND, None)
    expected = process.x_from_v(v_hat, noise(), logsnr_t=logsnr)
    np.testing.assert_allclose(x, expected, rtol=1e-6)


def test_addim_is_noisier_than_ddim():
    """It restores variance: with the exact denoiser of a Gaussian it overshoots."""
    run = functools.partial(
        sampling.sample, exact_gaussian, noise(64), jnp.zeros(64, jnp.int32), schedule=SCHEDULE
    )
    assert jnp.std(run(num_steps=16, sampler="addim")) > 1.02 * jnp.std(run(num_steps=16))


def test_samples_are_clipped():
    def large(z_t, logsnr_t, cond, key):
        del logsnr_t, cond, key
        return -100 * z_t

    x = sampling.sample(large, noise(), COND, schedule=SCHEDULE, num_steps=3)
    assert jnp.max(jnp.abs(x)) == 1


@pytest.mark.parametrize("num_steps", [1, 2, 5])
def test_network_calls(num_steps):
    seen = []

    def model_fn(z_t, logsnr_t, cond, key):
        jax.debug.callback(lambda value: seen.append(float(value)), logsnr_t[0])
        return exact_gaussian(z_t, logsnr_t, cond, key)

    sampling.sample(model_fn, noise(), COND, schedule=SCHEDULE, num_steps=num_steps).block_until_ready()
    jax.effects_barrier()
    times = jnp.arange(num_steps, 0, -1) / num_steps
    np.testing.assert_allclose(seen, SCHEDULE(times), rtol=1e-6)


def test_an_image_depends_on_its_own_number_only():
    keys = sampling.image_keys(jax.random.key(3), jnp.arange(16))
    some = sampling.image_keys(jax.random.key(3), jnp.array([11, 4]))
    whole, part = (sampling.initial_noise(k, (4, 4, 3)) for k in (keys, some))
    np.testing.assert_array_equal(whole[jnp.array([11, 4])], part)
    assert len(np.unique(np.asarray(whole[:, 0, 0, 0]))) == 16


def test_labels_follow_their_probabilities():
    keys = sampling.image_keys(jax.random.key(0), jnp.arange(8000))
    labels = sampling.draw_labels(keys, jnp.array([0.5, 0.0, 0.25, 0.25]))
    counts = np.bincount(labels, minlength=4)
    assert counts[1] == 0
    # Standard deviation 45 at most.
    np.testing.assert_allclose(counts, [4000, 0, 2000, 2000], atol=180)
