"""Adam with warm-up, decay and a global clip (SPEC 4)."""

from typing import Literal

import optax


def learning_rate_schedule(
    *, peak: float, warmup_steps: int, decay: Literal["constant", "linear"], num_steps: int
) -> optax.Schedule:
    """Linear from peak / warmup_steps to `peak`, then constant or linear to 0 at num_steps.

    Args:
      warmup_steps: below num_steps, as `config.validation` makes sure.
    """
    tail = (
        optax.constant_schedule(peak)
        if decay == "constant"
        else optax.linear_schedule(peak, 0.0, num_steps - warmup_steps)
    )
    if warmup_steps == 0:
        return tail
    # From peak / warmup: an update with learning rate 0 would be wasted.
    warmup = optax.linear_schedule(peak / warmup_steps, peak, max(warmup_steps - 1, 1))
    return optax.join_schedules([warmup, tail], [warmup_steps])


def adam(
    learning_rate: optax.Schedule, *, b1: float, b2: float, eps: float, clip_norm: float
) -> optax.GradientTransformation:
    """The gradient clipped to a global norm of clip_norm, then Adam."""
    return optax.chain(optax.clip_by_global_norm(clip_norm), optax.adam(learning_rate, b1=b1, b2=b2, eps=eps))
