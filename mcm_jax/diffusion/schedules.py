"""Noise schedules: callables t -> log-SNR (SPEC 2; simple diffusion, arXiv:2301.11093).

t = 0 is data, t = 1 is noise; log-SNR lambda = log(alpha^2 / sigma^2) falls from t = 0 to t = 1.
"""

import math
from collections.abc import Callable
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

Schedule = Callable[[Float[Array, "..."]], Float[Array, "..."]]
EndPoints = Literal["moved", "kept"]

# |log-SNR| at the ends of the cosine schedule. Not in the paper; 15 leaves sigma_0 = 5.5e-4, a
# fourteenth of a grey level, and alpha_1 the same.
LOGSNR_LIMIT = 15.0


def cosine(*, logsnr_min: float = -LOGSNR_LIMIT, logsnr_max: float = LOGSNR_LIMIT) -> Schedule:
    """lambda(t) = -2 log tan(pi u / 2), u = u_0 + t (u_1 - u_0) so that lambda spans [min, max].

    Args:
      logsnr_min: log-SNR at t = 1.
      logsnr_max: log-SNR at t = 0.

    Returns:
      t in [0, 1], any shape -> log-SNR of the same shape. Behind u = 1/2 it is computed as
      -lambda(1 - u), which keeps the float32 error below 2e-6 instead of 2e-5.
    """
    u_0 = 2 / math.pi * math.atan(math.exp(-logsnr_max / 2))
    # 1 - u_1, and not u_1: u_1 is so near 1 that float32 would lose its digits.
    one_minus_u_1 = 2 / math.pi * math.atan(math.exp(logsnr_min / 2))
    width = 1 - one_minus_u_1 - u_0

    def schedule(t: Float[Array, "..."]) -> Float[Array, "..."]:
        u = u_0 + t * width
        one_minus_u = one_minus_u_1 + (1 - t) * width
        nearest = jnp.minimum(u, one_minus_u)
        return jnp.sign(u - 0.5) * 2 * jnp.log(jnp.tan(math.pi / 2 * nearest))

    return schedule


def shifted(*, noise_resolution: int, image_resolution: int, end_points: EndPoints = "moved") -> Schedule:
    """lambda_cos(t) + 2 log(n / r): the noise of resolution n at image resolution r.

    Args:
      noise_resolution: n, in pixels.
      image_resolution: r, in pixels.
      end_points: not in the paper. "moved" (ours: the formula as it stands) shifts the ends away
        from +-15 with everything else; "kept" rescales t so that the ends stay at +-15.
    """
    shift = 2 * math.log(noise_resolution / image_resolution)
    moved = 0.0 if end_points == "moved" else shift
    base = cosine(logsnr_min=-LOGSNR_LIMIT - moved, logsnr_max=LOGSNR_LIMIT - moved)
    return lambda t: base(t) + shift


def interpolated(
    *,
    noise_resolution_low: int,
    noise_resolution_high: int,
    image_resolution: int,
    end_points: EndPoints = "moved",
) -> Schedule:
    """(1 - t) shifted(n_low)(t) + t shifted(n_high)(t), all resolutions in pixels."""
    low, high = (
        shifted(noise_resolution=n, image_resolution=image_resolution, end_points=end_points)
        for n in (noise_resolution_low, noise_resolution_high)
    )
    return lambda t: (1 - t) * low(t) + t * high(t)
