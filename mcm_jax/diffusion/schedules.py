"""Noise schedules: callables t -> log-SNR (SPEC 2; simple diffusion, arXiv:2301.11093).

t = 0 is data and t = 1 is noise. The log-SNR, lambda = log(alpha^2 / sigma^2), decreases from t = 0 to t = 1.
All schedules are within 2e-6 of float64 at every float32 t in [0, 1].
"""

import math
import typing
from collections.abc import Callable
from typing import Literal, TypeGuard

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

Schedule = Callable[[Float[Array, "..."]], Float[Array, "..."]]
EndPoints = Literal["moved", "kept"]
Published = Literal["published_cd", "published_ct"]
Grid = Literal["schedule", "karras", Published]
# Position of the second of two noise levels between the first of `karras_grid` (0) and its last (1). In the
# examples of github.com/openai/consistency_models, cd has points 0 and 22 of 40, ct points 0 and 106 of 201.
_SECOND = {"published_cd": 22 / 39, "published_ct": 106 / 200}

# |log-SNR| at the ends of the cosine schedule; not in the paper. With 15, sigma_0 = alpha_1 = 5.5e-4, a
# fourteenth of a grey level.
LOGSNR_LIMIT = 15.0


def cosine(*, logsnr_min: float = -LOGSNR_LIMIT, logsnr_max: float = LOGSNR_LIMIT) -> Schedule:
    """lambda(t) = -2 log tan(pi u / 2), u = u_0 + t (u_1 - u_0), where u_0 and u_1 give the range [min, max].

    Args:
      logsnr_min: log-SNR at t = 1.
      logsnr_max: log-SNR at t = 0.

    Returns:
      A function that maps t in [0, 1], of any shape, to log-SNRs of the same shape. For u > 1/2 it computes
      -lambda at 1 - u, because a direct computation would have a float32 error of 2e-5.

    Examples:
      >>> schedule = cosine()
      >>> [round(value, 3) for value in schedule(jnp.array([0.0, 0.25, 1.0])).tolist()]
      [15.0, 1.761, -15.0]
    """
    u_0 = 2 / math.pi * math.atan(math.exp(-logsnr_max / 2))
    # Store 1 - u_1 instead of u_1, which is so close to 1 that float32 would lose digits.
    one_minus_u_1 = 2 / math.pi * math.atan(math.exp(logsnr_min / 2))
    width = 1 - one_minus_u_1 - u_0

    def schedule(t: Float[Array, "..."]) -> Float[Array, "..."]:
        u = u_0 + t * width
        one_minus_u = one_minus_u_1 + (1 - t) * width
        nearest = jnp.minimum(u, one_minus_u)
        return jnp.sign(u - 0.5) * 2 * jnp.log(jnp.tan(math.pi / 2 * nearest))

    return schedule


def shifted(
    *,
    noise_resolution: int,
    image_resolution: int,
    end_points: EndPoints = "moved",
    logsnr_min: float = -LOGSNR_LIMIT,
    logsnr_max: float = LOGSNR_LIMIT,
) -> Schedule:
    """lambda_cos(t) + 2 log(n / r): at image resolution r, the noise level of resolution n.

    Args:
      noise_resolution: n, in pixels.
      image_resolution: r, in pixels.
      end_points: not in the paper. "moved" (our default) applies the formula unchanged, which shifts the end
        points away from the limits; "kept" rescales t so that they stay there.
      logsnr_min: the limit at t = 1.
      logsnr_max: the limit at t = 0.

    Examples:
      >>> schedule = shifted(noise_resolution=32, image_resolution=64)
      >>> round(float(schedule(jnp.float32(1.0))), 3)  # -15 - 2 log 2
      -16.386
    """
    shift = 2 * math.log(noise_resolution / image_resolution)
    moved = 0.0 if end_points == "moved" else shift
    base = cosine(logsnr_min=logsnr_min - moved, logsnr_max=logsnr_max - moved)
    return lambda t: base(t) + shift


def interpolated(
    *,
    noise_resolution_low: int,
    noise_resolution_high: int,
    image_resolution: int,
    end_points: EndPoints = "moved",
    logsnr_min: float = -LOGSNR_LIMIT,
    logsnr_max: float = LOGSNR_LIMIT,
) -> Schedule:
    """(1 - t) shifted(n_low)(t) + t shifted(n_high)(t), with all resolutions in pixels.

    The other arguments are those of `shifted`.

    Examples:
      The schedule of the paper's ImageNet64 runs:

      >>> schedule = interpolated(noise_resolution_low=32, noise_resolution_high=64, image_resolution=64)
      >>> [round(value, 3) for value in schedule(jnp.array([0.0, 1.0])).tolist()]
      [13.614, -15.0]
    """
    low, high = (
        shifted(
            noise_resolution=n,
            image_resolution=image_resolution,
            end_points=end_points,
            logsnr_min=logsnr_min,
            logsnr_max=logsnr_max,
        )
        for n in (noise_resolution_low, noise_resolution_high)
    )
    return lambda t: (1 - t) * low(t) + t * high(t)


def karras(
    *, logsnr_min: float = -2 * math.log(80.0), logsnr_max: float = -2 * math.log(0.002), rho: float = 7.0
) -> Schedule:
    """sigma(t) = (sigma_min^(1/rho) + t (sigma_max^(1/rho) - sigma_min^(1/rho)))^rho, as log-SNR.

    Uniform steps in t are the grid of Karras et al. 2022, with our sigma_t / alpha_t for their sigma.

    Args:
      logsnr_min: -2 log sigma_max, at t = 1.
      logsnr_max: -2 log sigma_min, at t = 0.

    Examples:
      >>> [round(value, 2) for value in karras()(jnp.array([0.0, 0.5, 1.0])).tolist()]
      [12.43, -1.84, -8.76]
    """
    low, high = (math.exp(-logsnr / 2 / rho) for logsnr in (logsnr_max, logsnr_min))
    # log1p of the distance from the nearer end is exact there.
    return lambda t: jnp.where(
        t < 0.5,
        logsnr_max - 2 * rho * jnp.log1p(t * (high / low - 1)),
        logsnr_min - 2 * rho * jnp.log1p((1 - t) * (low / high - 1)),
    )


def uniform_grid(schedule: Schedule, num_steps: int) -> Float[Array, " N"]:
    """Log-SNRs at t = 1, 1 - 1/N, ..., 1/N, at which a sampler with N = num_steps >= 1 calls the network.

    Examples:
      >>> [round(value, 3) for value in uniform_grid(cosine(), 4).tolist()]
      [-15.0, -1.761, 0.0, 1.761]
    """
    # Divide in float64, outside any compiled loop: inside one, XLA need not round times to float32.
    t = np.arange(num_steps, 0, -1, dtype=np.float64) / num_steps
    return schedule(jnp.asarray(t, jnp.float32))


def karras_grid(
    num_steps: int, *, sigma_max: float = 80.0, sigma_min: float = 0.002, rho: float = 7.0
) -> Float[Array, " N"]:
    """sigma_i = (max^(1/rho) + i/(N-1) (min^(1/rho) - max^(1/rho)))^rho, as log-SNR = -2 log sigma.

    This is the grid of Karras et al. 2022 (SPEC 2), i = 0..N-1, for z rescaled to be variance preserving:
    their sigma is our sigma_t / alpha_t. There is no point at sigma = 0, because samplers return the last
    prediction of x.

    Args:
      num_steps: N >= 1; N = 1 gives only sigma_max.

    Examples:
      >>> [round(value, 2) for value in karras_grid(3).tolist()]
      [-8.76, -1.84, 12.43]
    """
    return _karras(np.linspace(0.0, 1.0, num_steps), sigma_max=sigma_max, sigma_min=sigma_min, rho=rho)


def is_published(grid: Grid) -> TypeGuard[Published]:
    """Whether a grid is one of `published_grid`."""
    return grid in typing.get_args(Published)


def published_grid(kind: Published, num_steps: int) -> Float[Array, " N"]:
    """The noise levels at which the published consistency models are sampled in one or two steps.

    Args:
      kind: whether the model was distilled (cd) or trained without a teacher (ct).

    Examples:
      >>> [round(value, 2) for value in published_grid("published_cd", 2).tolist()]
      [-8.76, -0.65]
    """
    if num_steps not in (1, 2):
        raise ValueError(f"published consistency models are sampled in 1 or 2 steps, not {num_steps}")
    return _karras(np.array([0.0, _SECOND[kind]][:num_steps]))


def _karras(
    position: Float[np.ndarray, " N"], *, sigma_max: float = 80.0, sigma_min: float = 0.002, rho: float = 7.0
) -> Float[Array, " N"]:
    """Log-SNRs at positions from 0 (sigma_max) to 1 (sigma_min)."""
    root = sigma_max ** (1 / rho) + position * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))
    return jnp.asarray(-2 * rho * np.log(root), jnp.float32)
