"""Single steps from z_t to z_s, s < t (SPEC 3; MCM sections 2, 3).

With y = z / sigma and rho = alpha / sigma, a DDIM step is the straight line y_s = y_t + (rho_s - rho_t) x.
Every other deterministic step equals a DDIM step with a different x: `addim_x` returns the x of an aDDIM
step, and `composed_x` the x of two consecutive steps. Noise is an argument, so all steps are pure functions.

Accuracy: compared with float64 at the same log-SNRs, the largest float32 error of z_s is 1e-6. For aDDIM it
is 1e-5, in the step to t = 0, where eps_hat is a difference divided by sigma = 0.001. This was checked for
all pairs (t, s) of a grid of 64 and all neighbours in a grid of 1280, including t = 0 and t = 1. For Heun and
invDDIM, the bound excludes their own amplification of input errors (tests/diffusion/test_accuracy.py).
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
    """DDIM_{t->s}: z_s = alpha_s x_hat + (sigma_s / sigma_t) (z_t - alpha_t x_hat).

    Examples:
      >>> import jax.numpy as jnp
      >>> z_t, x_hat = jnp.ones((2, 8, 8, 3)), jnp.zeros((2, 8, 8, 3))
      >>> logsnr_t, logsnr_s = jnp.full(2, -2.0), jnp.full(2, 2.0)
      >>> z_s = ddim(x_hat, z_t, logsnr_t=logsnr_t, logsnr_s=logsnr_s)
      >>> z_s.shape, round(float(z_s[0, 0, 0, 0]), 4)  # sigma_s / sigma_t = exp(-1)
      ((2, 8, 8, 3), 0.3679)
    """
    gain = over_pixels(_x_gain(logsnr_t=logsnr_t, logsnr_s=logsnr_s), z_t)
    return gain * x_hat + over_pixels(sigma(logsnr_s) / sigma(logsnr_t), z_t) * z_t


def inv_ddim(z_s: Image, z_t: Image, *, logsnr_t: PerExample, logsnr_s: PerExample) -> Image:
    """invDDIM_{t->s}: the x for which DDIM_{t->s}(x, z_t) = z_s.

    At s = t every x is a solution, and the computation divides by zero.

    Examples:
      >>> import jax.numpy as jnp
      >>> z_t, x_hat = jnp.ones((2, 8, 8, 3)), jnp.zeros((2, 8, 8, 3))
      >>> logsnr_t, logsnr_s = jnp.full(2, -2.0), jnp.full(2, 2.0)
      >>> times = {"logsnr_t": logsnr_t, "logsnr_s": logsnr_s}
      >>> x = inv_ddim(ddim(x_hat, z_t, **times), z_t, **times)
      >>> bool(jnp.allclose(x, x_hat, atol=1e-6))
      True
    """
    gain = over_pixels(_x_gain(logsnr_t=logsnr_t, logsnr_s=logsnr_s), z_t)
    return (z_s - over_pixels(sigma(logsnr_s) / sigma(logsnr_t), z_t) * z_t) / gain


def addim(
    x_hat: Image, z_t: Image, *, logsnr_t: PerExample, logsnr_s: PerExample, x_var: PerExample
) -> Image:
    """aDDIM_{t->s} (MCM section 3.2): DDIM with a correction for the norm that a too smooth x_hat loses.

    z_s = alpha_s x_hat + sqrt(sigma_s^2 + (d / ||eps_hat||^2) z_s_var) eps_hat with
    z_s_var = (alpha_s - alpha_t sigma_s / sigma_t)^2 x_var.

    Args:
      x_hat: prediction of x, a posterior mean.
      z_t: the noisy image from which x_hat was predicted.
      x_var: variance per pixel of x given z_t, at least 0; 0 gives DDIM.

    Examples:
      >>> import jax.numpy as jnp
      >>> z_t, x_hat = jnp.ones((2, 8, 8, 3)), jnp.zeros((2, 8, 8, 3))
      >>> logsnr_t, logsnr_s = jnp.full(2, -2.0), jnp.full(2, 2.0)
      >>> times = {"logsnr_t": logsnr_t, "logsnr_s": logsnr_s}
      >>> z_addim = addim(x_hat, z_t, x_var=analytic_x_var(logsnr_t), **times)
      >>> z_ddim = ddim(x_hat, z_t, **times)
      >>> bool(jnp.linalg.norm(z_addim) > jnp.linalg.norm(z_ddim))
      True
    """
    x_step = addim_x(x_hat, z_t, logsnr_t=logsnr_t, logsnr_s=logsnr_s, x_var=x_var)
    return ddim(x_step, z_t, logsnr_t=logsnr_t, logsnr_s=logsnr_s)


def addim_x(
    x_hat: Image, z_t: Image, *, logsnr_t: PerExample, logsnr_s: PerExample, x_var: PerExample
) -> Image:
    """The x whose DDIM step from t to s equals the aDDIM step of x_hat (SPEC 4).

    x = x_hat + k v eps_hat / (c + sigma_s), with k = alpha_s - alpha_t sigma_s / sigma_t,
    v = (d / ||eps_hat||^2) x_var and c = sqrt(sigma_s^2 + k^2 v). This x is finite at s = t too.
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
    """DDIM_{t->s} of x_hat + sqrt(x_var) n, n ~ N(0, I): restores aDDIM's variance as noise (SPEC 3)."""
    x_noisy = x_hat + over_pixels(jnp.sqrt(x_var), z_t) * noise
    return ddim(x_noisy, z_t, logsnr_t=logsnr_t, logsnr_s=logsnr_s)


def ddpm(x_hat: Image, z_t: Image, noise: Image, *, logsnr_t: PerExample, logsnr_s: PerExample) -> Image:
    """Ancestral sampling: a draw from q(z_s | z_t, x = x_hat) (SPEC 3).

    With r = exp(lambda_t - lambda_s), the mean is (alpha_t sigma_s^2 / (alpha_s sigma_t^2)) z_t + (1 - r)
    alpha_s x_hat and the variance (1 - r) sigma_s^2. `noise` is standard normal.
    """
    alpha_s, sigma_s = alpha(logsnr_s), sigma(logsnr_s)
    one_minus_r = -jnp.expm1(logsnr_t - logsnr_s)
    gain = alpha(logsnr_t) * jnp.square(sigma_s / sigma(logsnr_t)) / alpha_s
    mean = over_pixels(gain, z_t) * z_t + over_pixels(one_minus_r * alpha_s, z_t) * x_hat
    return mean + over_pixels(jnp.sqrt(one_minus_r) * sigma_s, z_t) * noise


def heun(
    z_s: Image, eps_hat_t: Image, eps_hat_s: Image, *, logsnr_t: PerExample, logsnr_s: PerExample
) -> Image:
    """Heun's correction of the DDIM step that led to z_s, using the slope at z_s (SPEC 3).

    ybar_s = ybar_t + (sbar_s - sbar_t) (eps_hat_t + eps_hat_s) / 2, ybar = z / alpha, sbar = sigma / alpha.
    Computed as z_s plus the difference from the DDIM step, -sigma_s expm1((lambda_s - lambda_t) / 2)
    (eps_hat_s - eps_hat_t) / 2, because ybar is huge near t = 1 and z would lose digits.

    Args:
      z_s: DDIM_{t->s} of the prediction at t.
      eps_hat_t, eps_hat_s: predictions of eps at z_t and at z_s.
    """
    gain = -sigma(logsnr_s) * jnp.expm1((logsnr_s - logsnr_t) / 2)
    return z_s + over_pixels(gain, z_s) * (eps_hat_s - eps_hat_t) / 2


def heun_x(x_hat_t: Image, x_hat_s: Image, *, logsnr_t: PerExample, logsnr_s: PerExample) -> Image:
    """The x whose DDIM step from t to s equals Heun's step: x_hat_t + (r / 2) (x_hat_s - x_hat_t).

    r = exp((lambda_s - lambda_t) / 2) is the ratio of sigma / alpha at t and at s. This follows from `heun`,
    as eps_hat_s - eps_hat_t = (alpha_s / sigma_s) (x_hat_t - x_hat_s) where z_s is the DDIM step of x_hat_t.

    Args:
      x_hat_t: prediction at z_t.
      x_hat_s: prediction at z_s, the DDIM step of x_hat_t.
    """
    half_r = over_pixels(jnp.exp((logsnr_s - logsnr_t) / 2) / 2, x_hat_t)
    return x_hat_t + half_r * (x_hat_s - x_hat_t)


def composed_x(
    x_first: Image,
    x_second: Image,
    *,
    logsnr_t: PerExample,
    logsnr_m: PerExample,
    logsnr_s: PerExample,
) -> Image:
    """The x whose DDIM step t -> s equals DDIM with x_first from t to m, then with x_second from m to s.

    x = (1 - w) x_first + w x_second, w = (rho_s - rho_m) / (rho_s - rho_t): the mean of the two, weighted by
    the lengths of their steps in rho; s < m <= t.
    """
    w = jnp.expm1((logsnr_m - logsnr_s) / 2) / jnp.expm1((logsnr_t - logsnr_s) / 2)
    w = over_pixels(w, x_first)
    return (1 - w) * x_first + w * x_second


def analytic_x_var(logsnr_t: PerExample) -> PerExample:
    """x_var = 0.1 / (2 + alpha_t^2 / sigma_t^2): aDDIM's variance if none was measured (SPEC 3c).

    Examples:
      >>> import jax.numpy as jnp
      >>> [round(value, 4) for value in analytic_x_var(jnp.array([-15.0, 0.0, 15.0])).tolist()]
      [0.05, 0.0333, 0.0]
    """
    return 0.1 / (2 + jnp.exp(logsnr_t))
