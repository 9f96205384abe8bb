"""Adam with learning rate warm-up and decay, and clipping by global norm (SPEC 4)."""

import dataclasses
from typing import Literal

import optax

from mcm_jax.fields import setting


@dataclasses.dataclass(frozen=True)
class OptimizerSettings:
    """Settings of Adam, its learning rate schedule, and the averaged parameters."""

    learning_rate: float = setting(1e-4, "peak learning rate of Adam (open)", low=0, high=10)
    warmup_steps: int = setting(0, "updates of linear warm-up, starting at peak / warmup_steps", low=0)
    decay: Literal["constant", "linear"] = setting("constant", "schedule after the warm-up; linear ends at 0")
    b1: float = setting(0.9, "Adam's b1 (open)", low=0, high=0.999999)
    b2: float = setting(0.99, "Adam's b2 (open)", low=0, high=0.999999)
    eps: float = setting(1e-12, "Adam's epsilon (open)", low=1e-30)
    clip_norm: float = setting(1.0, "global norm to which the gradient is clipped (open)", low=1e-30)
    ema_decay: float = setting(0.9999, "decay of the averaged parameters (open)", low=0, high=1)


def learning_rate_schedule(settings: OptimizerSettings, *, num_steps: int) -> optax.Schedule:
    """Linear from peak / warmup_steps to the peak, then constant or linear to 0 at num_steps.

    Args:
      num_steps: total number of updates; `config.validation` ensures that it exceeds settings.warmup_steps.
    """
    peak, warmup_steps = settings.learning_rate, settings.warmup_steps
    tail = (
        optax.constant_schedule(peak)
        if settings.decay == "constant"
        else optax.linear_schedule(peak, 0.0, num_steps - warmup_steps)
    )
    if warmup_steps == 0:
        return tail
    # Starts at peak / warmup_steps, because an update with learning rate 0 would be wasted.
    warmup = optax.linear_schedule(peak / warmup_steps, peak, max(warmup_steps - 1, 1))
    return optax.join_schedules([warmup, tail], [warmup_steps])


def adam(settings: OptimizerSettings, *, num_steps: int, turns: int = 1) -> optax.GradientTransformation:
    """Clips the gradient to a global norm of clip_norm, then applies Adam.

    Args:
      num_steps: total number of updates.
      turns: number of optimizers that take turns, each of which makes every turns-th update.
    """
    schedule = learning_rate_schedule(settings, num_steps=num_steps)
    return optax.chain(
        optax.clip_by_global_norm(settings.clip_norm),
        optax.adam(
            schedule if turns == 1 else lambda count: schedule(turns * count),
            b1=settings.b1,
            b2=settings.b2,
            eps=settings.eps,
        ),
    )
