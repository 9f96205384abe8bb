"""Everything exact about mixtures, against Bayes' rule, quadrature and ODEs in float64.

The reference knows nothing of the product: it writes all K^d components of x out, with full covariances.
"""

import functools
import itertools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.optimize
import scipy.special
import scipy.stats

from mcm_jax.diffusion import mixtures, process, schedules, steps
from tests import reference

COVARIANCE = np.array([[0.30, 0.10, -0.05], [0.10, 0.08, 0.02], [-0.05, 0.02, 0.05]])
MIXTURES = {
    "two_components": mixtures.two_components(),
    # Of a seed whose basis is a rotation by a general angle: that of a reflection is its own transpose.
    "plane": mixtures.random_mixture(6, dimension=2, components=2),
    "gaussian": mixtures.gaussian(np.array([0.3, -0.2, 0.1]), COVARIANCE),
}
LOGSNR = np.linspace(-16, 16, 17)

every_mixture = pytest.mark.parametrize("mixture", MIXTURES.values(), ids=MIXTURES.keys())
denoise = jax.jit(mixtures.denoise)
posterior_variance = jax.jit(mixtures.posterior_variance)
probability_flow = jax.jit(mixtures.probability_flow)


@jax.jit
def v_hat(mixture, z_t, logsnr_t):
    return mixtures.model_fn(mixture)(z_t, logsnr_t, None, None)


def flow(mixture, z_t, t, s):
    """probability_flow of a whole batch between the log-SNRs t and s."""
    t, s = (jnp.full(len(z_t), logsnr, jnp.float32) for logsnr in (t, s))
    return np.asarray(probability_flow(mixture, z_t, logsnr_t=t, logsnr_s=s))


def joint(mixture):
    """Weight, mean and covariance of every one of the K^d Gaussian components of x, in float64."""
    dimension, components = mixture.means.shape
    for choice in itertools.product(range(components), repeat=dimension):
        index = (range(dimension), choice)
        covariance = mixture.basis @ np.diag(mixture.stds[index] ** 2) @ mixture.basis.T
        yield np.prod(mixture.weights[index]), mixture.basis @ mixture.means[index], covariance


def bayes(mixture, z_t, logsnr):
    """E[x | z_t] and E||x - x_hat||^2 / d of points [B, d] at one log-SNR, in float64."""
    alpha, sigma = reference.alpha_sigma(logsnr)
    log_weights, means, squares = [], [], []
    for weight, mean, covariance in joint(mixture):
        total = alpha**2 * covariance + sigma**2 * np.eye(len(mean))
        gain = alpha * covariance @ np.linalg.inv(total)
        evidence = scipy.stats.multivariate_normal.logpdf(z_t, alpha * mean, total)
        log_weights.append(np.log(weight) + np.reshape(evidence, len(z_t)))
        means.append(mean + (z_t - alpha * mean) @ gain.T)
        squares.append(np.trace(covariance - alpha * gain @ covariance) + np.sum(means[-1] ** 2, axis=1))
    probability = scipy.special.softmax(log_weights, axis=0)
    x_hat = np.einsum("kb,kbd->bd", probability, means)
    return x_hat, (np.sum(probability * squares, axis=0) - np.sum(x_hat**2, axis=1)) / z_t.shape[1]


def bayes_v(mixture, z_t, logsnr):
    """E[v | z_t] = (alpha z_t - x_hat) / sigma, for which float64 has the digits."""
    alpha, sigma = reference.alpha_sigma(logsnr)
    return (alpha * z_t - bayes(mixture, z_t, logsnr)[0]) / sigma


def diffused(mixture, logsnr):
    """The distribution of z_t as a mixture of its own."""
    alpha, sigma = reference.alpha_sigma(logsnr)
    stds = np.sqrt(alpha**2 * mixture.stds**2 + sigma**2)
    return mixture._replace(means=alpha * mixture.means, stds=stds)


def cdf_and_density(mixture, points):
    """F(u_i), 1 - F(u_i) and p(u_i) of every coordinate of `points` [B, d], each [B, d], in float64."""
    scores = ((points @ mixture.basis)[..., None] - mixture.means) / mixture.stds
    below, above = (np.sum(mixture.weights * scipy.special.ndtr(a), axis=-1) for a in (scores, -scores))
    return below, above, np.sum(mixture.weights * scipy.stats.norm.pdf(scores) / mixture.stds, axis=-1)


def noisy_samples(mixture, logsnr, *, seed=0):
    """z_t of as many independent x as there are log-SNRs, float32 numbers in float64."""
    key_x, key_eps = jax.random.split(jax.random.key(seed))
    x = mixtures.sample(mixture, key_x, len(logsnr))
    eps = jax.random.normal(key_eps, x.shape)
    return np.asarray(process.diffuse(x, eps, logsnr_t=jnp.asarray(logsnr, jnp.float32)), np.float64)


@every_mixture
def test_posterior_equals_bayes_over_all_components(mixture):
    z_t = np.stack([noisy_samples(mixture, LOGSNR, seed=seed) for seed in range(8)], axis=1)
    logsnr_t = jnp.repeat(jnp.asarray(LOGSNR, jnp.float32), 8)
    flat = jnp.asarray(z_t.reshape(-1, z_t.shape[-1]), jnp.float32)
    x_hat, x_var = zip(*map(functools.partial(bayes, mixture), z_t, LOGSNR), strict=True)
    v = np.concatenate(list(map(functools.partial(bayes_v, mixture), z_t, LOGSNR)))
    # float32 rounds the input, of size 1, by 6e-8; no step after it amplifies that by more than a few.
    np.testing.assert_allclose(denoise(mixture, flat, logsnr_t=logsnr_t), np.concatenate(x_hat), atol=1e-6)
    np.testing.assert_allclose(v_hat(mixture, flat, logsnr_t), v, atol=2e-6)
    # 1e-4 relative between the modes, where two nearly equal exponents of size 100 are subtracted.
    variance = posterior_variance(mixture, flat, logsnr_t=logsnr_t)
    np.testing.assert_allclose(variance, np.concatenate(x_var), rtol=1e-4)


@pytest.mark.parametrize("logsnr", [-16.0, -3.0, 0.0, 4.0, 16.0])
def test_posterior_equals_quadrature_on_a_line(logsnr):
    mixture = mixtures.random_mixture(5, dimension=1, components=3)
    alpha, sigma = reference.alpha_sigma(logsnr)
    z_t = noisy_samples(mixture, np.full(6, logsnr))
    # Ten points in the narrowest sigma, 3.4e-4, make sums of Gaussians exact to rounding.
    x = np.linspace(-3, 3, 200_001)
    prior = cdf_and_density(mixture, x[:, None] * mixture.basis)[2][:, 0]
    # The basis of a line is 1 or -1.
    posterior = prior * np.exp(-0.5 * ((z_t * mixture.basis - alpha * x) / sigma) ** 2)
    posterior /= np.sum(posterior, axis=1, keepdims=True)
    mean, square = posterior @ x, posterior @ x**2
    logsnr_t = jnp.full(6, logsnr)
    z_t = jnp.asarray(z_t, jnp.float32)
    np.testing.assert_allclose(
        denoise(mixture, z_t, logsnr_t=logsnr_t), mean[:, None] * mixture.basis, atol=1e-6
    )
    # rtol as above; atol for the reference, a difference of squares.
    np.testing.assert_allclose(
        posterior_variance(mixture, z_t, logsnr_t=logsnr_t), square - mean**2, rtol=1e-4, atol=1e-12
    )


def test_posterior_variance_is_the_denoisers_mean_square_error():
    """E ||x - x_hat||^2 = E E[||x - x_hat||^2 | z_t], in as many dimensions as no reference reaches."""
    mixture = mixtures.random_mixture(0, dimension=48, components=3)
    x = mixtures.sample(mixture, jax.random.key(0), 4000)
    for logsnr in (-4.0, 0.0, 4.0):
        logsnr_t = jnp.full(len(x), logsnr)
        z_t = process.diffuse(x, jax.random.normal(jax.random.key(1), x.shape), logsnr_t=logsnr_t)
        errors = process.mean_square(x - denoise(mixture, z_t, logsnr_t=logsnr_t))
        expected = posterior_variance(mixture, z_t, logsnr_t=logsnr_t)
        # The mean of 4000 differences, five standard deviations.
        difference = np.asarray(errors - expected)
        assert abs(difference.mean()) < 5 * difference.std() / np.sqrt(len(x))


@hypothesis.given(st.floats(-12, 8), st.lists(st.floats(-3, 3), min_size=2, max_size=2))
def test_eps_hat_is_the_score(logsnr, z):
    """Tweedie: eps_hat = -sigma_t grad log p(z_t)."""
    mixture, z_t, logsnr_t = MIXTURES["plane"], jnp.array([z]), jnp.array([logsnr])
    eps_hat = process.eps_from_v(v_hat(mixture, z_t, logsnr_t), z_t, logsnr_t=logsnr_t)
    score = joint_score(z_t[0], logsnr)
    # The reference inverts float32 matrices, and far out, at log-SNR 8, eps_hat is of size 100.
    np.testing.assert_allclose(eps_hat[0], -process.sigma(logsnr_t) * score, rtol=1e-4, atol=1e-4)


@jax.jit
@jax.grad
def joint_score(z, logsnr):
    """grad_z log p(z_t) of the plane's mixture, by automatic differentiation."""
    alpha, sigma = process.alpha(logsnr), process.sigma(logsnr)
    log_terms = [
        jnp.log(weight)
        + jax.scipy.stats.multivariate_normal.logpdf(
            z, alpha * mean, alpha**2 * covariance + sigma**2 * jnp.eye(2)
        )
        for weight, mean, covariance in joint(MIXTURES["plane"])
    ]
    return jax.nn.logsumexp(jnp.stack(log_terms))


@every_mixture
@pytest.mark.parametrize("logsnr", [-6.0, 0.0, 5.0])
def test_log_density_equals_the_sum_over_all_components(mixture, logsnr):
    z_t = np.random.default_rng(0).normal(size=(100, len(mixture.means))).astype(np.float32)
    alpha, sigma = reference.alpha_sigma(logsnr)
    expected = scipy.special.logsumexp(
        [
            np.log(weight)
            + scipy.stats.multivariate_normal.logpdf(
                z_t, alpha * mean, alpha**2 * covariance + sigma**2 * np.eye(len(mean))
            )
            for weight, mean, covariance in joint(mixture)
        ],
        axis=0,
    )
    found = mixtures.log_density(mixture, jnp.asarray(z_t), logsnr_t=jnp.full(100, logsnr))
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)


def test_model_takes_images_and_ignores_classes_and_keys():
    mixture = mixtures.random_mixture(0, dimension=12, components=2)
    z_t, logsnr_t = jax.random.normal(jax.random.key(0), (3, 2, 2, 3)), jnp.array([-3.0, 0.0, 3.0])
    model = jax.jit(mixtures.model_fn(mixture))
    image = model(z_t, logsnr_t, jnp.arange(3), jax.random.key(1))
    np.testing.assert_array_equal(image.reshape(3, 12), model(z_t.reshape(3, 12), logsnr_t, None, None))


@pytest.mark.parametrize(
    "function",
    [
        lambda z, t: denoise(MIXTURES["plane"], z, logsnr_t=t),
        lambda z, t: posterior_variance(MIXTURES["plane"], z, logsnr_t=t),
        lambda z, t: v_hat(MIXTURES["plane"], z, t),
        lambda z, t: probability_flow(MIXTURES["plane"], z, logsnr_t=t, logsnr_s=t + 4),
    ],
)
def test_examples_do_not_influence_each_other(function):
    z_t, logsnr_t = jax.random.normal(jax.random.key(0), (4, 2)), jnp.array([-3.0, 0.0, 3.0, 6.0])
    whole = function(z_t, logsnr_t)
    disturbed = function(z_t.at[1:].multiply(3.0), logsnr_t.at[1:].add(2.0))
    np.testing.assert_array_equal(whole[0], disturbed[0])
    assert np.all(whole[1:] != disturbed[1:])


def solve_flow(mixture, z_t, t, s):
    """dz / dlambda = -(alpha sigma / 2) v from log-SNR t to s, of all points [B, d] at once, in float64."""

    def slope(logsnr, z):
        alpha, sigma = reference.alpha_sigma(logsnr)
        return -alpha * sigma / 2 * bayes_v(mixture, z.reshape(z_t.shape), logsnr).ravel()

    solution = scipy.integrate.solve_ivp(slope, (t, s), z_t.ravel(), method="DOP853", rtol=1e-10, atol=1e-12)
    return solution.y[:, -1].reshape(z_t.shape)


@pytest.mark.parametrize(("t", "s"), [(-15.0, 15.0), (15.0, -15.0), (-15.0, 1.0), (2.0, 9.0)])
@every_mixture
def test_flow_solves_the_ode(mixture, t, s):
    """From the bulk and from five standard deviations on both sides of every axis."""
    dimension = len(mixture.means)
    line = np.concatenate([np.linspace(-5, 5, 15), [0.3, 0.011]])[:, None]
    z_t = line * np.linspace(1, 0.4, dimension) if t < 10 else 0.3 * line * np.ones(dimension)
    z_t = np.asarray(z_t, np.float32).astype(np.float64)
    expected = solve_flow(mixture, z_t, t, s)
    slope = cdf_and_density(diffused(mixture, t), z_t)[2] / cdf_and_density(diffused(mixture, s), expected)[2]
    # As documented; a coordinate of x feels the largest slope of those of u.
    error = np.abs(flow(mixture, jnp.asarray(z_t, jnp.float32), t, s) - expected)
    assert np.all(error <= 1e-6 * (1 + np.max(slope, axis=1, keepdims=True)))


@hypothesis.given(st.integers(0, 2**31 - 1), st.floats(-15, 15), st.floats(-15, 15))
def test_flow_keeps_every_quantile(seed, t, s):
    """F_s(z_s) = F_t(z_t) and 1 - F_s(z_s) = 1 - F_t(z_t): the marginal of t becomes that of s."""
    mixture = MIXTURES["plane"]
    z_t = noisy_samples(mixture, np.full(16, t), seed=seed)
    z_s = flow(mixture, jnp.asarray(z_t, jnp.float32), t, s)
    before = cdf_and_density(diffused(mixture, t), z_t)
    after = cdf_and_density(diffused(mixture, s), np.asarray(z_s, np.float64))
    # Rounding z by 2e-7, times the density, at most 5 over stds from 0.1; relative, times the slope of the
    # logarithm, about four stds out. Log-SNRs are rounded to float32 as well.
    for a, b in zip(before[:2], after[:2], strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5)


@hypothesis.given(
    st.integers(0, 2**31 - 1), st.floats(-15, 15, width=32), st.floats(-15, 15), st.floats(-15, 15)
)
def test_flow_through_a_third_time_is_the_flow(seed, t, m, s):
    """t -> m -> s = t -> s; for s = t the way there and back."""
    mixture = MIXTURES["plane"]
    z_t = jnp.asarray(noisy_samples(mixture, np.full(16, t), seed=seed), jnp.float32)
    z_m = jnp.asarray(flow(mixture, z_t, t, m))
    # z_m's error of 2e-6, times a slope of at most about 10, the inverse of the least std.
    np.testing.assert_allclose(flow(mixture, z_m, m, s), flow(mixture, z_t, t, s), atol=2e-5)
    np.testing.assert_allclose(flow(mixture, z_m, m, t), z_t, atol=2e-5)


def test_flow_keeps_far_tails():
    """Twelve standard deviations out F is 1e-33, and 1 - F would be 1 in any float."""
    mixture, z_t = MIXTURES["two_components"], jnp.array([[-12.0], [-7.0], [7.0], [12.0]])
    z_s = flow(mixture, z_t, -10.0, 10.0)
    np.testing.assert_allclose(z_s, solve_flow(mixture, np.asarray(z_t, np.float64), -10.0, 10.0), rtol=1e-6)


def test_flow_of_a_gaussian_is_linear():
    """For N(0, C) it is z_s = (alpha_s^2 C + sigma_s^2)^(1/2) (alpha_t^2 C + sigma_t^2)^(-1/2) z_t."""
    mixture = mixtures.gaussian(np.zeros(3), COVARIANCE)
    z_t = jax.random.normal(jax.random.key(0), (5, 3))
    variances, axes = np.linalg.eigh(COVARIANCE)
    (a_t, s_t), (a_s, s_s) = reference.alpha_sigma(-2.0), reference.alpha_sigma(3.0)
    ratio = np.sqrt((a_s**2 * variances + s_s**2) / (a_t**2 * variances + s_t**2))
    expected = np.asarray(z_t, np.float64) @ (axes * ratio) @ axes.T
    np.testing.assert_allclose(flow(mixture, z_t, -2.0, 3.0), expected, atol=1e-6)


def test_flow_is_differentiable():
    """dz_s / dlambda_s is the ODE's right side -(alpha_s sigma_s / 2) v_hat; dz_s / dz_t is p_t / p_s."""
    mixture = mixtures.random_mixture(5, dimension=1, components=3)
    z_t, t, s = jnp.linspace(-2, 2, 5)[:, None], jnp.full(5, -3.0), jnp.full(5, 3.0)

    def total(z_t, s):
        z_s = mixtures.probability_flow(mixture, z_t, logsnr_t=t, logsnr_s=s)
        return jnp.sum(z_s), z_s

    (dz_dz, dz_ds), z_s = jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))(z_t, s)
    right_side = -process.alpha(s) * process.sigma(s) / 2 * v_hat(mixture, z_s, s)[:, 0]
    np.testing.assert_allclose(dz_ds, right_side, rtol=1e-4, atol=1e-6)
    before, after = (
        cdf_and_density(diffused(mixture, logsnr), np.asarray(z, np.float64))[2]
        for logsnr, z in ((-3.0, z_t), (3.0, z_s))
    )
    np.testing.assert_allclose(dz_dz, before / after, rtol=1e-4)


def test_ddim_converges_to_the_flow_with_order_one():
    """The error of N steps with the exact denoiser halves with the step."""
    mixture, schedule = MIXTURES["plane"], schedules.cosine()
    z_1 = jax.random.normal(jax.random.key(0), (8, 2))

    @jax.jit
    def ddim(grid):
        def step(z_t, logsnr):
            t, s = (jnp.full(len(z_t), a) for a in logsnr)
            x_hat = mixtures.denoise(mixture, z_t, logsnr_t=t)
            return steps.ddim(x_hat, z_t, logsnr_t=t, logsnr_s=s), None

        return jax.lax.scan(step, z_1, (grid[:-1], grid[1:]))[0]

    errors = []
    for num_steps in (128, 256, 512):
        grid = schedule(jnp.linspace(1.0, 0.2, num_steps + 1))
        errors.append(np.abs(ddim(grid) - flow(mixture, z_1, grid[0], grid[-1])).max())
    # The last error is 1e-3; float32 adds 1e-6.
    np.testing.assert_allclose(np.array(errors[:-1]) / errors[1:], 2, rtol=0.1)


@every_mixture
def test_moments_are_those_of_all_components(mixture):
    # Elsewhere, because those of several components have the mean 0.
    mixture = mixture._replace(means=mixture.means + 0.3)
    weights, means, covariances = map(np.stack, zip(*joint(mixture), strict=True))
    mean, covariance = mixtures.mean_and_covariance(mixture)
    second = np.einsum("k,kde->de", weights, covariances + means[:, :, None] * means[:, None, :])
    np.testing.assert_allclose(mean, weights @ means, atol=1e-15)
    np.testing.assert_allclose(covariance, second - np.outer(mean, mean), atol=1e-14)


def test_samples_have_the_moments_and_the_marginals():
    mixture = mixtures.random_mixture(7, dimension=4, components=3)
    x = np.asarray(mixtures.sample(mixture, jax.random.key(0), 20_000), np.float64)
    mean, covariance = mixtures.mean_and_covariance(mixture)
    # Standard errors are std / sqrt(20,000) = 0.0035 std, of variances at most twice that.
    std = np.sqrt(np.diag(covariance))
    np.testing.assert_allclose(x.mean(axis=0), mean, atol=0.015 * std.max())
    np.testing.assert_allclose(np.cov(x.T), covariance, atol=0.03 * std.max() ** 2)
    below, _, _ = cdf_and_density(mixture, x)
    # F(u_i) is uniform, and the u_i are independent: so are their squares.
    assert min(scipy.stats.kstest(column, "uniform").pvalue for column in below.T) > 1e-3
    for function in (np.square, np.abs):
        correlation = np.corrcoef(function(2 * below - 1).T) - np.eye(4)
        np.testing.assert_allclose(correlation, 0, atol=0.03)
    assert not np.array_equal(x, mixtures.sample(mixture, jax.random.key(1), 20_000))


def test_component_and_noise_of_a_sample_are_independent():
    """From one key, the first of the draws behind the component would be the noise as well."""
    keys = jax.random.split(jax.random.key(0), 2000)
    x = jax.vmap(lambda key: mixtures.sample(MIXTURES["two_components"], key, 1))(keys)
    mode = jnp.sign(x)
    # Standard error 0.022.
    np.testing.assert_allclose(jnp.mean(mode * (x - 0.6 * mode) / 0.1, axis=0), 0, atol=0.1)


def test_gaussian_has_its_moments():
    mean, covariance = mixtures.mean_and_covariance(MIXTURES["gaussian"])
    np.testing.assert_allclose(mean, [0.3, -0.2, 0.1], atol=1e-15)
    np.testing.assert_allclose(covariance, COVARIANCE, atol=1e-15)


@pytest.mark.parametrize("direction", [[0.6, 0.8], [0.0, 1.0], [0.28, 0.96], [-0.8, 0.6]])
def test_a_singular_gaussian_stays_on_its_line(direction):
    """Its zero eigenvalue comes out as zero, above, and below."""
    direction = np.array(direction)
    mixture = mixtures.gaussian(0.1 * direction, np.outer(direction, direction))
    z_t = jnp.array([[1.0, 0.5], [-0.3, 2.0]])
    x_hat = denoise(mixture, z_t, logsnr_t=jnp.array([0.0, 5.0]))
    np.testing.assert_allclose(x_hat @ np.array([direction[1], -direction[0]]), 0, atol=1e-6)
    assert np.all(np.isfinite(flow(mixture, z_t, -15.0, 15.0)))
    # All distance is along the line, and that of the points to N(0.1, 1).
    points = np.array([[-0.9], [0.0], [0.8]])
    line = mixtures.gaussian(np.array([0.1]), np.eye(1))
    np.testing.assert_allclose(
        mixtures.marginal_wasserstein(mixture, points * direction),
        mixtures.marginal_wasserstein(line, points),
        atol=1e-12,
    )


def test_components_of_weight_zero_are_absent():
    line = mixtures.gaussian(np.array([0.1]), np.array([[0.04]]))
    padded = line._replace(
        weights=np.array([[0.0, 1.0]]), means=np.array([[9.0, 0.1]]), stds=np.array([[0.01, 0.2]])
    )
    z_t, logsnr_t = jnp.array([[0.5], [0.1]]), jnp.array([0.0, 3.0])
    for function in (denoise, posterior_variance):
        expected = function(line, z_t, logsnr_t=logsnr_t)
        np.testing.assert_allclose(function(padded, z_t, logsnr_t=logsnr_t), expected, rtol=1e-6)
    np.testing.assert_allclose(flow(padded, z_t, 1.0, 4.0), flow(line, z_t, 1.0, 4.0), atol=1e-6)
    x = mixtures.sample(padded, jax.random.key(0), 100)
    assert np.all(np.abs(x) < 2)
    distance = mixtures.marginal_wasserstein(padded, x)
    np.testing.assert_allclose(distance, mixtures.marginal_wasserstein(line, x), atol=1e-10)


@pytest.mark.parametrize(
    ("covariance", "message"),
    [([[1.0, 0.5], [0.4, 1.0]], "not symmetric"), ([[1.0, 2.0], [2.0, 1.0]], "negative eigenvalue, -1$")],
)
def test_gaussian_refuses_what_is_no_covariance(covariance, message):
    with pytest.raises(ValueError, match=message):
        mixtures.gaussian(np.zeros(2), np.array(covariance))


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_gaussian_forgives_rounding(scale):
    """1e-6 of the largest entry, whatever that is."""
    for error in (0.8e-6, 1.2e-6):
        for covariance in (np.array([[1.0, 0.0], [error, 0.25]]), np.diag([1.0, -error])):
            if error > 1e-6:
                with pytest.raises(ValueError, match="covariance"):
                    mixtures.gaussian(np.zeros(2), scale * covariance)
            else:
                assert mixtures.gaussian(np.zeros(2), scale * covariance).stds.min() >= 0


def test_two_components_has_its_moments():
    mean, covariance = mixtures.mean_and_covariance(mixtures.two_components())
    np.testing.assert_allclose(mean, [0.0], atol=1e-15)
    np.testing.assert_allclose(covariance, [[0.6**2 + 0.1**2]], rtol=1e-14)


def test_random_mixture_by_hand():
    """A seed's draws; means and stds up to the one scale that gives a coordinate its variance."""
    mixture = mixtures.random_mixture(3, dimension=6, components=2)
    rng = np.random.default_rng(3)
    rng.normal(size=(6, 6))
    weights, means = rng.dirichlet([4.0, 4.0], size=6), rng.normal(size=(6, 2))
    stds = rng.uniform(0.2, 0.5, size=(6, 2))
    means = means - np.sum(weights * means, axis=1)[:, None]
    np.testing.assert_array_equal(mixture.weights, weights)
    scale = mixture.stds[:, :1] / stds[:, :1]
    np.testing.assert_allclose(mixture.stds, scale * stds, rtol=1e-14)
    np.testing.assert_allclose(mixture.means, scale * means, rtol=1e-12)
    explicit = mixtures.random_mixture(3, dimension=6, components=2, spectral_power=2.0, mean_square=0.25)
    np.testing.assert_array_equal(mixture.stds, explicit.stds)


@pytest.mark.parametrize(("dimension", "components", "power"), [(1, 2, 2.0), (6, 1, 2.0), (48, 3, 1.0)])
def test_random_mixture_has_the_spectrum_it_promises(dimension, components, power):
    mixture = mixtures.random_mixture(
        11, dimension=dimension, components=components, spectral_power=power, mean_square=0.16
    )
    np.testing.assert_allclose(mixture.basis.T @ mixture.basis, np.eye(dimension), atol=1e-14)
    np.testing.assert_allclose(mixture.weights.sum(axis=1), 1, rtol=1e-14)
    assert mixture.weights.shape == mixture.means.shape == mixture.stds.shape == (dimension, components)
    mean, covariance = mixtures.mean_and_covariance(mixture)
    np.testing.assert_allclose(mean, 0, atol=1e-14)
    np.testing.assert_allclose(np.trace(covariance) / dimension, 0.16, rtol=1e-12)
    # Var u_i falls as (i + 1)^(-power / 2).
    variances = np.linalg.eigvalsh(covariance)[::-1]
    np.testing.assert_allclose(
        variances / variances[0], np.arange(1, dimension + 1) ** (-power / 2), rtol=1e-10
    )


def test_random_mixture_follows_from_its_seed_and_fills_the_range():
    first, again, other = (
        mixtures.random_mixture(seed, dimension=16, components=2, mean_square=0.25) for seed in (0, 0, 1)
    )
    for a, b, c in zip(first, again, other, strict=True):
        np.testing.assert_array_equal(a, b)
        assert not np.array_equal(a, c)
    x = mixtures.sample(first, jax.random.key(0), 4000)
    # Near the 4.6% of a Gaussian of std 1/2.
    assert 0.02 < np.mean(np.abs(x) > 1) < 0.07


def test_random_bases_are_uniform():
    """Over the rotations and reflections every entry is as often negative as positive, the corner too."""
    corners = [mixtures.random_mixture(n, dimension=2, components=1).basis[0, 0] for n in range(400)]
    # Binomial, standard deviation 10.
    assert abs(np.sum(np.array(corners) > 0) - 200) < 50


@hypothesis.given(st.floats(-2, 2), st.floats(0, 3), st.integers(1, 40))
def test_distance_of_gaussian_cells_is_closed_form(shift, scale, count):
    """W2^2 of shift + scale c_i from N(m, s^2), c_i the means of N(0, 1) over its N equally likely cells.

    int c_i Q over cell i is c_i^2 / N for N(0, 1), so that it is
    (shift - m)^2 + s^2 - 2 s scale C + scale^2 C with C = mean c_i^2.
    """
    m, s = 0.4, 0.7
    edges = scipy.stats.norm.ppf(np.arange(count + 1) / count)
    cell = -np.diff(scipy.stats.norm.pdf(edges)) * count
    c = np.mean(cell**2)
    actual = mixtures.marginal_wasserstein(
        mixtures.gaussian(np.array([m]), np.array([[s**2]])), (shift + scale * cell)[:, None]
    )
    np.testing.assert_allclose(actual, (shift - m) ** 2 + s**2 - 2 * s * scale * c + scale**2 * c, atol=1e-12)


def test_distance_sums_quadratures_over_the_basis():
    """sum_i int (x_i - u)^2 dF(u) over the cell of u between the quantiles (i - 1) / N and i / N."""
    mixture, count = MIXTURES["plane"], 9
    points = np.random.default_rng(0).normal(size=(count, 2))
    expected = 0.0
    for direction, weights, means, stds in zip(mixture.basis.T, *mixture[1:], strict=True):

        def cdf(u, weights=weights, means=means, stds=stds):
            return weights @ scipy.special.ndtr((u - means) / stds)

        def cost(u, x, weights=weights, means=means, stds=stds):
            return (x - u) ** 2 * (weights @ scipy.stats.norm.pdf(u, means, stds))

        edges = [scipy.optimize.brentq(lambda u, p=n / count: cdf(u) - p, -4, 4) for n in range(1, count)]
        for x, *cell in zip(np.sort(points @ direction), [-4, *edges], [*edges, 4], strict=True):
            expected += scipy.integrate.quad(cost, *cell, args=(x,), epsabs=1e-14)[0]
    # Beyond 4 there is less than 1e-30; the edges' own errors, 1e-12 in brentq, count squared.
    np.testing.assert_allclose(mixtures.marginal_wasserstein(mixture, points), expected, rtol=1e-12)


def test_distance_of_exact_samples_is_the_documented_floor():
    """3 to 4 E ||x - E x||^2 / N for a Gaussian; for two modes the fluctuation of their shares, 0.007."""
    draws = np.random.default_rng(0).normal(size=(30, 1000, 3))
    gaussian = MIXTURES["gaussian"]
    root = gaussian.stds[:, 0] * gaussian.basis
    floor = np.mean([mixtures.marginal_wasserstein(gaussian, x @ root.T + [0.3, -0.2, 0.1]) for x in draws])
    # The mean of 30 is within 10%.
    assert 2.5 < floor * 1000 / np.trace(COVARIANCE) < 4.5
    two = MIXTURES["two_components"]
    floor = np.mean(
        [mixtures.marginal_wasserstein(two, mixtures.sample(two, jax.random.key(n), 1000)) for n in range(30)]
    )
    # The spread of one is as large as their mean.
    assert 0.003 < floor < 0.012
