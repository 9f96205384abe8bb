"""Multistep consistency training and distillation (MCM Algorithm 1; SPEC 4).

Everything between z_t and the loss is written in the view y = z / sigma, rho = alpha / sigma, in which
a DDIM step is a straight line with slope x: two steps in a row are one step with a weighted mean of
their x. That makes Algorithm 1's invDDIM(DDIM(x_ref, aDDIM(x_teacher, z_t)), z_t) one line,
`consistency_target`, exact at the segment's end.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mcm_jax.diffusion import guidance, process, segments, steps
from mcm_jax.diffusion.network import ModelFn
from mcm_jax.diffusion.schedules import Schedule
from mcm_jax.objectives.distances import Distance, LossWeight, Reduction, distance, weight

TeacherStep = Literal["addim", "ddim"]


def consistency_loss(
    model_fn: ModelFn,
    teacher_fn: ModelFn | None,
    x: Float[Array, "B ..."],
    cond: Int[Array, "B"],
    key: jax.Array,
    *,
    schedule: Schedule,
    student_steps: int,
    teacher_steps: Float[Array, ""],
    target_fn: ModelFn | None = None,
    teacher_step: TeacherStep = "addim",
    xvar_frac: float = 0.75,
    teacher_guidance: float = 0.0,
    null_class: int = -1,
    distance_kind: Distance = "huber",
    huber_epsilon: float = 1e-4,
    reduction: Reduction = "mean",
    loss_weight: LossWeight = "sqrt_snr_plus_one",
) -> Float[Array, "B"]:
    """w_t huber(x_target - f(z_t, t)), one value an example (MCM Algorithm 1).

    Args:
      model_fn: the student f; its parameters are differentiated in f(z_t, t) only.
      teacher_fn: the diffusion model of distillation (CD); None for training from the data (CT).
      x: clean images in [-1, 1].
      cond: class labels.
      key: times, noise and dropout; both calls of the student share the dropout's.
      student_steps: S, the network calls of the student's sampler; 1 is a plain consistency model.
      teacher_steps: N_teacher(i), see `segments.annealed_teacher_steps`; may be traced.
      target_fn: the network of x_ref, for example the student's averaged parameters; None: f itself.
      teacher_step, xvar_frac: see `teacher_x`.
      teacher_guidance, null_class: see `teacher_prediction`.
      distance_kind, huber_epsilon, reduction: see `distances.distance`.
      loss_weight: see `distances.weight`.
    """
    key_times, key_eps, key_dropout = jax.random.split(key, 3)
    n_per = segments.steps_per_segment(teacher_steps, student_steps=student_steps)
    times = segments.draw_times(
        key_times, batch_size=x.shape[0], student_steps=student_steps, steps_per_segment=n_per
    )
    logsnr_t, logsnr_s, logsnr_step = schedule(times.t), schedule(times.s), schedule(times.t_step)
    eps = jax.random.normal(key_eps, x.shape)
    z_t = process.diffuse(x, eps, logsnr_t=logsnr_t)

    x_teacher, x_cond = x, x
    if teacher_fn is not None:
        x_teacher, x_cond = teacher_prediction(
            teacher_fn, z_t, cond, logsnr_t=logsnr_t, teacher_guidance=teacher_guidance, null_class=null_class
        )
    x_step = teacher_x(
        x_teacher,
        z_t,
        x_var=xvar_frac * process.mean_square(x_cond - x),
        logsnr_t=logsnr_t,
        logsnr_s=logsnr_s,
        teacher_step=teacher_step,
    )
    z_s = steps.ddim(x_step, z_t, logsnr_t=logsnr_t, logsnr_s=logsnr_s)

    # The target is a constant: the gradient flows through f(z_t, t) alone.
    v_ref = (target_fn or model_fn)(z_s, logsnr_s, cond, key_dropout)
    x_ref = jax.lax.stop_gradient(process.x_from_v(v_ref, z_s, logsnr_t=logsnr_s))
    x_target = consistency_target(
        x_step,
        x_ref,
        logsnr_t=logsnr_t,
        logsnr_s=logsnr_s,
        logsnr_step=logsnr_step,
        is_last=times.is_last,
    )
    v_hat = model_fn(z_t, logsnr_t, cond, key_dropout)
    x_diff = x_target - process.x_from_v(v_hat, z_t, logsnr_t=logsnr_t)
    return weight(logsnr_t, kind=loss_weight) * distance(
        x_diff, kind=distance_kind, huber_epsilon=huber_epsilon, reduction=reduction
    )


def teacher_prediction(
    teacher_fn: ModelFn,
    z_t: Float[Array, "B ..."],
    cond: Int[Array, "B"],
    *,
    logsnr_t: Float[Array, "B"],
    teacher_guidance: float,
    null_class: int,
) -> tuple[Float[Array, "B ..."], Float[Array, "B ..."]]:
    """(guided, conditional) x_hat of the teacher, without dropout; the same where teacher_guidance = 0.

    Guidance costs a second call. Not in the paper: where guidance enters; ours: the step is taken with the
    guided prediction, while aDDIM's x_var is that of the conditional one (SPEC 3).
    """
    v_cond = teacher_fn(z_t, logsnr_t, cond, None)
    x_cond = process.x_from_v(v_cond, z_t, logsnr_t=logsnr_t)
    if teacher_guidance == 0:
        return x_cond, x_cond
    v_uncond = teacher_fn(z_t, logsnr_t, jnp.full_like(cond, null_class), None)
    x_uncond = process.x_from_v(v_uncond, z_t, logsnr_t=logsnr_t)
    return guidance.guide(x_cond, x_uncond, guidance=teacher_guidance), x_cond


def teacher_x(
    x_teacher: Float[Array, "B ..."],
    z_t: Float[Array, "B ..."],
    *,
    x_var: Float[Array, "B"],
    logsnr_t: Float[Array, "B"],
    logsnr_s: Float[Array, "B"],
    teacher_step: TeacherStep,
) -> Float[Array, "B ..."]:
    """The x that carries the teacher's step from t to s.

    Args:
      x_var: aDDIM's, in training xvar_frac ||x_teacher - x||^2 / d per example (SPEC 3a).
      teacher_step: the integrator; any deterministic one is the DDIM step of some x.
    """
    if teacher_step == "ddim":
        return x_teacher
    return steps.addim_x(x_teacher, z_t, logsnr_t=logsnr_t, logsnr_s=logsnr_s, x_var=x_var)


def consistency_target(
    x_step: Float[Array, "B ..."],
    x_ref: Float[Array, "B ..."],
    *,
    logsnr_t: Float[Array, "B"],
    logsnr_s: Float[Array, "B"],
    logsnr_step: Float[Array, "B"],
    is_last: Bool[Array, "B"],
) -> Float[Array, "B ..."]:
    """x_target = (1 - w) x_step + w x_ref, w = (rho_u - rho_s) / (rho_u - rho_t), u = t_step.

    It equals invDDIM_{t->u}(DDIM_{s->u}(x_ref, z_s), z_t) with z_s = DDIM_{t->s}(x_step, z_t). On the
    segment's last step s = u it is x_step itself whatever x_ref is: the anchor against collapse.

    Args:
      x_step: the x that carries the teacher's step from t to s.
      x_ref: the student's prediction at s.
      logsnr_t, logsnr_s, logsnr_step: log-SNR at t, s and t_step, t_step <= s < t.
      is_last: whether s = t_step.
    """
    x_target = steps.composed_x(x_step, x_ref, logsnr_t=logsnr_t, logsnr_m=logsnr_s, logsnr_s=logsnr_step)
    return jnp.where(process.over_pixels(is_last, x_ref), x_step, x_target)
