"""What changes from one update to the next."""

from typing import NamedTuple

import jax
import optax
from jaxtyping import PyTree

# A network's parameters; where their shapes or their shardings are meant, a tree of those.
Params = PyTree


class TrainState(NamedTuple):
    """Everything an update reads and writes; all of it is saved."""

    step: jax.Array  # int32 scalar, updates done so far
    params: Params
    ema_params: Params
    opt_state: optax.OptState
    target_params: Params = None  # the target network's, an average of its own; None where there is none
