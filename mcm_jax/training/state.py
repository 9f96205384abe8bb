"""What changes from one update to the next."""

from typing import Any, NamedTuple

import jax


class TrainState(NamedTuple):
    """Everything an update reads and writes; all of it is saved."""

    step: jax.Array  # int32 scalar, updates done so far
    params: Any
    ema_params: Any
    opt_state: Any
    target_params: Any = None  # the target network's, an average of its own; None where there is none
