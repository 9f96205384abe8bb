"""One step from z_t to z_s, s < t, as an integrator of the probability flow (SPEC 3; MCM sections 2, 3).

With y = z / sigma and rho = alpha / sigma a DDIM step is the straight line y_s = y_t + (rho_s - rho_t) x.
Every other deterministic step is the DDIM step of some other x: `addim_x` is aDDIM's.
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


def analytic_x_var(logsnr_t: PerExample) -> PerExample:
    """0.1 / (2 + alpha_t^2 / sigma_t^2): aDDIM's variance when nothing was measured (SPEC 3c)."""
    return 0.1 / (2 + jnp.exp(logsnr_t))
