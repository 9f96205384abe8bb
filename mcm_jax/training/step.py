"""The train step: loss, gradient, optimizer update, and averaged parameters."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, PyTree

from mcm_jax.system import sharding
from mcm_jax.training.state import Moved, Params, TrainState

# (params, teacher_params, target_params, batch, key, step) -> loss of every example; the teacher's parameters
# are any tree that the loss function understands. Those of the target network may be `Moved`.
Batch = dict[str, Array]
LossFn = Callable[[Params, PyTree, Params, Batch, Array, Array], Float[Array, " B"]]
Metrics = dict[str, Float[Array, ""]]
MeanLoss = Callable[[Params, Batch, Array], Float[Array, ""]]
T = TypeVar("T", bound=PyTree)
# (state, teacher_params, batch) -> (state, metrics)
TrainStep = Callable[[TrainState, PyTree, Batch], tuple[TrainState, Metrics]]


class TargetTraining(NamedTuple):
    """How a target network is trained in turn with the student, or anew for each of its updates.

    Attributes:
      loss_fn: differentiated with respect to the target network's parameters.
      optimizer: makes an update of the gradient.
      instant: in each update, the target network is moved by one such update, and only in this one.
    """

    loss_fn: LossFn
    optimizer: optax.GradientTransformation
    instant: bool = False


def init_state(
    params: Params,
    optimizer: optax.GradientTransformation,
    *,
    target_decay: float | None = None,
    target_optimizer: optax.GradientTransformation | None = None,
) -> TrainState:
    """Returns the state before the first update; all averages start at `params`. Works under jit.

    Args:
      target_decay: see `Update`; None: there is no averaged target network.
      target_optimizer: that of a trained target network, which also starts at `params`; None: there is none.
    """
    has_target = target_decay is not None or target_optimizer is not None
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        # A copy, because both are donated to the step, and a buffer can only be donated once.
        ema_params=jax.tree.map(jnp.copy, params),
        target_params=jax.tree.map(jnp.copy, params) if has_target else None,
        opt_state=optimizer.init(params),
        target_opt_state=None if target_optimizer is None else target_optimizer.init(params),
    )


def make_train_step(
    train_update: TrainStep, *, mesh: Mesh, state_sharding: TrainState, teacher_sharding: PyTree
) -> jax.stages.Wrapped:
    """Returns `train_update` jitted on a mesh, with the state donated."""

    # The compiled program has the function's name.
    def update(state: TrainState, teacher_params: PyTree, batch: Batch) -> tuple[TrainState, Metrics]:
        return train_update(state, teacher_params, batch)

    return jax.jit(
        update,
        in_shardings=(state_sharding, teacher_sharding, sharding.batch_sharding(mesh)),
        out_shardings=(state_sharding, sharding.replicated(mesh)),
        donate_argnums=0,
    )


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Update:
    """(state, teacher_params, batch) -> (state, metrics), a pure function for jit or scan.

    Update i uses the key fold_in(key(seed), i). The metrics are the loss averaged over the batch and the
    gradient's global norm before clipping.

    Attributes:
      ema_decay: decay of the averaged parameters, which are used for sampling.
      target_decay: decay of the target network's bias-corrected average (see `debiased_decay`); None: there
        is no averaged target network.
      target_training: how updates 0, 2, 4, ... train the target network, and only that; the student is
        trained in the others. If it is instant, every update trains the student on one half of the batch,
        with the target network `Moved` by the gradient of the other half. None: none is trained.
      accumulation_steps: number of parts of the batch, processed one after the other (see `accumulated`).
      project: applied to the trained parameters after every update; None: they stay as they are.
    """

    loss_fn: LossFn
    optimizer: optax.GradientTransformation
    ema_decay: float
    seed: int | Int[Array, ""]
    target_decay: float | None = None
    target_training: TargetTraining | None = None
    accumulation_steps: int = 1
    project: Callable[[Params], Params] | None = None

    def __call__(self, state: TrainState, teacher_params: PyTree, batch: Batch) -> tuple[TrainState, Metrics]:
        """The state and the metrics after one update."""
        training = self.target_training
        arguments = state, teacher_params, batch, jax.random.fold_in(jax.random.key(self.seed), state.step)
        if training is None:
            return self._student(*arguments)
        if training.instant:
            return self._student_on_half(training, *arguments)
        return jax.lax.cond(
            state.step % 2 == 0, functools.partial(self._target, training), self._student, *arguments
        )

    def _student(
        self,
        state: TrainState,
        teacher_params: PyTree,
        batch: Batch,
        key: Array,
        moved: Moved | None = None,
    ) -> tuple[TrainState, Metrics]:
        def mean_loss(params: Params, batch: Batch, key: Array) -> Float[Array, ""]:
            target = moved or state.target_params
            return jnp.mean(self.loss_fn(params, teacher_params, target, batch, key, state.step))

        params, opt_state, metrics = self._descend(
            mean_loss, self.optimizer, state.params, state.opt_state, batch, key
        )
        target_params = state.target_params
        if self.target_decay is not None:
            new = 1 - debiased_decay(self.target_decay, state.step + 1)
            target_params = optax.incremental_update(params, state.target_params, new)
        state = state._replace(
            step=state.step + 1,
            params=params,
            ema_params=optax.incremental_update(params, state.ema_params, 1 - self.ema_decay),
            opt_state=opt_state,
            target_params=target_params,
        )
        return state, metrics

    def _target(
        self,
        training: TargetTraining,
        state: TrainState,
        teacher_params: PyTree,
        batch: Batch,
        key: Array,
    ) -> tuple[TrainState, Metrics]:
        mean_loss = _mean_target_loss(training, state, teacher_params)
        target_params, opt_state, metrics = self._descend(
            mean_loss, training.optimizer, state.target_params, state.target_opt_state, batch, key
        )
        state = state._replace(step=state.step + 1, target_params=target_params, target_opt_state=opt_state)
        return state, metrics

    def _student_on_half(
        self,
        training: TargetTraining,
        state: TrainState,
        teacher_params: PyTree,
        batch: Batch,
        key: Array,
    ) -> tuple[TrainState, Metrics]:
        # Every second example, so that none moves to another device.
        first, second = ({name: array[n::2] for name, array in batch.items()} for n in range(2))
        key_first, key_second = jax.random.split(key)
        mean_loss = _mean_target_loss(training, state, teacher_params)
        gradient_of = functools.partial(jax.grad(mean_loss), state.target_params)
        gradient = accumulated(gradient_of, second, key_second, parts=self.accumulation_steps)
        change, opt_state = training.optimizer.update(gradient, state.target_opt_state, state.target_params)
        state = state._replace(target_opt_state=opt_state)
        return self._student(state, teacher_params, first, key_first, Moved(state.target_params, change))

    def _descend(
        self,
        mean_loss: MeanLoss,
        optimizer: optax.GradientTransformation,
        params: Params,
        opt_state: optax.OptState,
        batch: Batch,
        key: Array,
    ) -> tuple[Params, optax.OptState, Metrics]:
        """One step of an optimizer down the gradient."""
        value_and_grad = functools.partial(jax.value_and_grad(mean_loss), params)
        loss, gradient = accumulated(value_and_grad, batch, key, parts=self.accumulation_steps)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        params = optax.apply_updates(params, updates)
        if self.project is not None:
            params = self.project(params)
        return params, opt_state, {"loss": loss, "gradient_norm": optax.tree.norm(gradient)}


def _mean_target_loss(training: TargetTraining, state: TrainState, teacher_params: PyTree) -> MeanLoss:
    return lambda target_params, batch, key: jnp.mean(
        training.loss_fn(state.params, teacher_params, target_params, batch, key, state.step)
    )


def accumulated(
    value_and_grad: Callable[[Batch, Array], T],
    batch: Batch,
    key: Array,
    *,
    parts: int,
) -> T:
    """Mean of value_and_grad(part, key) over equal parts of the batch, which saves memory.

    Part i contains the examples i, i + parts, ..., so that no example moves to another device, and uses the
    key fold_in(key, i). With parts=1, the whole batch is used with `key` itself.
    """
    if parts == 1:
        return value_and_grad(batch, key)
    stacked = {
        name: array.reshape(-1, parts, *array.shape[1:]).swapaxes(0, 1) for name, array in batch.items()
    }

    def add(total: PyTree, part: tuple[Batch, Array]) -> tuple[PyTree, None]:
        examples, index = part
        new = value_and_grad(examples, jax.random.fold_in(key, index))
        return jax.tree.map(jnp.add, total, new), None

    shapes = jax.eval_shape(value_and_grad, jax.tree.map(lambda array: array[0], stacked), key)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    total, _ = jax.lax.scan(add, zeros, (stacked, jnp.arange(parts)))
    return jax.tree.map(lambda leaf: leaf / parts, total)


def debiased_decay(decay: float, update: Array) -> Float[Array, ""]:
    """m (1 - m^(k-1)) / (1 - m^k): the decay in update k >= 1 that makes the average bias-corrected.

    The average is then sum_j m^(k-j) theta_j / sum_j m^(k-j) over the parameters theta_j after updates
    j = 1..k, independent of its initial value.
    """
    if decay == 0:
        return jnp.zeros(())
    k = update.astype(jnp.float32)
    # expm1 is accurate for slow averages, where m^k is close to 1.
    return decay * jnp.expm1((k - 1) * math.log(decay)) / jnp.expm1(k * math.log(decay))
