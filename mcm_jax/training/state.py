"""The training state: everything that changes from one update to the next."""

from typing import NamedTuple

import jax
import optax
from jaxtyping import PyTree

# A network's parameters, or a tree of their shapes or shardings with the same structure.
Params = PyTree


class TeacherParams(NamedTuple):
    """The parameters of a teacher, and of the model that guidance leads away from."""

    teacher: Params
    guide: Params = None  # None: the teacher itself, without condition


class Moved(NamedTuple):
    """Parameters and a small change of them; a network takes the first order of its effect."""

    params: Params
    change: Params


class TrainState(NamedTuple):
    """Everything that an update reads and writes; checkpoints contain all of it."""

    step: jax.Array  # int32 scalar: number of updates done
    params: Params
    ema_params: Params
    opt_state: optax.OptState
    target_params: Params = None  # of the target network, averaged or trained; None if there is none
    target_opt_state: PyTree = None  # of a target network that is trained or moved
