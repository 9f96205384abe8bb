"""The common interface of all objectives: the networks that they receive, and their call signature."""

import dataclasses
from typing import Protocol, runtime_checkable

import jax
from jaxtyping import Array, Float, Int

from mcm_jax.diffusion import guidance
from mcm_jax.diffusion.conditions import Cond, NullCond
from mcm_jax.diffusion.network import ModelFn
from mcm_jax.diffusion.schedules import Schedule


@dataclasses.dataclass(frozen=True, kw_only=True)
class Networks:
    """The networks that an objective calls, with their common noise schedule and null condition.

    Attributes:
      student: f, the trained network; its parameters are differentiated.
      teacher: the model to distil; None for objectives without a teacher.
      guide: the worse model that a guided teacher leads away from; None: the teacher without condition.
      target: the network that the target is made of (x_ref, the tangent in continuous time, or g_phi of
        moment matching), for example with averaged parameters; None: the student itself.
      schedule: the noise schedule.
      null_cond: the condition that stands for none, such as the label that means 'any class'.
    """

    student: ModelFn
    teacher: ModelFn | None = None
    guide: ModelFn | None = None
    target: ModelFn | None = None
    schedule: Schedule
    null_cond: NullCond

    def require_teacher(self) -> ModelFn:
        """The teacher, for an objective that always distils; raises ValueError if there is none."""
        if self.teacher is None:
            raise ValueError("this objective distils a teacher, but there is none")
        return self.teacher

    def require_target(self) -> ModelFn:
        """The target network, for an objective that trains one; raises ValueError if there is none."""
        if self.target is None:
            raise ValueError("this objective trains a target network, but there is none")
        return self.target

    def require_guide(self) -> ModelFn:
        """The model that a guided teacher leads away from; raises ValueError if there is no teacher."""
        return self.guide or guidance.without_condition(self.require_teacher(), self.null_cond)


@runtime_checkable
class Objective(Protocol):
    """A frozen dataclass whose fields are its settings and whose call is the loss."""

    def __call__(
        self,
        networks: Networks,
        x: Float[Array, "B ..."],
        cond: Cond,
        key: jax.Array,
        train_step: Int[Array, ""],
    ) -> Float[Array, " B"]:
        """The loss of every example.

        Args:
          networks: the networks to call.
          x: clean images in [-1, 1].
          cond: what they show, such as class labels.
          key: the randomness of times, noise and dropout.
          train_step: the number of updates done so far.
        """
        ...
