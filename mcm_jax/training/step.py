"""One update: loss, gradient, Adam, averaged parameters."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float

from mcm_jax.training import sharding
from mcm_jax.training.state import TrainState

# (params, teacher_params, batch, key, step) -> loss of every example
LossFn = Callable[[Any, Any, dict[str, Array], Array, Array], Float[Array, "B"]]
Metrics = dict[str, Float[Array, ""]]
# (state, teacher_params, batch) -> (state, metrics)
TrainStep = Callable[[TrainState, Any, dict[str, Array]], tuple[TrainState, Metrics]]


def init_state(params: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """A state before the first update, averaging from `params` on; traceable."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        # A copy: both are donated to the step, and one buffer can be donated once.
        ema_params=jax.tree.map(jnp.copy, params),
        opt_state=optimizer.init(params),
    )


def make_train_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    *,
    mesh: Mesh,
    state_sharding: TrainState,
    teacher_sharding: Any,
    ema_decay: float,
    seed: int,
) -> TrainStep:
    """The update, jitted, with the state donated.

    The randomness of update i is fold_in(key(seed), i). Metrics: the loss averaged over the batch, the
    gradient's global norm before clipping.
    """

    def train_step(
        state: TrainState, teacher_params: Any, batch: dict[str, Array]
    ) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)

        def mean_loss(params: Any) -> Float[Array, ""]:
            return jnp.mean(loss_fn(params, teacher_params, batch, key, state.step))

        loss, gradient = jax.value_and_grad(mean_loss)(state.params)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema_params = optax.incremental_update(params, state.ema_params, 1 - ema_decay)
        metrics = {"loss": loss, "gradient_norm": optax.tree.norm(gradient)}
        return TrainState(state.step + 1, params, ema_params, opt_state), metrics

    return jax.jit(
        train_step,
        in_shardings=(state_sharding, teacher_sharding, sharding.batch_sharding(mesh)),
        out_shardings=(state_sharding, sharding.replicated(mesh)),
        donate_argnums=0,
    )
