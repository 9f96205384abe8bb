"""Progressive distillation (Salimans & Ho 2022, arXiv:2202.00512) with DDIM or aDDIM (SPEC 5)."""

import dataclasses
from typing import Literal

import jax
from jaxtyping import Array, Float, Int

from mcm_jax.diffusion import process, segments, steps
from mcm_jax.diffusion.conditions import Cond
from mcm_jax.fields import setting
from mcm_jax.objectives.consistency import TeacherStep, teacher_x
from mcm_jax.objectives.distances import LossWeight, weight
from mcm_jax.objectives.objective import Networks


@dataclasses.dataclass(frozen=True)
class Progressive:
    """w_t ||x_target - f(z_t, t)||^2 / d: one student step learns two teacher steps, t -> m -> s.

    x_target = invDDIM_{t->s}(z_s, z_t) is the weighted mean of the x of both steps, `steps.composed_x`. The
    teacher is the diffusion model, or the previous stage with twice as many steps.
    """

    stages: tuple[int, ...] = setting(
        (), "steps of the teacher, then of each stage's student, e.g. (8, 4, 2, 1)", low=1
    )
    teacher_step: TeacherStep = setting("addim", "integrator of both of the teacher's steps")
    xvar_frac: float = setting(0.75, "x_var = xvar_frac ||x_teacher - x||^2 / d", low=0)
    later_xvar_frac: float = setting(
        0.0, "xvar_frac after the first stage (open; such teachers already include the adjustment)", low=0
    )
    midpoint_xvar: Literal["path", "fresh"] = setting(
        "path",
        "where the second step's x_var is measured (open): at z_m itself (path), which is not x with new "
        "noise, or at x with new noise (fresh), which costs one more call of the teacher",
    )
    loss_weight: LossWeight = setting("max_snr_one", "w_t, see `distances.weight`")

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
        key_times, key_eps, key_dropout = jax.random.split(key, 3)
        t, m, s = segments.draw_halves(key_times, batch_size=len(x), student_steps=self.stages[1])
        logsnr_t, logsnr_m, logsnr_s = (networks.schedule(time) for time in (t, m, s))
        z_t = process.diffuse(x, jax.random.normal(key_eps, x.shape), logsnr_t=logsnr_t)

        def predict(z: Float[Array, "B ..."], logsnr: Float[Array, " B"]) -> Float[Array, "B ..."]:
            return process.x_from_v(networks.require_teacher()(z, logsnr, cond, None), z, logsnr_t=logsnr)

        x_hat = predict(z_t, logsnr_t)
        x_first = self._step_x(x_hat, z_t, x_hat - x, logsnr_t=logsnr_t, logsnr_s=logsnr_m)
        z_m = steps.ddim(x_first, z_t, logsnr_t=logsnr_t, logsnr_s=logsnr_m)
        x_hat = predict(z_m, logsnr_m)
        error = x_hat - x
        if self.midpoint_xvar == "fresh":
            eps = jax.random.normal(jax.random.fold_in(key_eps, 1), x.shape)
            error = predict(process.diffuse(x, eps, logsnr_t=logsnr_m), logsnr_m) - x
        x_second = self._step_x(x_hat, z_m, error, logsnr_t=logsnr_m, logsnr_s=logsnr_s)
        x_target = steps.composed_x(
            x_first, x_second, logsnr_t=logsnr_t, logsnr_m=logsnr_m, logsnr_s=logsnr_s
        )
        v_hat = networks.student(z_t, logsnr_t, cond, key_dropout)
        x_diff = x_target - process.x_from_v(v_hat, z_t, logsnr_t=logsnr_t)
        return weight(logsnr_t, kind=self.loss_weight) * process.mean_square(x_diff)

    def _step_x(
        self,
        x_hat: Float[Array, "B ..."],
        z: Float[Array, "B ..."],
        error: Float[Array, "B ..."],
        *,
        logsnr_t: Float[Array, " B"],
        logsnr_s: Float[Array, " B"],
    ) -> Float[Array, "B ..."]:
        """The x whose DDIM step equals one of the teacher's two steps, with x_var of x_hat's error."""
        return teacher_x(
            x_hat,
            z,
            x_var=self.xvar_frac * process.mean_square(error),
            logsnr_t=logsnr_t,
            logsnr_s=logsnr_s,
            teacher_step=self.teacher_step,
        )
