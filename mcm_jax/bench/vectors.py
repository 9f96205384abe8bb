"""Trains and samples on a closed-form mixture, with every objective and an exact or a trained teacher."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mcm_jax.config.settings import Config
from mcm_jax.diffusion import mixtures, sampling, schedules
from mcm_jax.diffusion.mixtures import Mixture
from mcm_jax.diffusion.network import ModelFn
from mcm_jax.models.mlp import MLPSettings
from mcm_jax.models.network import Network, Params
from mcm_jax.objectives.objective import Networks, Objective
from mcm_jax.runs import build
from mcm_jax.training import step
from mcm_jax.training.state import Moved, TrainState

# Distinct from the numbers folded in for the updates: fold_in(key(seed), 0), fold_in(key(seed), 1), ...
_DATA = 2**31 + 1


@dataclasses.dataclass(frozen=True)
class VectorRun:
    """A network for vectors with the averaged (EMA) parameters of one training."""

    config: Config
    network: Network
    params: Params

    @property
    def model_fn(self) -> ModelFn:
        """The network's v_hat with the averaged parameters, which are the leaves of a pytree."""
        return jax.tree_util.Partial(self.network.apply, self.params)

    def sample(self, num: int, *, seed: int, num_steps: int) -> Float[Array, "num dimension"]:
        """Draws samples by DDIM on the uniform grid of the config's schedule, as `sample` does."""
        return sample(
            self.model_fn,
            self.network.shape[0],
            num,
            seed=seed,
            num_steps=num_steps,
            schedule=build.schedule(self.config),
            takes_end=self.network.takes_end,
        )


def train(
    config: Config,
    model: MLPSettings,
    mixture: Mixture,
    *,
    start: Params | None = None,
    teacher: Params | None = None,
) -> VectorRun:
    """Runs all config.training.num_steps updates in one compiled loop, each on new samples of the mixture.

    Args:
      config: only the objective and its settings, schedule, optimizer, training and seed are used.
      model: the sizes of the network.
      mixture: the data distribution.
      start: initial parameters, those of a diffusion model; None: newly initialised ones.
      teacher: the parameters of a trained teacher; None: the mixture's exact denoiser.
    """
    network = Network(model, (mixture.means.shape[0],), takes_end=config.takes_end)
    exact = mixtures.model_fn(mixture)

    def bind(params: Params, network: Network = network) -> ModelFn:
        return functools.partial(network.apply, params)

    def loss_fn(
        objective: Objective,
        params: Params,
        teacher_params: Params | None,
        target_params: Params | Moved | None,
        batch: step.Batch,
        key: Array,
        train_step: Array,
    ) -> Float[Array, " B"]:
        teacher_fn = exact if teacher_params is None else bind(teacher_params, network.without_end)
        if isinstance(target_params, Moved):
            target = build.first_order(network.apply, target_params)
        else:
            target = None if target_params is None else bind(target_params)
        networks = Networks(
            student=bind(params),
            teacher=teacher_fn if config.distils else None,
            target=target,
            schedule=build.schedule(config),
            null_cond=network.condition.null,
        )
        return objective(networks, batch["image"], batch["label"], key, train_step)

    adam, target_optimizer = build.optimizers(config)
    target_training = build.target_training(config, lambda objective: functools.partial(loss_fn, objective))
    batch_size = config.training.batch_size

    # The seed is an argument, so that other seeds find the compiled program in the cache.
    @jax.jit
    def run(
        start: Params, teacher: Params | None, seed: Int[Array, ""]
    ) -> tuple[Params, Float[Array, " num_steps"]]:
        update = step.Update(
            loss_fn=functools.partial(loss_fn, config.loss),
            optimizer=adam,
            ema_decay=config.optimizer.ema_decay,
            target_decay=config.target_decay,
            target_training=target_training,
            seed=seed,
        )
        data_key = jax.random.fold_in(jax.random.key(seed), _DATA)

        def one(state: TrainState, n: Array) -> tuple[TrainState, Float[Array, ""]]:
            x = mixtures.sample(mixture, jax.random.fold_in(data_key, n), batch_size)
            batch = {"image": x, "label": jnp.zeros(batch_size, jnp.int32)}
            state, metrics = update(state, teacher, batch)
            return state, metrics["loss"]

        state = step.init_state(
            start, adam, target_decay=config.target_decay, target_optimizer=target_optimizer
        )
        state, losses = jax.lax.scan(one, state, jnp.arange(config.training.num_steps))
        return state.ema_params, losses

    key = build.init_key(config.seed)
    start = network.init(key) if start is None else network.init_from(key, start)
    params, losses = run(start, teacher, jnp.int32(config.seed))
    if not bool(jnp.all(jnp.isfinite(losses))):
        raise FloatingPointError(f"the loss of {config.objective} is not finite")
    return VectorRun(config, network, params)


def sample(
    model_fn: ModelFn,
    dimension: int,
    num: int,
    *,
    seed: int,
    num_steps: int,
    sampler: sampling.Sampler = "ddim",
    schedule: schedules.Schedule | None = None,
    takes_end: bool = False,
) -> Float[Array, "num dimension"]:
    """Draws `num` samples on the uniform grid of `schedule` (None: unshifted cosine), without clipping."""
    schedule = schedule or schedules.cosine()
    logsnr = schedules.uniform_grid(schedule, num_steps)
    logsnr_end = schedule(jnp.zeros(())) if takes_end else None

    # As arguments, so that other models and seeds find the compiled program in the cache.
    @jax.jit
    def run(model_fn: ModelFn, seed: Int[Array, ""]) -> Float[Array, "num dimension"]:
        keys = sampling.image_keys(jax.random.key(seed), jnp.arange(num))
        z_1 = sampling.initial_noise(keys, (dimension,))
        cond = jnp.zeros(num, jnp.int32)
        return sampling.sample(
            model_fn, z_1, cond, keys, logsnr=logsnr, logsnr_end=logsnr_end, sampler=sampler, clip="never"
        )

    return run(as_pytree(model_fn), jnp.int32(seed))


def as_pytree(model_fn: ModelFn) -> jax.tree_util.Partial:
    """The function as an argument of jit; `VectorRun.model_fn` already has its parameters as leaves."""
    return model_fn if isinstance(model_fn, jax.tree_util.Partial) else jax.tree_util.Partial(model_fn)
