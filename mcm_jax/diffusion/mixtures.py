"""Distributions with a closed-form diffusion process: data with an exact teacher.

x = basis @ u, where the basis is orthonormal and the u_i are independent one-dimensional Gaussian mixtures.
The noise sigma_t eps has the same distribution in every orthonormal basis. Therefore the coordinates of z_t,
and those of x given z_t, are also independent mixtures. Denoiser, posterior variance, probability flow,
moments and distance to a sample are exact, coordinate by coordinate, although the entries of x are correlated
and x has up to K^d modes. K = 1 gives any Gaussian.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
from jaxtyping import Array, Float, Float64, Int

from mcm_jax.diffusion import process
from mcm_jax.diffusion.conditions import Cond
from mcm_jax.diffusion.network import ModelFn
from mcm_jax.diffusion.process import Image, PerExample

Points = Float[Array, "B d"]
Components = Float[Array, "B d K"]
Parameter = Float[Array | np.ndarray, "d K"]

# Number of bisections. 40 reduce a bracket of width 1e5 to 1e-7, the spacing of float32 near 1; 30 reduce a
# width of 10 to 1e-8, which enters `_wasserstein` squared.
FLOW_HALVINGS = 40
QUANTILE_HALVINGS = 30


class Mixture(NamedTuple):
    """x = basis @ u, u_i ~ sum_k weights[i, k] N(means[i, k], stds[i, k]^2), all u_i independent.

    A mixture is a pytree. The constructors return float64 NumPy arrays, which the moments use; z_t and x are
    float32, as everywhere.
    """

    basis: Float[Array | np.ndarray, "d d"]  # its columns are orthonormal
    weights: Parameter  # at least 0; each row sums to 1
    means: Parameter
    stds: Parameter  # at least 0


def gaussian(mean: Float[np.ndarray, " d"], covariance: Float[np.ndarray, "d d"]) -> Mixture:
    """N(mean, covariance) as a mixture with K = 1; the covariance may be singular.

    Raises:
      ValueError: the covariance is not symmetric, or has an eigenvalue that is negative beyond rounding.

    Examples:
      >>> mixture = gaussian(np.zeros(2), np.array([[2.0, 1.0], [1.0, 2.0]]))
      >>> mean_and_covariance(mixture)[1].round(6).tolist()
      [[2.0, 1.0], [1.0, 2.0]]
    """
    covariance = np.asarray(covariance, np.float64)
    scale = np.max(np.abs(covariance))
    if not np.allclose(covariance, covariance.T, rtol=0, atol=1e-6 * scale):
        raise ValueError("the covariance is not symmetric")
    variances, basis = np.linalg.eigh(covariance)
    if variances[0] < -1e-6 * scale:
        raise ValueError(f"the covariance has a negative eigenvalue, {variances[0]:g}")
    # Rounding gives eigenvalues of zero either sign.
    stds = np.sqrt(np.maximum(variances, 0.0))
    return Mixture(basis, np.ones((len(mean), 1)), (mean @ basis)[:, None], stds[:, None])


def two_components() -> Mixture:
    """N(-0.6, 0.1^2) / 2 + N(0.6, 0.1^2) / 2: two separate modes in one dimension, as in MCM's first figure.

    The paper does not state its parameters; we chose these so that x lies in [-1, 1].
    """
    one, half = np.ones((1, 1)), np.full((1, 2), 0.5)
    return Mixture(one, half, np.array([[-0.6, 0.6]]), np.full((1, 2), 0.1))


def random_mixture(
    seed: int, *, dimension: int, components: int, spectral_power: float = 2.0, mean_square: float = 0.25
) -> Mixture:
    """A mixture with moments like those of images: E u = 0, Var u_i ~ (i + 1)^(-spectral_power / 2).

    The power of natural images falls as 1 / f^2, and the i-th frequency of a plane is f ~ sqrt(i). The
    components and the basis are random; the basis is uniform over all rotations.

    Args:
      seed: determines all randomness.
      dimension: d.
      components: K in every coordinate.
      spectral_power: the exponent of 1 / f in the spectrum; 0 gives equal variances.
      mean_square: E ||x||^2 / d; with 0.25, about 5% of the entries of x lie outside [-1, 1].

    Examples:
      >>> mixture = random_mixture(0, dimension=16, components=3)
      >>> mixture.means.shape
      (16, 3)
    """
    rng = np.random.default_rng(seed)
    # Q is uniform only after multiplication by the signs of R's diagonal, which the factorisation chooses.
    q, r = np.linalg.qr(rng.normal(size=(dimension, dimension)))
    weights = rng.dirichlet(np.full(components, 4.0), size=dimension)
    means = rng.normal(size=(dimension, components))
    stds = rng.uniform(0.2, 0.5, size=(dimension, components))
    means -= np.sum(weights * means, axis=1, keepdims=True)
    variances = np.arange(1.0, dimension + 1) ** (-spectral_power / 2)
    variances *= mean_square / np.mean(variances)
    scale = np.sqrt(variances / np.sum(weights * (means**2 + stds**2), axis=1))[:, None]
    return Mixture(q * np.sign(np.diag(r)), weights, scale * means, scale * stds)


def sample(mixture: Mixture, key: jax.Array, count: int) -> Points:
    """Draws `count` independent samples x = basis @ u.

    Examples:
      >>> sample(two_components(), jax.random.key(0), 5).shape
      (5, 1)
    """
    key_component, key_eps = jax.random.split(key)
    shape = (count, len(mixture.means))
    component = jax.random.categorical(key_component, jnp.log(mixture.weights), shape=shape)[..., None]
    mean, std = (
        jnp.take_along_axis(jnp.asarray(parameter)[None], component, axis=-1)[..., 0]
        for parameter in (mixture.means, mixture.stds)
    )
    return _points(mixture, mean + std * jax.random.normal(key_eps, shape))


def log_density(mixture: Mixture, z_t: Points, *, logsnr_t: PerExample) -> PerExample:
    """log p(z_t) = sum_i log sum_k w_k N(u_i; alpha_t m_k, alpha_t^2 s_k^2 + sigma_t^2), u = basis^T z_t."""
    means_t, stds_t = _diffused(mixture, logsnr_t)
    y = (_coordinates(mixture, z_t)[..., None] - means_t) / stds_t
    log_normal = -jnp.square(y) / 2 - jnp.log(stds_t) - math.log(2 * math.pi) / 2
    return jnp.sum(jax.nn.logsumexp(log_normal, axis=-1, b=mixture.weights), axis=-1)


def denoise(mixture: Mixture, z_t: Points, *, logsnr_t: PerExample) -> Points:
    """x_hat = E[x | z_t], within 2e-6 in float32 for log-SNRs in [-16, 16] and stds of at least 0.03.

    Examples:
      >>> z_t, logsnr_t = jnp.array([[-0.5], [0.0], [0.5]]), jnp.full(3, 2.0)
      >>> [round(value, 3) for value in denoise(two_components(), z_t, logsnr_t=logsnr_t)[:, 0].tolist()]
      [-0.582, 0.0, 0.582]
    """
    posterior = _posterior(mixture, z_t, logsnr_t)
    return _points(mixture, posterior.mean(posterior.x))


def posterior_variance(mixture: Mixture, z_t: Points, *, logsnr_t: PerExample) -> PerExample:
    """E[||x - x_hat||^2 | z_t] / d: the exact value of the x_var that aDDIM estimates."""
    posterior = _posterior(mixture, z_t, logsnr_t)
    deviation = posterior.x - posterior.mean(posterior.x)[..., None]
    return jnp.mean(posterior.mean(jnp.square(deviation) + posterior.x_var), axis=-1)


def model_fn(mixture: Mixture) -> ModelFn:
    """Returns v_hat = alpha_t eps_hat - sigma_t x_hat = E[v | z_t], the prediction of a perfect network.

    Its float32 error is at most 3e-6 under the conditions of `denoise`; (alpha_t z_t - x_hat) / sigma_t would
    be off by 3e-3 at log-SNR 16. The function takes [B, ...] with d entries per example and ignores the
    classes and the dropout key.

    Examples:
      >>> teacher = model_fn(two_components())
      >>> teacher(jnp.ones((3, 1)), jnp.zeros(3), None, None).shape
      (3, 1)
    """

    def v_hat(z_t: Image, logsnr_t: PerExample, cond: Cond, key: jax.Array | None) -> Image:
        del cond, key
        posterior = _posterior(mixture, z_t.reshape(len(z_t), -1), logsnr_t)
        return _points(mixture, posterior.mean(posterior.v)).reshape(z_t.shape)

    return v_hat


def probability_flow(mixture: Mixture, z_t: Points, *, logsnr_t: PerExample, logsnr_s: PerExample) -> Points:
    """z_s = F_s^-1(F_t(z_t)) in every coordinate: the probability flow ODE, solved from t to any s.

    In one dimension, the flow preserves the order of points and turns their distribution function F_t into
    F_s; only one map does both. It is computed from log F / (1 - F), which is accurate in both tails, and is
    differentiable.

    Compared with DOP853 in float64 (rtol 1e-10; log-SNRs from -15 to 15 and back), the error is at most
    1e-6 (1 + dz_s / dz_t). The second term is the rounding of z_t itself: the slope is p_t / p_s, which is
    6e6 halfway between the modes of `two_components` (a fraction of 1e-8 of all z_t ends up there).
    """
    means_t, stds_t = _diffused(mixture, logsnr_t)
    means_s, stds_s = _diffused(mixture, logsnr_s)
    scores_t = (_coordinates(mixture, z_t)[..., None] - means_t) / stds_t
    log_odds = _log_odds(mixture.weights, scores_t)
    # At the lowest of these points, no component's score exceeds its score at t, so F_s is at most F_t there;
    # the reverse is true at the highest. With K = 1 the bracket is one point, the linear map.
    ends = means_s + stds_s * scores_t
    low, high = jnp.min(ends, axis=-1), jnp.max(ends, axis=-1)

    def excess(u_s: Points) -> Points:
        return _log_odds(mixture.weights, (u_s[..., None] - means_s) / stds_s) - log_odds

    def bisect(function: Callable[[Points], Points], _: Points) -> Points:
        def halve(_: Int[Array, ""], bracket: tuple[Points, Points]) -> tuple[Points, Points]:
            below, above = bracket
            middle = (below + above) / 2
            too_low = function(middle) < 0
            return jnp.where(too_low, middle, below), jnp.where(too_low, above, middle)

        below, above = jax.lax.fori_loop(0, FLOW_HALVINGS, halve, (low, high))
        return (below + above) / 2

    # Bisection has no useful derivative; custom_root uses the implicit function theorem instead.
    u_s = jax.lax.custom_root(excess, low, bisect, lambda slope, y: y / slope(jnp.ones_like(y)))
    return _points(mixture, u_s)


def mean_and_covariance(mixture: Mixture) -> tuple[Float64[np.ndarray, " d"], Float64[np.ndarray, "d d"]]:
    """E[x] and Cov[x]."""
    basis, weights, means, stds = (np.asarray(a, np.float64) for a in mixture)
    mean = np.sum(weights * means, axis=1)
    variance = np.sum(weights * (np.square(means - mean[:, None]) + np.square(stds)), axis=1)
    return basis @ mean, (basis * variance) @ basis.T


def marginal_wasserstein(mixture: Mixture, samples: Float[Array | np.ndarray, "N d"]) -> float:
    """sum_i W2^2(basis_i . samples, u_i): the sum of exact one-dimensional squared 2-Wasserstein distances.

    This equals W2^2 between samples and mixture if the coordinates of the samples in this basis are also
    independent; otherwise it is a lower bound.

    N draws from the mixture itself do not have distance 0. Their average distance is 3 to 4 times
    E ||x - E x||^2 / N (measured, N = 100 to 50,000). It is larger if a gap g separates modes of weights w
    and 1 - w, since the fractions of samples in the modes fluctuate: about g^2 sqrt(2 w (1 - w) / (pi N)),
    with g measured between the inner edges of the modes. For `two_components` it is 0.007 for N = 1000 and
    0.002 for N = 10,000.

    Examples:
      >>> mixture = two_components()
      >>> marginal_wasserstein(mixture, sample(mixture, jax.random.key(0), 1000)) < 0.05
      True
    """
    basis, *parameters = (np.asarray(a, np.float64) for a in mixture)
    coordinates = np.sort(np.asarray(samples, np.float64) @ basis, axis=0)
    return float(sum(_wasserstein(*row) for row in zip(coordinates.T, *parameters, strict=True)))


def _wasserstein(
    ordered: Float64[np.ndarray, " N"],
    weights: Float64[np.ndarray, " K"],
    means: Float64[np.ndarray, " K"],
    stds: Float64[np.ndarray, " K"],
) -> float:
    """sum_i int (x_i - Q(p))^2 dp over the cells (i - 1) / N < p < i / N; Q inverts F = sum_k w_k Phi(y_k).

    Expanding the square leaves E u^2 and G(p) = int_0^p Q = sum_k w_k (m_k Phi(y_k) - s_k phi(y_k)), where
    y_k = (q - m_k) / s_k and q = Q(p). Adding q (p - F), which is 0 at the solution, makes an error of q
    enter only as its square.
    """
    p = np.arange(1, len(ordered)) / len(ordered)
    # A std of 0 would lead to 0 / 0.
    stds = np.maximum(stds, 1e-30)
    # The quantile of the mixture lies between the quantiles of its components.
    quantiles = means + stds * scipy.special.ndtri(p)[:, None]
    low, high = np.min(quantiles, axis=1), np.max(quantiles, axis=1)
    for _ in range(QUANTILE_HALVINGS):
        q = (low + high) / 2
        too_low = scipy.special.ndtr((q[:, None] - means) / stds) @ weights < p
        low, high = np.where(too_low, q, low), np.where(too_low, high, q)
    q = (low + high) / 2
    y = (q[:, None] - means) / stds
    cdf, pdf = scipy.special.ndtr(y), np.exp(-np.square(y) / 2) / np.sqrt(2 * np.pi)
    partial_means = (means * cdf - stds * pdf) @ weights + q * (p - cdf @ weights)
    cells = np.diff(partial_means, prepend=0.0, append=means @ weights)
    return np.mean(np.square(ordered)) - 2 * ordered @ cells + (np.square(means) + np.square(stds)) @ weights


class _Posterior(NamedTuple):
    """The probability of each component given z_t, and the moments of u and v given z_t and the component."""

    probability: Components
    x: Components
    x_var: Components
    v: Components

    def mean(self, given_component: Components) -> Points:
        return jnp.sum(self.probability * given_component, axis=-1)


def _posterior(mixture: Mixture, z_t: Points, logsnr_t: PerExample) -> _Posterior:
    """Bayes' rule with V = alpha_t^2 s^2 + sigma_t^2 and y = (z_t - alpha_t m) / sqrt(V), for each component.

    probability ~ w exp(-y^2 / 2) / sqrt(V), x = m + alpha_t s^2 y / sqrt(V), x_var = s^2 sigma_t^2 / V. With
    eps = sigma_t y / sqrt(V), v = alpha_t eps - sigma_t x is simplified by hand to avoid cancellation.
    """
    alpha, sigma = (f(logsnr_t)[:, None, None] for f in (process.alpha, process.sigma))
    means_t, stds_t = _diffused(mixture, logsnr_t)
    y = (_coordinates(mixture, z_t)[..., None] - means_t) / stds_t
    logits = jnp.log(mixture.weights) - jnp.log(stds_t) - jnp.square(y) / 2
    variances = jnp.square(mixture.stds)
    return _Posterior(
        probability=jax.nn.softmax(logits, axis=-1),
        x=jnp.asarray(mixture.means) + alpha * variances * y / stds_t,
        x_var=jnp.square(mixture.stds * sigma / stds_t),
        v=sigma * (alpha * (1 - variances) * y / stds_t - mixture.means),
    )


def _diffused(mixture: Mixture, logsnr: PerExample) -> tuple[Components, Components]:
    """Means alpha m and stds sqrt(alpha^2 s^2 + sigma^2) of the components of alpha u + sigma eps."""
    alpha, sigma = (f(logsnr)[:, None, None] for f in (process.alpha, process.sigma))
    return alpha * mixture.means, jnp.sqrt(jnp.square(alpha * mixture.stds) + jnp.square(sigma))


def _log_odds(weights: Parameter, scores: Components) -> Points:
    """log F / (1 - F) with F = sum_k w_k Phi(score_k); F and 1 - F are each summed from their own tails."""
    log_f, log_1_minus_f = (
        jax.nn.logsumexp(jax.scipy.special.log_ndtr(a), axis=-1, b=weights) for a in (scores, -scores)
    )
    return log_f - log_1_minus_f


def _coordinates(mixture: Mixture, points: Points) -> Points:
    """u = basis^T x, in full float32: by default, accelerators multiply matrices in lower precision."""
    return jnp.matmul(points, mixture.basis, precision=jax.lax.Precision.HIGHEST)


def _points(mixture: Mixture, coordinates: Points) -> Points:
    """x = basis @ u, also in full float32."""
    return jnp.matmul(coordinates, mixture.basis.T, precision=jax.lax.Precision.HIGHEST)
