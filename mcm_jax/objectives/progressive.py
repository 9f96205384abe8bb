"""Progressive distillation (Salimans & Ho 2022, arXiv:2202.00512) with DDIM or aDDIM (SPEC 5)."""

import jax
from jaxtyping import Array, Float, Int

from mcm_jax.diffusion import process, segments, steps
from mcm_jax.diffusion.network import ModelFn
from mcm_jax.diffusion.schedules import Schedule
from mcm_jax.objectives.consistency import TeacherStep, teacher_x
from mcm_jax.objectives.distances import LossWeight, weight


def progressive_loss(
    model_fn: ModelFn,
    teacher_fn: ModelFn,
    x: Float[Array, "B ..."],
    cond: Int[Array, "B"],
    key: jax.Array,
    *,
    schedule: Schedule,
    student_steps: int,
    teacher_step: TeacherStep = "addim",
    xvar_frac: float = 0.75,
    loss_weight: LossWeight = "max_snr_one",
) -> Float[Array, "B"]:
    """w_t ||x_target - f(z_t, t)||^2 / d: one step of the student is two of the teacher, t -> m -> s.

    x_target = invDDIM_{t->s}(z_s, z_t) is the weighted mean of the two steps' x, `steps.composed_x`.

    Args:
      model_fn: the student f, of student_steps steps.
      teacher_fn: the model of twice as many steps: the diffusion model or the stage before.
      x, cond, key: clean images, class labels, and the key of times, noise and dropout.
      teacher_step: the integrator of both of the teacher's steps.
      xvar_frac: aDDIM's x_var = xvar_frac ||x_teacher - x||^2 / d. Not in the paper: its value once the
        teacher is a student; we take 0 there, since such a teacher carries the adjustment already.
      loss_weight: see `distances.weight`.
    """
    key_times, key_eps, key_dropout = jax.random.split(key, 3)
    t, m, s = segments.draw_halves(key_times, batch_size=x.shape[0], student_steps=student_steps)
    logsnr_t, logsnr_m, logsnr_s = schedule(t), schedule(m), schedule(s)
    eps = jax.random.normal(key_eps, x.shape)
    z_t = process.diffuse(x, eps, logsnr_t=logsnr_t)

    def teach(
        z: Float[Array, "B ..."], *, logsnr_from: Float[Array, "B"], logsnr_to: Float[Array, "B"]
    ) -> Float[Array, "B ..."]:
        x_teacher = process.x_from_v(teacher_fn(z, logsnr_from, cond, None), z, logsnr_t=logsnr_from)
        x_var = xvar_frac * process.mean_square(x_teacher - x)
        return teacher_x(
            x_teacher, z, x_var=x_var, logsnr_t=logsnr_from, logsnr_s=logsnr_to, teacher_step=teacher_step
        )

    x_first = teach(z_t, logsnr_from=logsnr_t, logsnr_to=logsnr_m)
    z_m = steps.ddim(x_first, z_t, logsnr_t=logsnr_t, logsnr_s=logsnr_m)
    x_second = teach(z_m, logsnr_from=logsnr_m, logsnr_to=logsnr_s)
    x_target = steps.composed_x(x_first, x_second, logsnr_t=logsnr_t, logsnr_m=logsnr_m, logsnr_s=logsnr_s)
    v_hat = model_fn(z_t, logsnr_t, cond, key_dropout)
    x_diff = x_target - process.x_from_v(v_hat, z_t, logsnr_t=logsnr_t)
    return weight(logsnr_t, kind=loss_weight) * process.mean_square(x_diff)
