"""One step from z_t to z_s, s < t (SPEC 3; MCM sections 2, 3).

With y = z / sigma and rho = alpha / sigma a DDIM step is the straight line y_s = y_t + (rho_s - rho_t) x.
Other steps are the DDIM step of some other x: `addim_x` is aDDIM's, `composed_x` that of two steps in a row.
Noise comes in as an argument: the steps are functions.

Against float64 with the same log-SNRs, for all pairs (t, s) of a grid of 64 and neighbours of one of 1280,
both ends of time included, float32's largest error of z_s is 1e-6; that of aDDIM 1e-5, on the step to t = 0,
where eps_hat is a difference over sigma = 0.001. The errors of Heun and invDDIM are so small before they are
multiplied by what these do to their inputs (tests/diffusion/test_accuracy.py).
"""

import jax.numpy as jnp

from mcm_jax.diffusion.process import (
    Image,
    PerExample,
    alpha,
    eps_from_x,
    mean_square,
    over_pixels,
    sigma,
)


def _x_gain(*, logsnr_t: PerExample, logsnr_s: PerExample) -> PerExample:
    """alpha_s - alpha_t sigma_s / sigma_t = -alpha_s expm1((lambda_t - lambda_s) / 2), stable for s -> t."""
    return -alpha(logsnr_s) * jnp.expm1((logsnr_t - logsnr_s) / 2)


def ddim(x_hat: Image, z_t: Image, *, logsnr_t: PerExample, logsnr_s: PerExample) -> Image:
    """DDIM_{t->s}: z_s = alpha_s x_hat + (sigma_s / sigma_t) (z_t - alpha_t x_hat)."""
    gain = over_pixels(_x_gain(logsnr_t=logsnr_t, logsnr_s=logsnr_s), z_t)
    return gain * x_hat + over_pixels(sigma(logsnr_s) / sigma(logsnr_t), z_t) * z_t


def inv_ddim(z_s: Image, z_t: Image, *, logsnr_t: PerExample, logsnr_s: PerExample) -> Image:
    """invDDIM_{t->s}: the x for which DDIM_{t->s}(x, z_t) = z_s.

    Division by zero at s = t, where every x is an answer.
    """
    gain = over_pixels(_x_gain(logsnr_t=logsnr_t, logsnr_s=logsnr_s), z_t)
    return (z_s - over_pixels(sigma(logsnr_s) / sigma(logsnr_t), z_t) * z_t) / gain


def addim(
    x_hat: Image, z_t: Image, *, logsnr_t: PerExample, logsnr_s: PerExample, x_var: PerExample
) -> Image:
    """aDDIM_{t->s} (MCM section 3.2): DDIM with the norm restored that a too smooth x_hat lacks.

    z_s = alpha_s x_hat + sqrt(sigma_s^2 + (d / ||eps_hat||^2) z_s_var) eps_hat with
    z_s_var = (alpha_s - alpha_t sigma_s / sigma_t)^2 x_var.

    Args:
      x_hat: prediction of x, a posterior mean.
      z_t: where it was predicted.
      x_var: variance per pixel of x given z_t, >= 0; 0 gives DDIM.
    """
    x_step = addim_x(x_hat, z_t, logsnr_t=logsnr_t, logsnr_s=logsnr_s, x_var=x_var)
    return ddim(x_step, z_t, logsnr_t=logsnr_t, logsnr_s=logsnr_s)


def addim_x(
    x_hat: Image, z_t: Image, *, logsnr_t: PerExample, logsnr_s: PerExample, x_var: PerExample
) -> Image:
    """The x whose DDIM step from t to s is the aDDIM step of x_hat (SPEC 4).

    x_hat + k v eps_hat / (c + sigma_s), with k = alpha_s - alpha_t sigma_s / sigma_t,
    v = (d / ||eps_hat||^2) x_var and c = sqrt(sigma_s^2 + k^2 v). Finite also at s = t.
    """
    eps_hat = eps_from_x(x_hat, z_t, logsnr_t=logsnr_t)
    k = _x_gain(logsnr_t=logsnr_t, logsnr_s=logsnr_s)
    v = x_var / mean_square(eps_hat)
    sigma_s = sigma(logsnr_s)
    c = jnp.sqrt(jnp.square(sigma_s) + jnp.square(k) * v)
    return x_hat + over_pixels(k * v / (c + sigma_s), z_t) * eps_hat


def noisy_ddim(
    x_hat: Image,
    z_t: Image,
    noise: Image,
    *,
    logsnr_t: PerExample,
    logsnr_s: PerExample,
    x_var: PerExample,
) -> Image:
    """DDIM_{t->s} of x_hat + sqrt(x_var) n, n ~ N(0, I): aDDIM's variance put back as noise (SPEC 3)."""
    x_noisy = x_hat + over_pixels(jnp.sqrt(x_var), z_t) * noise
    return ddim(x_noisy, z_t, logsnr_t=logsnr_t, logsnr_s=logsnr_s)


def ddpm(x_hat: Image, z_t: Image, noise: Image, *, logsnr_t: PerExample, logsnr_s: PerExample) -> Image:
    """A draw from q(z_s | z_t, x = x_hat): ancestral sampling (SPEC 3).

    With r = exp(lambda_t - lambda_s): mean (alpha_t sigma_s^2 / (alpha_s sigma_t^2)) z_t + (1 - r) alpha_s
    x_hat, variance (1 - r) sigma_s^2; `noise` is standard normal.
    """
    alpha_s, sigma_s = alpha(logsnr_s), sigma(logsnr_s)
    one_minus_r = -jnp.expm1(logsnr_t - logsnr_s)
    gain = alpha(logsnr_t) * jnp.square(sigma_s / sigma(logsnr_t)) / alpha_s
    mean = over_pixels(gain, z_t) * z_t + over_pixels(one_minus_r * alpha_s, z_t) * x_hat
    return mean + over_pixels(jnp.sqrt(one_minus_r) * sigma_s, z_t) * noise


def heun(
    z_s: Image, eps_hat_t: Image, eps_hat_s: Image, *, logsnr_t: PerExample, logsnr_s: PerExample
) -> Image:
    """Heun's correction of the DDIM step that led to z_s, by the slope found there (SPEC 3).

    ybar_s = ybar_t + (sbar_s - sbar_t) (eps_hat_t + eps_hat_s) / 2, ybar = z / alpha, sbar = sigma / alpha.
    Written as what that adds to the DDIM step, -sigma_s expm1((lambda_s - lambda_t) / 2) (eps_hat_s -
    eps_hat_t) / 2, because ybar is huge near t = 1 and would lose z's digits.

    Args:
      z_s: DDIM_{t->s} of the prediction at t.
      eps_hat_t, eps_hat_s: predictions of eps at z_t and at that z_s.
    """
    gain = -sigma(logsnr_s) * jnp.expm1((logsnr_s - logsnr_t) / 2)
    return z_s + over_pixels(gain, z_s) * (eps_hat_s - eps_hat_t) / 2


def composed_x(
    x_first: Image,
    x_second: Image,
    *,
    logsnr_t: PerExample,
    logsnr_m: PerExample,
    logsnr_s: PerExample,
) -> Image:
    """The x whose DDIM step t -> s is that of x_first t -> m, then that of x_second m -> s; s < m <= t.

    (1 - w) x_first + w x_second, w = (rho_s - rho_m) / (rho_s - rho_t): the mean weighted by lengths in rho.
    """
    w = jnp.expm1((logsnr_m - logsnr_s) / 2) / jnp.expm1((logsnr_t - logsnr_s) / 2)
    w = over_pixels(w, x_first)
    return (1 - w) * x_first + w * x_second


def analytic_x_var(logsnr_t: PerExample) -> PerExample:
    """0.1 / (2 + alpha_t^2 / sigma_t^2): aDDIM's variance when nothing was measured (SPEC 3c)."""
    return 0.1 / (2 + jnp.exp(logsnr_t))
