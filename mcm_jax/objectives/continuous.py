"""Continuous-time multistep consistency: sCM (arXiv:2410.11081) inside MCM's segments."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mcm_jax.diffusion import process
from mcm_jax.diffusion.conditions import Cond
from mcm_jax.diffusion.guidance import guided
from mcm_jax.diffusion.schedules import Schedule
from mcm_jax.fields import setting
from mcm_jax.objectives.levels import Proposal, draw_in_segments
from mcm_jax.objectives.multistep import Multistep
from mcm_jax.objectives.objective import Networks


@dataclasses.dataclass(frozen=True)
class Continuous(Multistep):
    """||v_hat - sg(v_hat + g)||^2 / d (sCM, eq. 8): sCD with networks.teacher, sCT without.

    With the angle theta = arctan(sigma / alpha), a probability flow moves z by dz/dtheta = v, and the DDIM
    step from t to the end u of t's segment is a rotation by delta = theta_t - theta_u:

        f(z_t, t) = cos(delta) z_t - sin(delta) v_hat(z_t, t).

    The student is consistent if f does not change along the teacher's flow, that is, if the `tangent`
    g = cos(delta) df/dtheta is zero. In the loss, g stands for the normalised g / (||g|| + tangent_floor), so
    the value of the loss is always below 1: it does not show whether training diverges, samples do.

    Without the normalisation and with r = 1, the gradient at each t inside a segment is the limit of that of
    `Consistency` with the squared distance for infinitely many teacher steps, up to a weight at each t.
    aDDIM's correction vanishes in this limit. sCM's learned weight e^w(t) is left out.
    """

    proposal: Proposal = setting(
        "uniform",
        "distribution of t (open): uniform as in MCM (with the cosine schedule, log(sigma / alpha) then has "
        "mean 0 and deviation 1.55), or lognormal as in sCM, see proposal_mean",
    )
    proposal_mean: float = setting(-1.0, "lognormal: mean of log(sigma / alpha)")
    proposal_std: float = setting(1.6, "lognormal: standard deviation of log(sigma / alpha)", low=1e-3)
    warmup_steps: int = setting(
        10_000, "updates over which r, the factor of the tangent's second term, grows from 0 to 1", low=1
    )
    tangent_floor: float = setting(
        0.1, "c of the normalised tangent g / (||g|| + c); ||g||^2 is the mean over d (open)", low=1e-6
    )

    def __call__(
        self,
        networks: Networks,
        x: Float[Array, "B ..."],
        cond: Cond,
        key: jax.Array,
        train_step: Int[Array, ""],
    ) -> Float[Array, " B"]:
        """The loss of every example; see `objective.Objective`."""
        key_times, key_eps, key_dropout = jax.random.split(key, 3)
        student_steps = self.draw_steps(jax.random.fold_in(key_times, 2), len(x))
        logsnr_t, logsnr_step = self._draw_logsnr(key_times, len(x), networks.schedule, student_steps)
        z_t, velocity = noisy_flow(
            networks, x, cond, key_eps, logsnr_t=logsnr_t, teacher_guidance=self.teacher_guidance
        )
        target_fn = self.until(networks.target or networks.student, logsnr_step)
        v_target, v_dot = along_flow(
            lambda z, logsnr: target_fn(z, logsnr, cond, key_dropout), z_t, velocity, logsnr_t=logsnr_t
        )
        g = tangent(
            z_t,
            velocity,
            v_target,
            v_dot,
            logsnr_t=logsnr_t,
            logsnr_step=logsnr_step,
            warmup=jnp.minimum(1.0, train_step / self.warmup_steps),
        )
        v_hat = self.until(networks.student, logsnr_step)(z_t, logsnr_t, cond, key_dropout)
        return self.steps_weight(student_steps) * tangent_loss(v_hat, g, floor=self.tangent_floor)

    def _draw_logsnr(
        self, key: jax.Array, batch_size: int, schedule: Schedule, student_steps: int | Int[Array, " B"]
    ) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
        """Log-SNRs at t and at the end of its segment."""
        return draw_in_segments(
            key,
            schedule,
            jnp.broadcast_to(student_steps, (batch_size,)),
            most_steps=max(self.student_steps),
            proposal=self.proposal,
            mean=self.proposal_mean,
            std=self.proposal_std,
        )


def noisy_flow(
    networks: Networks,
    x: Float[Array, "B ..."],
    cond: Cond,
    key: jax.Array,
    *,
    logsnr_t: Float[Array, " B"],
    teacher_guidance: float,
) -> tuple[Float[Array, "B ..."], Float[Array, "B ..."]]:
    """(z_t, dz/dtheta): the velocity is the guided teacher's v, or without a teacher that of the data."""
    eps = jax.random.normal(key, x.shape)
    z_t = process.diffuse(x, eps, logsnr_t=logsnr_t)
    if networks.teacher is None:
        return z_t, process.v_from_x_eps(x, eps, logsnr_t=logsnr_t)
    teacher = guided(networks.teacher, networks.require_guide(), guidance=teacher_guidance)
    return z_t, teacher(z_t, logsnr_t, cond, None)


def tangent_loss(
    v_hat: Float[Array, "B ..."], g: Float[Array, "B ..."], *, floor: float
) -> Float[Array, " B"]:
    """||v_hat - sg(v_hat + g / (||g|| + floor))||^2 / d, where ||g||^2 is the mean over d."""
    size = process.over_pixels(jnp.sqrt(process.mean_square(g)), g)
    return process.mean_square(v_hat - jax.lax.stop_gradient(v_hat + g / (size + floor)))


def along_flow(
    v_fn: Callable[[Float[Array, "B ..."], Float[Array, " B"]], Float[Array, "B ..."]],
    z_t: Float[Array, "B ..."],
    velocity: Float[Array, "B ..."],
    *,
    logsnr_t: Float[Array, " B"],
) -> tuple[Float[Array, "B ..."], Float[Array, "B ..."]]:
    """(v, dv/dtheta) of v_fn(z, logsnr) where z moves by dz/dtheta = velocity, by forward differentiation.

    lambda = -2 log tan(theta), so that dlambda/dtheta = -2 / (alpha sigma).
    """
    logsnr_velocity = -2 / (process.alpha(logsnr_t) * process.sigma(logsnr_t))
    return jax.jvp(v_fn, (z_t, logsnr_t), (velocity, logsnr_velocity))


def tangent(
    z_t: Float[Array, "B ..."],
    velocity: Float[Array, "B ..."],
    v_hat: Float[Array, "B ..."],
    v_dot: Float[Array, "B ..."],
    *,
    logsnr_t: Float[Array, " B"],
    logsnr_step: Float[Array, " B"],
    warmup: Float[Array, ""],
) -> Float[Array, "B ..."]:
    """g = cos^2(delta) (dz/dtheta - v_hat) - r cos(delta) sin(delta) (z_t + dv_hat/dtheta).

    With r = 1 this is cos(delta) df/dtheta. At the end of the segment, delta = 0, it is the difference that
    diffusion training minimises.

    Args:
      velocity: dz/dtheta, the teacher's v or that of the data.
      v_dot: dv_hat/dtheta along the flow, see `along_flow`.
      logsnr_step: the log-SNR at the end of the segment.
      warmup: r.
    """
    delta = process.over_pixels(process.angle(logsnr_t) - process.angle(logsnr_step), z_t)
    cos, sin = jnp.cos(delta), jnp.sin(delta)
    return cos * cos * (velocity - v_hat) - warmup * cos * sin * (z_t + v_dot)
