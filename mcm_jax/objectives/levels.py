"""Noise levels t that are drawn in continuous time, the ends of their segments, and ECT's steps from them."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mcm_jax.diffusion import segments
from mcm_jax.diffusion.schedules import Schedule

Proposal = Literal["uniform", "lognormal"]

# k of ECT's n(t) = 1 + k sigmoid(-b t), where b = 1.
_ECT_K = 8.0


def draw_in_segments(
    key: jax.Array,
    schedule: Schedule,
    student_steps: Int[Array, " B"],
    *,
    most_steps: int,
    proposal: Proposal,
    mean: float,
    std: float,
) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
    """Log-SNRs at t and at the end of the segment of t.

    Args:
      student_steps: S of each example, at most `most_steps`.
      proposal: t ~ U(0, 1), or `lognormal` with this mean and deviation.
    """
    batch_size = len(student_steps)
    if proposal == "uniform":
        t, t_step = segments.draw_continuous_times(key, batch_size=batch_size, student_steps=student_steps)
        return schedule(t), schedule(t_step)
    logsnr_t = lognormal(key, (batch_size,), schedule, mean=mean, std=std)
    bounds = jnp.arange(1, most_steps) / student_steps[:, None]
    passed = (logsnr_t[:, None] < schedule(jnp.minimum(bounds, 1.0))) & (bounds < 1)
    return logsnr_t, schedule(passed.sum(axis=1) / student_steps)


def lognormal(
    key: jax.Array, shape: tuple[int, ...], schedule: Schedule, *, mean: float, std: float
) -> Float[Array, "..."]:
    """Log-SNRs with log(sigma / alpha) ~ N(mean, std^2), within the schedule's range."""
    noise = mean + std * jax.random.normal(key, shape)
    return jnp.clip(-2 * noise, schedule(jnp.ones(())), schedule(jnp.zeros(())))


def ect_logsnr(
    logsnr_t: Float[Array, " B"], logsnr_step: Float[Array, " B"], *, stage: Int[Array, ""], q: float
) -> Float[Array, " B"]:
    """The log-SNR at s = max(t (1 - q^-(stage + 1) n(t)), t_step), n(t) = 1 + 8 sigmoid(-t).

    ECT's t is the noise level sigma / alpha (arXiv:2406.14548). Stage by stage, the step from t to s gets
    shorter by the factor q. At first, it leads from low noise levels to the end of the segment at once: in
    stage 0 with q = 2, from those below ln 7.
    """
    noise_t = jnp.exp(-logsnr_t / 2)
    share = q ** -(stage + 1.0) * (1 + _ECT_K * jax.nn.sigmoid(-noise_t))
    noise_s = noise_t * (1 - share)
    inside = noise_s > jnp.exp(-logsnr_step / 2)
    return jnp.where(inside, -2 * jnp.log(jnp.where(inside, noise_s, 1.0)), logsnr_step)
