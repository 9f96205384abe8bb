import itertools
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mcm_jax.diffusion import process, sampling, schedules, steps
from tests import reference

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


KEYS = sampling.image_keys(jax.random.key(0), jnp.arange(4))


def noise(keys=KEYS):
    return sampling.initial_noise(keys, (4, 4, 3))


def run(model_fn, num_steps, *, keys=KEYS, z_1=None, **options):
    return sampling.sample(
        model_fn,
        noise(keys) if z_1 is None else z_1,
        jnp.zeros(len(keys), jnp.int32),
        keys,
        logsnr=schedules.uniform_grid(SCHEDULE, num_steps),
        **options,
    )


@pytest.mark.parametrize(("sampler", "num_steps", "tolerance"), [("ddim", 1000, 0.01), ("heun", 100, 0.002)])
def test_many_steps_solve_the_ode_of_a_gaussian(sampler, num_steps, tolerance):
    """The flow from z_1 scales it by the data's standard deviation; DDIM's order is one, Heun's two."""
    x = run(exact_gaussian, num_steps, sampler=sampler)
    np.testing.assert_allclose(x, np.sqrt(VARIANCE) * noise(), rtol=tolerance, atol=1e-4)


@pytest.mark.parametrize("sampler", typing.get_args(sampling.Sampler))
def test_one_step_returns_x_hat(sampler):
    x = run(exact_gaussian, 1, sampler=sampler)
    logsnr = jnp.full(4, SCHEDULE(jnp.float32(1.0)))
    v_hat = exact_gaussian(noise(), logsnr, COND, None)
    expected = process.x_from_v(v_hat, noise(), logsnr_t=logsnr)
    np.testing.assert_allclose(x, expected, rtol=1e-6)


def test_addim_is_noisier_than_ddim():
    """It restores variance: with the exact denoiser of a Gaussian it overshoots."""
    keys = sampling.image_keys(jax.random.key(0), jnp.arange(64))
    ddim, addim = (run(exact_gaussian, 16, keys=keys, sampler=s) for s in ("ddim", "addim"))
    assert jnp.std(addim) > 1.02 * jnp.std(ddim)


@pytest.mark.parametrize("sampler", typing.get_args(sampling.Sampler))
def test_three_steps_by_hand(sampler):
    """The loop hands the right times, noise and variance to each step."""
    logsnr, x_var = schedules.uniform_grid(SCHEDULE, 3), jnp.array([0.2, 0.5, 0.9])

    def predict(z, at):
        v_hat = exact_gaussian(z, at, COND, None)
        return process.x_from_v(v_hat, z, logsnr_t=at), process.eps_from_v(v_hat, z, logsnr_t=at)

    z_t = noise()
    for i in range(2):
        t, s, variance = (jnp.full(4, value) for value in (logsnr[i], logsnr[i + 1], x_var[i]))
        times = {"logsnr_t": t, "logsnr_s": s}
        x_hat, eps_hat = predict(z_t, t)
        # The steps' noise is drawn after noise, label and measurement.
        purpose = 3 + i
        fresh = jax.vmap(lambda key, n=purpose: jax.random.normal(jax.random.fold_in(key, n), (4, 4, 3)))(
            KEYS
        )
        z_s = steps.ddim(x_hat, z_t, **times)
        if sampler == "addim":
            z_s = steps.addim(x_hat, z_t, x_var=variance, **times)
        elif sampler == "noisy_ddim":
            z_s = steps.noisy_ddim(x_hat, z_t, fresh, x_var=variance, **times)
        elif sampler == "ddpm":
            z_s = steps.ddpm(x_hat, z_t, fresh, **times)
        elif sampler == "consistency":
            z_s = process.diffuse(x_hat, fresh, logsnr_t=s)
        elif sampler == "heun":
            z_s = steps.heun(z_s, eps_hat, predict(z_s, s)[1], **times)
        z_t = z_s
    expected, _ = predict(z_t, jnp.full(4, logsnr[2]))
    actual = run(exact_gaussian, 3, sampler=sampler, x_var=x_var)
    np.testing.assert_allclose(actual, jnp.clip(expected, -1, 1), atol=1e-5)


def test_the_variance_is_analytic_if_none_is_given():
    logsnr = schedules.uniform_grid(SCHEDULE, 5)
    given = run(exact_gaussian, 5, sampler="addim", x_var=steps.analytic_x_var(logsnr))
    np.testing.assert_array_equal(run(exact_gaussian, 5, sampler="addim"), given)
    assert not np.array_equal(run(exact_gaussian, 5), given)


def test_ddpm_has_the_exact_moments():
    """On a Gaussian every step is linear: the variance follows by a recursion, too small by order 1/N."""
    num_steps = 50
    logsnr = np.asarray(schedules.uniform_grid(SCHEDULE, num_steps), np.float64)
    (a, s), variance = (np.array([reference.alpha_sigma(at) for at in logsnr]).T, 1.0)
    x_gain = a * VARIANCE / (a**2 * VARIANCE + s**2)
    for i in range(num_steps - 1):
        r = (a[i] * s[i + 1] / (s[i] * a[i + 1])) ** 2
        z_gain = a[i] * s[i + 1] ** 2 / (a[i + 1] * s[i] ** 2) + (1 - r) * a[i + 1] * x_gain[i]
        variance = z_gain**2 * variance + (1 - r) * s[i + 1] ** 2
    expected = x_gain[-1] ** 2 * variance
    assert expected < 0.9 * VARIANCE
    keys = sampling.image_keys(jax.random.key(1), jnp.arange(2000))
    x = run(exact_gaussian, num_steps, keys=keys, sampler="ddpm")
    # 96,000 pixels: standard error 0.5% of the variance, 0.001 of the mean.
    np.testing.assert_allclose(jnp.var(x), expected, rtol=0.02)
    np.testing.assert_allclose(jnp.mean(x), 0, atol=0.004)


@pytest.mark.parametrize("sampler", ["noisy_ddim", "ddpm"])
def test_noise_is_fresh_in_every_step_and_image(sampler):
    """Two images from one z_1 part ways, and so do the same image's steps."""
    z_1 = jnp.broadcast_to(noise()[:1], (4, 4, 4, 3))
    x = run(exact_gaussian, 3, sampler=sampler, z_1=z_1)
    assert not np.allclose(x[0], x[1], atol=1e-3)
    seen = []

    def blind(z_t, logsnr_t, cond, key):
        jax.debug.callback(lambda z: seen.append(np.asarray(z)), z_t)
        return jnp.zeros_like(z_t)

    run(blind, 4, sampler=sampler).block_until_ready()
    jax.effects_barrier()
    # v_hat = 0 means x_hat = alpha z: what is left of z after the step's deterministic part is its noise.
    assert len(seen) == 4
    changes = [b - np.sum(a * b) / np.sum(a * a) * a for a, b in itertools.pairwise(seen)]
    for a, b in itertools.combinations(changes, 2):
        # 192 independent numbers: correlation 0.07 by chance.
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.3


def test_clipping_in_every_step():
    """An x_hat outside of [-1, 1] is clipped before the step, with the eps_hat that belongs to it."""
    # Heun would multiply eps_hat by 700 on a step from t = 1, and take nearly every pixel out of the range.
    logsnr = jnp.array([-2.0, 2.0])
    t, s = (jnp.full(4, value) for value in logsnr)

    def loud(z_t, logsnr_t, cond, key):
        # Outside of [-1, 1] at t, inside where the samples are read.
        loudness = process.over_pixels(jnp.where(logsnr_t < 0, 2.0, 0.2), z_t)
        return exact_gaussian(z_t, logsnr_t, cond, key) - loudness * jnp.sin(3 * z_t)

    for sampler in ("ddim", "heun"):
        x_hat = jnp.clip(process.x_from_v(loud(noise(), t, COND, None), noise(), logsnr_t=t), -1, 1)
        z_s = steps.ddim(x_hat, noise(), logsnr_t=t, logsnr_s=s)
        if sampler == "heun":
            x_hat_s = jnp.clip(process.x_from_v(loud(z_s, s, COND, None), z_s, logsnr_t=s), -1, 1)
            eps_t = process.eps_from_x(x_hat, noise(), logsnr_t=t)
            eps_s = process.eps_from_x(x_hat_s, z_s, logsnr_t=s)
            z_s = steps.heun(z_s, eps_t, eps_s, logsnr_t=t, logsnr_s=s)
        expected = jnp.clip(process.x_from_v(loud(z_s, s, COND, None), z_s, logsnr_t=s), -1, 1)
        every, last = (
            sampling.sample(loud, noise(), COND, KEYS, logsnr=logsnr, sampler=sampler, clip=clip)
            for clip in ("every", "last")
        )
        np.testing.assert_allclose(every, expected, atol=1e-5)
        assert jnp.mean(jnp.abs(every - last) > 0.01) > 0.3


def test_samples_are_clipped():
    def large(z_t, logsnr_t, cond, key):
        del logsnr_t, cond, key
        return -100 * z_t

    assert jnp.max(jnp.abs(run(large, 3))) == 1
    assert jnp.max(jnp.abs(run(large, 3, clip="every"))) == 1
    assert jnp.max(jnp.abs(run(large, 3, clip="never"))) > 1


@pytest.mark.parametrize("sampler", typing.get_args(sampling.Sampler))
@pytest.mark.parametrize("num_steps", [1, 2, 5])
def test_network_calls(num_steps, sampler):
    seen = []

    def model_fn(z_t, logsnr_t, cond, key):
        jax.debug.callback(lambda value: seen.append(float(value)), logsnr_t[0])
        return exact_gaussian(z_t, logsnr_t, cond, key)

    run(model_fn, num_steps, sampler=sampler).block_until_ready()
    jax.effects_barrier()
    times = np.arange(num_steps, 0, -1) / num_steps
    if sampler == "heun":
        times = np.array([*np.repeat(times[:-1], 2), times[-1]])
        # Callbacks within one step are not ordered: their set is.
        times[1:-1:2] = times[2::2]
    np.testing.assert_allclose(np.sort(seen), np.sort(SCHEDULE(jnp.asarray(times, jnp.float32))), rtol=1e-6)
    assert len(seen) == sampling.network_calls(sampler, num_steps)


def test_measured_variance():
    """For the exact denoiser of a Gaussian it is the posterior variance v sigma^2 / (alpha^2 v + sigma^2)."""
    keys = sampling.image_keys(jax.random.key(1), jnp.arange(500))
    x = np.sqrt(VARIANCE) * jax.random.normal(jax.random.key(2), (500, 4, 4, 3))
    logsnr = schedules.uniform_grid(SCHEDULE, 6)
    errors = sampling.measure_x_var(exact_gaussian, x, jnp.zeros(500, jnp.int32), keys, logsnr=logsnr)
    assert errors.shape == (6, 500)
    alpha, sigma = process.alpha(logsnr), process.sigma(logsnr)
    expected = VARIANCE * sigma**2 / (alpha**2 * VARIANCE + sigma**2)
    # A chi-square of 24,000 degrees: standard error 0.9%.
    np.testing.assert_allclose(errors.mean(axis=1), expected, rtol=0.04)
    alone = sampling.measure_x_var(exact_gaussian, x[:2], jnp.zeros(2, jnp.int32), keys[:2], logsnr=logsnr)
    np.testing.assert_allclose(alone, errors[:, :2], rtol=1e-5)
    # Noise of its own, not that which sampling starts from.
    eps = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, 2), (4, 4, 3)))(keys[:2])
    t = jnp.full(2, logsnr[2])
    z_t = process.diffuse(x[:2], eps, logsnr_t=t)
    x_hat = process.x_from_v(exact_gaussian(z_t, t, None, None), z_t, logsnr_t=t)
    np.testing.assert_allclose(errors[2, :2], process.mean_square(x[:2] - x_hat), rtol=1e-5)


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


def test_noise_and_label_are_independent():
    """From one key, the label of four equal classes would be the place of the largest of four noises."""
    keys = sampling.image_keys(jax.random.key(0), jnp.arange(8000))
    largest = jnp.argmax(sampling.initial_noise(keys, (4,)), axis=1)
    labels = sampling.draw_labels(keys, jnp.full(4, 0.25))
    # A quarter by chance, standard deviation 0.005.
    np.testing.assert_allclose(jnp.mean(largest == labels), 0.25, atol=0.02)


@pytest.mark.parametrize("clip", typing.get_args(sampling.Clip))
@pytest.mark.parametrize("sampler", typing.get_args(sampling.Sampler))
def test_a_trajectory_has_the_x_hat_of_every_step(sampler, clip):
    """That of point k is what the same sampler returns on the grid up to k. Some exceed [-1, 1]."""

    def loud(z_t, logsnr_t, cond, key, logsnr_u):
        # A network that uses the end of the step.
        return exact_gaussian(z_t, logsnr_t, cond, key) * (3 + jnp.tanh(process.over_pixels(logsnr_u, z_t)))

    grid, end = schedules.uniform_grid(SCHEDULE, 4), jnp.float32(20)
    ends = jnp.append(grid[1:], end)
    options = {"sampler": sampler, "clip": clip}
    whole = sampling.sample(
        loud, noise(), COND, KEYS, logsnr=grid, logsnr_end=end, trajectory=True, **options
    )
    assert whole.shape == (4, 4, 4, 4, 3)
    for k in range(4):
        part = sampling.sample(loud, noise(), COND, KEYS, logsnr=grid[: k + 1], logsnr_end=ends[k], **options)
        # float32: another program of the same operations.
        np.testing.assert_allclose(whole[:, k], part, rtol=1e-5, atol=1e-5)
    assert (jnp.abs(whole).max() > 1) == (clip == "never")
