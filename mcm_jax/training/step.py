"""The train step: loss, gradient, optimizer update, and averaged parameters."""

import functools
import math
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, PyTree

from mcm_jax.system import sharding
from mcm_jax.training.state import Params, TrainState

# (params, teacher_params, target_params, batch, key, step) -> loss of every example; the teacher's parameters
# are any tree that the loss function understands.
Batch = dict[str, Array]
LossFn = Callable[[Params, PyTree, Params, Batch, Array, Array], Float[Array, " B"]]
Metrics = dict[str, Float[Array, ""]]
T = TypeVar("T", bound=PyTree)
# (state, teacher_params, batch) -> (state, metrics)
TrainStep = Callable[[TrainState, PyTree, Batch], tuple[TrainState, Metrics]]


def init_state(
    params: Params, optimizer: optax.GradientTransformation, *, target_decay: float | None = None
) -> TrainState:
    """Returns the state before the first update; all averages start at `params`. Works under jit.

    Args:
      target_decay: see `make_update`; None: there is no target network.
    """
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        # A copy, because both are donated to the step, and a buffer can only be donated once.
        ema_params=jax.tree.map(jnp.copy, params),
        target_params=None if target_decay is None else jax.tree.map(jnp.copy, params),
        opt_state=optimizer.init(params),
    )


def make_train_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    *,
    mesh: Mesh,
    state_sharding: TrainState,
    teacher_sharding: PyTree,
    ema_decay: float,
    target_decay: float | None = None,
    accumulation_steps: int = 1,
    seed: int,
    project: Callable[[Params], Params] | None = None,
) -> jax.stages.Wrapped:
    """Returns `make_update` jitted on a mesh, with the state donated."""
    update = make_update(
        loss_fn,
        optimizer,
        ema_decay=ema_decay,
        target_decay=target_decay,
        accumulation_steps=accumulation_steps,
        seed=seed,
        project=project,
    )
    return jax.jit(
        update,
        in_shardings=(state_sharding, teacher_sharding, sharding.batch_sharding(mesh)),
        out_shardings=(state_sharding, sharding.replicated(mesh)),
        donate_argnums=0,
    )


def make_update(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    *,
    ema_decay: float,
    target_decay: float | None = None,
    accumulation_steps: int = 1,
    seed: int,
    project: Callable[[Params], Params] | None = None,
) -> TrainStep:
    """Returns (state, teacher_params, batch) -> (state, metrics), a pure function for jit or scan.

    Update i uses the key fold_in(key(seed), i). The metrics are the loss averaged over the batch and the
    gradient's global norm before clipping.

    Args:
      ema_decay: decay of the averaged parameters, which are used for sampling.
      target_decay: decay of the target network's bias-corrected average (see `debiased_decay`); None: no
        target network.
      accumulation_steps: number of parts of the batch, processed one after the other (see `accumulated`).
      project: applied to the parameters after every update; None: they stay as they are.
    """

    def update(state: TrainState, teacher_params: PyTree, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)

        def mean_loss(params: Params, batch: Batch, key: Array) -> Float[Array, ""]:
            losses = loss_fn(params, teacher_params, state.target_params, batch, key, state.step)
            return jnp.mean(losses)

        value_and_grad = functools.partial(jax.value_and_grad(mean_loss), state.params)
        loss, gradient = accumulated(value_and_grad, batch, key, parts=accumulation_steps)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        if project is not None:
            params = project(params)
        ema_params = optax.incremental_update(params, state.ema_params, 1 - ema_decay)
        target_params = None
        if target_decay is not None:
            new = 1 - debiased_decay(target_decay, state.step + 1)
            target_params = optax.incremental_update(params, state.target_params, new)
        metrics = {"loss": loss, "gradient_norm": optax.tree.norm(gradient)}
        return TrainState(state.step + 1, params, ema_params, opt_state, target_params), metrics

    return update


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
