"""Flow maps: students that step from any time t to any earlier time u (AYF, MeanFlow)."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mcm_jax.diffusion import process
from mcm_jax.diffusion.conditions import Cond
from mcm_jax.diffusion.network import until
from mcm_jax.diffusion.schedules import Schedule
from mcm_jax.fields import setting
from mcm_jax.objectives.continuous import along_flow, noisy_flow, tangent, tangent_loss
from mcm_jax.objectives.levels import Proposal, lognormal
from mcm_jax.objectives.objective import Networks


@dataclasses.dataclass(frozen=True)
class FlowMap:
    """The Eulerian objective of flow maps: `ayf` with networks.teacher, `meanflow` without.

    The network receives both times. The step from t to u is the rotation of `continuous.Continuous`,

        f(z_t, t, u) = cos(delta) z_t - sin(delta) v_hat(z_t, t, u), delta = theta_t - theta_u,

    and f is the flow from t to u if its `tangent` g = cos(delta) df/dtheta_t is zero for all t and u. At
    u = t, g is the difference that diffusion training minimises.

    AYF (arXiv:2506.14603) follows the teacher and normalises the tangent, with r growing to 0.99. MeanFlow
    (arXiv:2505.13447) follows the data and normalises the loss. Its identity u = v - (t - r) du/dt is
    df/dt = 0 on straight paths, where the step is z_t - (t - r) u. On our paths, tan(delta) takes the place
    of t - r, and diverges at delta = pi / 2. We therefore multiply the identity by cos^2(delta), as sCM does.
    """

    teacher_guidance: float = setting(0.0, "ayf: g of the teacher's prediction; 0: none", low=0)
    proposal: Proposal = setting(
        "uniform",
        "distribution of both times, of which t is the larger (open for ayf): uniform, or lognormal as in "
        "MeanFlow, see proposal_mean",
    )
    proposal_mean: float = setting(-0.4, "lognormal: mean of log(sigma / alpha)")
    proposal_std: float = setting(1.0, "lognormal: standard deviation of log(sigma / alpha)", low=1e-3)
    equal_share: float = setting(
        0.5,
        "share of examples with u = t, which train the velocity itself (open for ayf); MeanFlow: 0.75, "
        "improved MeanFlow: 0.5",
        low=0,
        high=1,
    )
    along: Literal["target", "predicted"] = setting(
        "target",
        "velocity along which the network is differentiated: target, that of the teacher or the data, or "
        "predicted, the student's own v_hat(z_t, t, t), as in improved MeanFlow",
    )
    normalised: Literal["tangent", "loss"] = setting(
        "tangent",
        "tangent: g / (||g|| + floor), as in AYF; loss: ||g||^2 / (||g||^2 + floor), as in MeanFlow",
    )
    floor: float = setting(
        0.1,
        "see normalised; ||g||^2 is the mean over d (ours); MeanFlow: 0.01 with normalised=loss",
        low=1e-6,
    )
    warmup_steps: int = setting(
        10_000, "updates over which r, the factor of the tangent's second term, grows from 0", low=1
    )
    warmup_last: float = setting(1.0, "the last r; AYF: 0.99", low=0, high=1)

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
        logsnr_t, logsnr_u = self._draw_logsnr(key_times, len(x), networks.schedule)
        z_t, velocity = noisy_flow(
            networks, x, cond, key_eps, logsnr_t=logsnr_t, teacher_guidance=self.teacher_guidance
        )
        target_fn, student = networks.target or networks.student, until(networks.student, logsnr_u)
        along = velocity
        if self.along == "predicted":
            along = until(target_fn, logsnr_t)(z_t, logsnr_t, cond, key_dropout)
        target_fn = until(target_fn, logsnr_u)
        v_target, v_dot = along_flow(
            lambda z, logsnr: target_fn(z, logsnr, cond, key_dropout), z_t, along, logsnr_t=logsnr_t
        )
        g = tangent(
            z_t,
            velocity,
            v_target,
            v_dot,
            logsnr_t=logsnr_t,
            logsnr_step=logsnr_u,
            warmup=self.warmup_last * jnp.minimum(1.0, train_step / self.warmup_steps),
        )
        v_hat = student(z_t, logsnr_t, cond, key_dropout)
        if self.normalised == "tangent":
            return tangent_loss(v_hat, g, floor=self.floor)
        weight = jax.lax.stop_gradient(1 / (process.mean_square(g) + self.floor))
        return weight * process.mean_square(v_hat - jax.lax.stop_gradient(v_hat + g))

    def _draw_logsnr(
        self, key: jax.Array, batch_size: int, schedule: Schedule
    ) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
        """Log-SNRs at t and u <= t."""
        key_times, key_equal = jax.random.split(key)
        shape = (2, batch_size)
        if self.proposal == "uniform":
            logsnr = schedule(jax.random.uniform(key_times, shape))
        else:
            logsnr = lognormal(key_times, shape, schedule, mean=self.proposal_mean, std=self.proposal_std)
        logsnr_t = logsnr.min(axis=0)
        equal = jax.random.bernoulli(key_equal, self.equal_share, (batch_size,))
        return logsnr_t, jnp.where(equal, logsnr_t, logsnr.max(axis=0))
