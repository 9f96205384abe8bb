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

from mcm_jax.diffusion import process, segments, steps
from mcm_jax.diffusion.network import ModelFn
from mcm_jax.diffusion.schedules import Schedule

LossWeight = Literal["snr_plus_one", "sqrt_snr_plus_one"]
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
    teacher_step: TeacherStep = "addim",
    xvar_frac: float = 0.75,
    huber_epsilon: float = 1e-4,
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
      teacher_step: the integrator of the teacher's step from t to s.
      xvar_frac: aDDIM's x_var = xvar_frac ||x_teacher - x||^2 / d, per example.
      huber_epsilon: see `pseudo_huber`.
      loss_weight: see `weight`.
    """
    key_times, key_eps, key_dropout = jax.random.split(key, 3)
    n_per = segments.steps_per_segment(teacher_steps, student_steps=student_steps)
    times = segments.draw_times(
        key_times, batch_size=x.shape[0], student_steps=student_steps, steps_per_segment=n_per
    )
    logsnr_t, logsnr_s, logsnr_step = schedule(times.t), schedule(times.s), schedule(times.t_step)
    eps = jax.random.normal(key_eps, x.shape)
    z_t = process.diffuse(x, eps, logsnr_t=logsnr_t)

    if teacher_fn is None:
        x_teacher = x
    else:
        v_teacher = teacher_fn(z_t, logsnr_t, cond, None)
        x_teacher = process.x_from_v(v_teacher, z_t, logsnr_t=logsnr_t)
    if teacher_step == "addim":
        x_var = xvar_frac * process.mean_square(x_teacher - x)
        x_step = steps.addim_x(x_teacher, z_t, logsnr_t=logsnr_t, logsnr_s=logsnr_s, x_var=x_var)
    else:
        x_step = x_teacher
    z_s = steps.ddim(x_step, z_t, logsnr_t=logsnr_t, logsnr_s=logsnr_s)

    def f(z: Float[Array, "B ..."], logsnr: Float[Array, "B"]) -> Float[Array, "B ..."]:
        return process.x_from_v(model_fn(z, logsnr, cond, key_dropout), z, logsnr_t=logsnr)

    # The target is a constant: the gradient flows through f(z_t, t) alone.
    x_ref = jax.lax.stop_gradient(f(z_s, logsnr_s))
    x_target = consistency_target(
        x_step,
        x_ref,
        logsnr_t=logsnr_t,
        logsnr_s=logsnr_s,
        logsnr_step=logsnr_step,
        is_last=times.is_last,
    )
    x_diff = x_target - f(z_t, logsnr_t)
    return weight(logsnr_t, kind=loss_weight) * pseudo_huber(x_diff, epsilon=huber_epsilon)


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
    w = jnp.expm1((logsnr_s - logsnr_step) / 2) / jnp.expm1((logsnr_t - logsnr_step) / 2)
    w = process.over_pixels(w, x_ref)
    return jnp.where(process.over_pixels(is_last, x_ref), x_step, (1 - w) * x_step + w * x_ref)


def pseudo_huber(x_diff: Float[Array, "B ..."], *, epsilon: float) -> Float[Array, "B"]:
    """sqrt(m + epsilon^2) - epsilon of m = ||x_diff||^2 / d, per example.

    Small epsilon: the unsquared distance; large: the squared one, scaled. Not in the paper: sum or
    mean over d; we chose the mean because only then is epsilon = 1 the "scaled squared l2 loss" that
    the paper calls it. Computed without the difference, which cancels in float32 for small m.
    """
    mean_square = process.mean_square(x_diff)
    return mean_square / (jnp.sqrt(mean_square + epsilon**2) + epsilon)


def weight(logsnr_t: Float[Array, "B"], *, kind: LossWeight) -> Float[Array, "B"]:
    """w_t = SNR(t) + 1 ("snr_plus_one", the paper's "for instance") or its square root.

    Times the squared distance in x, SNR + 1 is the squared distance in v; for the unsquared distance of
    a small huber_epsilon it is sqrt(SNR + 1) that does so.
    """
    snr_plus_one = 1 + jnp.exp(logsnr_t)
    return snr_plus_one if kind == "snr_plus_one" else jnp.sqrt(snr_plus_one)
