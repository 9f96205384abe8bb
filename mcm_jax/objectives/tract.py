"""TRACT: transitive closure time-distillation (Berthelot et al. 2023, arXiv:2303.04248; SPEC 5)."""

import dataclasses

import jax
from jaxtyping import Array, Float, Int

from mcm_jax.diffusion.conditions import Cond
from mcm_jax.fields import setting
from mcm_jax.objectives.consistency import Consistency
from mcm_jax.objectives.distances import LossWeight
from mcm_jax.objectives.objective import Networks


@dataclasses.dataclass(frozen=True)
class Tract:
    """w_t ||x_target - f(z_t, t)||^2 / d: consistency distillation in stages of ever fewer steps.

    The stages are, for example, 1024 -> 32 -> 1. In each stage, the teacher is the previous stage's model and
    takes single DDIM steps; the student learns to jump to the end of its segment. This is `Consistency` with
    a constant grid, a DDIM teacher, a target network with averaged parameters, and the squared distance.
    """

    stages: tuple[int, ...] = setting(
        (), "steps of the teacher, then of each stage's student, e.g. (1024, 32, 1)", low=1
    )
    loss_weight: LossWeight = setting("max_snr_one", "w_t, see `distances.weight`")
    target_decay: float = setting(
        0.5, "decay of the target network's bias-corrected average", low=0, high=0.999999
    )

    @property
    def as_consistency(self) -> Consistency:
        """The loss of a single stage as a consistency objective."""
        teacher_steps, student_steps = self.stages
        return Consistency(
            student_steps=(student_steps,),
            teacher_steps_first=float(teacher_steps),
            teacher_steps_last=float(teacher_steps),
            teacher_step="ddim",
            distance="squared",
            loss_weight=self.loss_weight,
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
        return self.as_consistency(networks, x, cond, key, train_step)
