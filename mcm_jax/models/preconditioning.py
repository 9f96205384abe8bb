"""v_hat from networks that were trained to predict something else.

EDM's networks denoise x + sigma eps at any sigma = exp(-lambda / 2). With alpha^2 = sigmoid(lambda), our
noisy image z_t is alpha (x + sigma eps). Their formulas (arXiv:2206.00364, table 1) are written here in alpha
and in s = alpha sigma, the standard deviation of our noise. Then no divisor of EDM's formulas vanishes at
high or low noise, and float32 is exact enough at every log-SNR.
"""

import functools
import math
import typing
from collections.abc import Callable
from typing import Literal, TypeGuard

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mcm_jax.diffusion import process

# What a network predicts, and its input for the noise level:
#   edm          EDM's F; c_noise = ln(sigma) / 4
#   edm_1000     EDM's F; 1000 ln(sigma) / 4
#   consistency  F of a consistency model, which returns x itself at SIGMA_MIN; 1000 ln(sigma) / 4
#   eps_cosine   eps; the step, 0 to 999, of a cosine schedule
#   eps_linear   eps; the step, 0 to 999, of a schedule with linear betas
Steps = Literal["eps_cosine", "eps_linear"]
Preconditioning = Literal["edm", "edm_1000", "consistency", Steps]

SIGMA_DATA = 0.5
SIGMA_MIN = 0.002
SIGMA_MAX = 80.0

# (input, noise level) -> the network's prediction.
Inner = Callable[[Float[Array, "B ..."], Float[Array, " B"]], Float[Array, "B ..."]]


def v_hat(
    preconditioning: Preconditioning,
    network: Inner,
    z_t: Float[Array, "B ..."],
    logsnr_t: Float[Array, " B"],
) -> Float[Array, "B ..."]:
    """v_hat = (alpha z_t - x_hat) / s of a network with this preconditioning; float32 [B, ...].

    At log-SNRs for which a network that predicts eps has no step, it predicts that of the nearest step.
    """
    z_t = z_t.astype(jnp.float32)
    if predicts_eps(preconditioning):
        logsnrs = step_logsnrs(preconditioning)
        logsnr_t = jnp.clip(logsnr_t, logsnrs[-1], logsnrs[0])
        # Its training had whole steps only; the embedding of a step is continuous.
        step = jnp.interp(-logsnr_t, -logsnrs, np.arange(len(logsnrs), dtype=np.float32))
        eps = network(z_t, step)
        alpha, s = _alpha_s(logsnr_t, z_t)
        return (eps - s * z_t) / alpha
    alpha, s = _alpha_s(logsnr_t, z_t)
    n = jnp.sqrt(s**2 + (SIGMA_DATA * alpha) ** 2)
    f = network(z_t / n, -logsnr_t / 8 * (1 if preconditioning == "edm" else 1000))
    if preconditioning == "consistency":
        # Section 3 of arXiv:2303.01469: EDM's c_skip and c_out with sigma - SIGMA_MIN in place of sigma.
        r = s - SIGMA_MIN * alpha
        skip = alpha * (r**2 - (SIGMA_DATA * s) ** 2) / (s * (r**2 + (SIGMA_DATA * alpha) ** 2))
        return skip * z_t - SIGMA_DATA * r / (s * n) * f
    return (1 - SIGMA_DATA**2) * alpha * s / n**2 * z_t - SIGMA_DATA / n * f


def predicts_eps(preconditioning: Preconditioning) -> TypeGuard[Steps]:
    """Whether the network predicts eps, and was trained with 1,000 steps."""
    return preconditioning in typing.get_args(Steps)


def logsnr_range(preconditioning: Preconditioning) -> tuple[float, float]:
    """The lowest and highest log-SNR at which such networks were trained.

    Examples:
      >>> [round(logsnr, 2) for logsnr in logsnr_range("edm")]
      [-8.76, 12.43]
    """
    lowest, highest = -2 * math.log(SIGMA_MAX), -2 * math.log(SIGMA_MIN)
    if predicts_eps(preconditioning):
        logsnrs = step_logsnrs(preconditioning)
        # The last steps of the cosine are almost pure noise. There, x_hat = (z_t - s eps) / alpha has up to
        # 20,000 times the error of eps.
        return max(lowest, float(logsnrs[-1])), float(logsnrs[0])
    return lowest, highest


@functools.cache
def step_logsnrs(schedule: Steps) -> Float[np.ndarray, " 1000"]:
    """The log-SNR of each of the 1,000 steps, descending (arXiv:2102.09672, section 3.2)."""
    if schedule == "eps_cosine":
        u = np.linspace(0, 1, 1001)
        signal = np.cos(np.pi / 2 * (u + 0.008) / 1.008) ** 2
        betas = np.minimum(1 - signal[1:] / signal[:-1], 0.999)
    else:
        betas = np.linspace(1e-4, 0.02, 1000)
    alpha_squared = np.cumprod(1 - betas)
    return np.log(alpha_squared / (1 - alpha_squared)).astype(np.float32)


def _alpha_s(
    logsnr_t: Float[Array, " B"], z_t: Float[Array, "B ..."]
) -> tuple[Float[Array, "B ..."], Float[Array, "B ..."]]:
    return (
        process.over_pixels(process.alpha(logsnr_t), z_t),
        process.over_pixels(process.sigma(logsnr_t), z_t),
    )
