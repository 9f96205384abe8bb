"""Guidance distillation (Meng et al. 2022, arXiv:2210.03142; SPEC 5) for one fixed guidance weight."""

import dataclasses

import jax
from jaxtyping import Array, Float, Int

from mcm_jax.diffusion import process
from mcm_jax.diffusion.conditions import Cond
from mcm_jax.diffusion.guidance import guided
from mcm_jax.fields import setting
from mcm_jax.objectives.objective import Networks


@dataclasses.dataclass(frozen=True)
class Guidance:
    """||v_g - v_hat(z_t)||^2 / d, t ~ U(0, 1): one call of the student learns two calls of the teacher.

    v_g = v + g (v - v_guide) is the guided teacher's prediction, g = teacher_guidance. The student is a
    diffusion model of guided images.
    """

    teacher_guidance: float = setting(0.0, "g of the teacher's prediction; it must be above 0", low=0)

    def __call__(
        self,
        networks: Networks,
        x: Float[Array, "B ..."],
        cond: Cond,
        key: jax.Array,
        train_step: Int[Array, ""],
    ) -> Float[Array, " B"]:
        """The loss of every example; see `objective.Objective`. It does not depend on train_step."""
        del train_step
        key_t, key_eps, key_dropout = jax.random.split(key, 3)
        logsnr_t = networks.schedule(jax.random.uniform(key_t, x.shape[:1]))
        eps = jax.random.normal(key_eps, x.shape)
        z_t = process.diffuse(x, eps, logsnr_t=logsnr_t)
        teacher = guided(networks.require_teacher(), networks.require_guide(), guidance=self.teacher_guidance)
        v_target = teacher(z_t, logsnr_t, cond, None)
        return process.mean_square(v_target - networks.student(z_t, logsnr_t, cond, key_dropout))
