"""TRACT: transitive closure time-distillation (Berthelot et al. 2023, arXiv:2303.04248; SPEC 5).

Stages, for example 1024 -> 32 -> 1. In each, the student learns to jump to the end of its segment from a
teacher, the previous stage's model, that takes single DDIM steps. It is multistep consistency distillation
with a constant grid, a DDIM teacher, a target network that averages the student's parameters, and the squared
distance: `consistency_loss` with these choices, and nothing else.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mcm_jax.diffusion.network import ModelFn
from mcm_jax.diffusion.schedules import Schedule
from mcm_jax.objectives.consistency import consistency_loss
from mcm_jax.objectives.distances import LossWeight


def tract_loss(
    model_fn: ModelFn,
    teacher_fn: ModelFn,
    target_fn: ModelFn,
    x: Float[Array, "B ..."],
    cond: Int[Array, "B"],
    key: jax.Array,
    *,
    schedule: Schedule,
    student_steps: int,
    teacher_steps: int,
    loss_weight: LossWeight = "max_snr_one",
) -> Float[Array, "B"]:
    """w_t ||x_target - f(z_t, t)||^2 / d, one value an example, w_t = max(SNR, 1).

    Args:
      model_fn: the student f of this stage.
      teacher_fn: the model of the stage before; in the first stage the diffusion model.
      target_fn: the student with averaged parameters, bias-corrected, momentum 0.5 in TRACT.
      x, cond, key: as in `consistency_loss`.
      student_steps, teacher_steps: steps of this stage and of the one before, a multiple of them.
      loss_weight: see `distances.weight`.
    """
    return consistency_loss(
        model_fn,
        teacher_fn,
        x,
        cond,
        key,
        schedule=schedule,
        student_steps=student_steps,
        teacher_steps=jnp.float32(teacher_steps),
        target_fn=target_fn,
        teacher_step="ddim",
        distance_kind="squared",
        loss_weight=loss_weight,
    )
