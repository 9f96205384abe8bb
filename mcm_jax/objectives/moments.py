"""Moment matching distillation (Salimans et al. 2024, arXiv:2406.04103; SPEC 11)."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mcm_jax.diffusion import process, segments, steps
from mcm_jax.diffusion.conditions import Cond
from mcm_jax.diffusion.guidance import guided
from mcm_jax.diffusion.network import ModelFn
from mcm_jax.fields import setting
from mcm_jax.objectives.distances import LossWeight, weight
from mcm_jax.objectives.objective import Networks


@dataclasses.dataclass(frozen=True)
class Moments:
    """w(s) x~ . sg(g_phi(z_s) - g_theta(z_s)) / d, for x~ = g_eta(z_t) and z_s ~ q(z_s | z_t, x~).

    The student g_eta should match a moment: E[x~ | z_s] should be E[x | z_s], which the teacher g_theta
    predicts. The target network g_phi starts as the teacher and learns E[x~ | z_s] by `target_loss`. No
    gradient flows through z_s. All networks share their dropout, so that g_phi - g_theta starts at zero.

    Updates 0, 2, ... train g_phi, updates 1, 3, ... the student. Or, if `instant`, each update moves g_phi
    from the teacher by one step of Adam, to first order: with nu the gradient of `target_loss` on one half of
    the batch, g_phi - g_theta = -(dg_theta / dtheta) Lambda nu. On the other half, the student's gradient is
    then that of ||E[nu]||^2 in the norm of Lambda, up to a factor.

    The student is sampled by ancestral sampling. Its loss does not show its quality: it is zero for a perfect
    student, on average, but also at the start.
    """

    student_steps: int | None = setting(None, "k, network calls of the student's sampler", low=1)
    teacher_guidance: float = setting(0.0, "g of the teacher's prediction; 0: none", low=0)
    instant: bool = setting(
        False, "move g_phi from the teacher anew in each update, instead of training it in turn"
    )
    loss_weight: LossWeight = setting(
        "sqrt_snr_plus_one",
        "w(s) of both losses (open); sqrt_snr_plus_one makes the gap of the moments one in v",
    )
    target_rate: float = setting(
        1.0, "g_phi's learning rate as a multiple of the student's (open; ours: the same)", low=1e-6, high=1e6
    )

    def __call__(
        self,
        networks: Networks,
        x: Float[Array, "B ..."],
        cond: Cond,
        key: jax.Array,
        train_step: Int[Array, ""],
    ) -> Float[Array, " B"]:
        """The student's loss of every example, at any train_step; see `objective.Objective`."""
        del train_step
        x_tilde, x_phi, x_theta, w = self._predictions(networks, x, cond, key)
        moment_gap = jax.lax.stop_gradient(x_phi - x_theta)
        return w * jnp.mean(x_tilde * moment_gap, axis=tuple(range(1, x.ndim)))

    def target_loss(
        self,
        networks: Networks,
        x: Float[Array, "B ..."],
        cond: Cond,
        key: jax.Array,
        train_step: Int[Array, ""],
    ) -> Float[Array, " B"]:
        """w(s) (||x~ - g_phi(z_s)||^2 + ||g_theta(z_s) - g_phi(z_s)||^2) / d, the loss of g_phi.

        Its minimum is at g_phi = (E[x~ | z_s] + g_theta) / 2: the second term halves the student's gradient.
        """
        del train_step
        x_tilde, x_phi, x_theta, w = self._predictions(networks, x, cond, key)
        return w * (process.mean_square(x_tilde - x_phi) + process.mean_square(x_theta - x_phi))

    def _predictions(
        self, networks: Networks, x: Float[Array, "B ..."], cond: Cond, key: jax.Array
    ) -> tuple[Float[Array, "B ..."], Float[Array, "B ..."], Float[Array, "B ..."], Float[Array, " B"]]:
        """(x~, g_phi(z_s), g_theta(z_s), w(s))."""
        if self.student_steps is None:
            raise ValueError("student_steps is not set")
        key_times, key_eps, key_noise, key_dropout = jax.random.split(key, 4)
        t, s = segments.draw_jumps(key_times, batch_size=len(x), student_steps=self.student_steps)
        logsnr_t, logsnr_s = networks.schedule(t), networks.schedule(s)
        z_t = process.diffuse(x, jax.random.normal(key_eps, x.shape), logsnr_t=logsnr_t)

        def predict(
            model_fn: ModelFn, z: Float[Array, "B ..."], logsnr: Float[Array, " B"]
        ) -> Float[Array, "B ..."]:
            return process.x_from_v(model_fn(z, logsnr, cond, key_dropout), z, logsnr_t=logsnr)

        x_tilde = predict(networks.student, z_t, logsnr_t)
        noise = jax.random.normal(key_noise, x.shape)
        z_s = steps.ddpm(jax.lax.stop_gradient(x_tilde), z_t, noise, logsnr_t=logsnr_t, logsnr_s=logsnr_s)
        teacher = guided(networks.require_teacher(), networks.require_guide(), guidance=self.teacher_guidance)
        x_phi, x_theta = (predict(f, z_s, logsnr_s) for f in (networks.require_target(), teacher))
        return x_tilde, x_phi, x_theta, weight(logsnr_s, kind=self.loss_weight)
