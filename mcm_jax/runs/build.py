"""Builds the network, schedule, loss, optimizer and train step that a config describes."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float

from mcm_jax.config.settings import Config
from mcm_jax.data.layout import DatasetInfo
from mcm_jax.diffusion import schedules
from mcm_jax.diffusion.conditions import Cond
from mcm_jax.diffusion.network import ModelFn
from mcm_jax.diffusion.schedules import Schedule
from mcm_jax.models import attention, edm2
from mcm_jax.models.conditions import Captions, Classes, Condition
from mcm_jax.models.network import Network
from mcm_jax.models.placement import Placement
from mcm_jax.objectives.continuous import Continuous
from mcm_jax.objectives.flow_map import FlowMap
from mcm_jax.objectives.moments import Moments
from mcm_jax.objectives.objective import Networks, Objective
from mcm_jax.system import sharding
from mcm_jax.training import optimizer, step
from mcm_jax.training.state import Moved, Params, TeacherParams, TrainState

CHANNELS = 3
# Names of the networks' parts that consist of blocks.
_BLOCKS = ("blocks", "encoder", "decoder")


def image_shape(config: Config) -> tuple[int, int, int]:
    """(height, width, channels)."""
    return (config.data.resolution, config.data.resolution, CHANNELS)


def condition(dataset: DatasetInfo) -> Condition:
    """What the data set's images are conditioned on."""
    encoding = dataset.encoding
    if encoding is None:
        return Classes(dataset.num_classes)
    return Captions(encoding.length, encoding.width, encoding.pooled_width)


def network(config: Config, *, condition: Condition) -> Network:
    """The network that the config describes, for images of config.data."""
    return Network(config.network, image_shape(config), condition, takes_end=config.takes_end)


def schedule(config: Config) -> Schedule:
    """Karras's schedule, or the interpolated one: a plain or shifted cosine if its resolutions are equal."""
    if config.schedule.kind == "karras":
        return schedules.karras(logsnr_min=config.schedule.logsnr_min, logsnr_max=config.schedule.logsnr_max)
    resolution = config.data.resolution
    return schedules.interpolated(
        noise_resolution_low=config.schedule.noise_resolution_low or resolution,
        noise_resolution_high=config.schedule.noise_resolution_high or resolution,
        image_resolution=resolution,
        end_points=config.schedule.end_points,
        logsnr_min=config.schedule.logsnr_min,
        logsnr_max=config.schedule.logsnr_max,
    )


def loss_fn(
    config: Config,
    network: Network,
    *,
    guide: Network | None = None,
    mesh: Mesh,
    objective: Objective | None = None,
) -> step.LossFn:
    """Returns (params, teacher_params, target_params, batch, key, train_step) -> loss of each example.

    Args:
      network: the student's network; the teacher's is the same, without the end of a step.
      guide: that of the model that guidance leads away from, `placed`; None: the teacher itself.
      objective: computes the loss from the networks; None: config.loss.
    """
    objective = objective or config.loss
    network = placed(config, network, mesh=mesh)
    tangent_network = dataclasses.replace(network, placement=network.placement.with_forward_derivative)

    def bind(network: Network, params: Params | Moved) -> ModelFn:
        # Gathers once per update; otherwise the compiler gathers layers twice, for the loss and the gradient.
        later = _BLOCKS if config.mesh.gather == "blocks" else ()
        constrain = network.placement.constrain

        def gathered(params: Params) -> Params:
            return sharding.gathered(mesh, network.rounded(params), without=later)

        def apply(
            params: Params,
            z_t: Float[Array, "B ..."],
            logsnr_t: Float[Array, " B"],
            cond: Cond,
            key: Array | None,
            logsnr_u: Float[Array, " B"] | None = None,
        ) -> Float[Array, "B ..."]:
            return constrain(network.apply(params, constrain(z_t), logsnr_t, cond, key, logsnr_u))

        if isinstance(params, Moved):
            return first_order(apply, Moved(*map(gathered, params)))
        return functools.partial(apply, gathered(params))

    def loss_fn(
        params: Params,
        teacher_params: TeacherParams | None,
        target_params: Params | Moved,
        batch: step.Batch,
        key: Array,
        train_step: Array,
    ) -> Float[Array, " B"]:
        teacher, guide_params = teacher_params or TeacherParams(None)
        target = None
        if isinstance(config.loss, Continuous | FlowMap):
            target = bind(tangent_network, jax.lax.stop_gradient(params))
        elif target_params is not None:
            moved = isinstance(target_params, Moved)
            target = bind(tangent_network if moved else network, target_params)
        networks = Networks(
            student=bind(network, params),
            teacher=None if teacher is None else bind(network.without_end, teacher),
            guide=None if guide is None else bind(guide, guide_params),
            target=target,
            schedule=schedule(config),
            null_cond=network.condition.null,
        )
        return objective(networks, batch["image"], network.condition.of(batch), key, train_step)

    return loss_fn


def first_order(apply: Callable[..., Float[Array, "B ..."]], moved: Moved) -> ModelFn:
    """v(theta) + (dv / dtheta) change: the network at `moved`, by forward differentiation.

    Args:
      apply: computes v of (parameters, z_t, logsnr_t, cond, key).
    """

    def model_fn(
        z_t: Float[Array, "B ..."], logsnr_t: Float[Array, " B"], cond: Cond, key: Array | None
    ) -> Float[Array, "B ..."]:
        v, v_change = jax.jvp(
            lambda params: apply(params, z_t, logsnr_t, cond, key), (moved.params,), (moved.change,)
        )
        return v + v_change

    return model_fn


def optimizers(config: Config) -> tuple[optax.GradientTransformation, optax.GradientTransformation | None]:
    """The optimizers of the student and of a target network that is trained in turn; None if none is."""
    settings, loss, num_steps = config.optimizer, config.loss, config.training.num_steps
    if not isinstance(loss, Moments):
        return optimizer.adam(settings, num_steps=num_steps), None
    target_settings = dataclasses.replace(
        settings,
        learning_rate=loss.target_rate * settings.learning_rate,
        # Each change starts anew: only the second moments carry over.
        b1=0.0 if loss.instant else settings.b1,
    )
    student, target = (
        optimizer.adam(each, num_steps=num_steps, turns=1 if loss.instant else 2)
        for each in (settings, target_settings)
    )
    return student, target


def target_training(
    config: Config, loss_of: Callable[[Objective], step.LossFn]
) -> step.TargetTraining | None:
    """How a target network is trained in turn with the student; None if none is.

    Args:
      loss_of: makes a `step.LossFn` of an objective.
    """
    _, target_optimizer = optimizers(config)
    if target_optimizer is None or not isinstance(config.loss, Moments):
        return None
    return step.TargetTraining(
        loss_of(config.loss.target_loss), target_optimizer, instant=config.loss.instant
    )


def placed(config: Config, network: Network, *, mesh: Mesh) -> Network:
    """The same network placed on a mesh: feature maps are sharded by example, attention suits the devices.

    Without these constraints the compiler replicates feature maps where parameters are sharded.
    """
    over_batch = sharding.batch_sharding(mesh)
    attend = attention.einsum
    kernel = attention.fused(sharding.kernel_platform(mesh))
    if config.network.attention == "fused" and kernel is not None:
        spec = over_batch.spec
        attend = jax.shard_map(kernel, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    placement = Placement(
        constrain=functools.partial(jax.lax.with_sharding_constraint, shardings=over_batch),
        attend=attend,
        by_column=functools.partial(sharding.by_column, mesh),
    )
    if config.mesh.gather == "blocks":
        gather = functools.partial(sharding.gathered, mesh)
        placement = dataclasses.replace(placement, gather_block=gather)
    return dataclasses.replace(network, placement=placement)


def init_key(seed: int) -> jax.Array:
    """The key for initial parameters, distinct from the updates' keys fold_in(key(seed), 0), 1, ..."""
    return jax.random.fold_in(jax.random.key(seed), 2**31)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """The parts of a config's training on a mesh. Nothing is computed yet."""

    config: Config
    mesh: Mesh
    network: Network
    optimizer: optax.GradientTransformation
    abstract: TrainState  # shapes and dtypes of a state
    shardings: TrainState  # shardings of its arrays
    guide: Network | None = None  # of the model that guidance leads away from; None: the teacher itself

    @property
    def abstract_teacher(self) -> TeacherParams | None:
        """The parameters that every update reads; None if the objective distils no teacher."""
        if not self.config.distils:
            return None
        guide = None if self.guide is None else self.guide.abstract_params
        return TeacherParams(self.network.without_end.abstract_params, guide)

    @property
    def teacher_shardings(self) -> TeacherParams | None:
        """The shardings of `abstract_teacher`: the teacher's are those of the student."""
        return sharding.params_sharding(self.mesh, self.abstract_teacher)

    def init(self, key: jax.Array) -> TrainState:
        """Returns a state with newly initialized parameters."""
        return self._jit(lambda key: self._state(self.network.init(key)))(key)

    def init_from(self, params: Params) -> TrainState:
        """Returns the state before the first update, with these parameters of a teacher."""
        key = init_key(self.config.seed)
        return self._jit(lambda params: self._state(self.network.init_from(key, params)))(params)

    def train_step(self) -> jax.stages.Wrapped:
        """Returns the jitted update."""
        config = self.config

        def loss_of(objective: Objective) -> step.LossFn:
            return loss_fn(config, self.network, guide=self.guide, mesh=self.mesh, objective=objective)

        update = step.Update(
            loss_fn=loss_of(config.loss),
            optimizer=self.optimizer,
            ema_decay=config.optimizer.ema_decay,
            seed=config.seed,
            target_decay=config.target_decay,
            target_training=target_training(config, loss_of),
            accumulation_steps=config.training.accumulation_steps,
            project=edm2.normalised if config.architecture == "edm2" else None,
        )
        return step.make_train_step(
            update,
            mesh=self.mesh,
            state_sharding=self.shardings,
            teacher_sharding=self.teacher_shardings,
        )

    def _state(self, params: Params) -> TrainState:
        return step.init_state(
            params,
            self.optimizer,
            target_decay=self.config.target_decay,
            target_optimizer=optimizers(self.config)[1],
        )

    def _jit(self, init: Callable[..., TrainState]) -> Callable[..., TrainState]:
        return jax.jit(init, out_shardings=self.shardings)


def training(config: Config, *, condition: Condition, mesh: Mesh, guide: Config | None = None) -> Training:
    """The network, optimizer and abstract state that the config describes.

    Args:
      guide: the config of the run at config.guide_checkpoint.
    """
    built = network(config, condition=condition)
    adam, target_optimizer = optimizers(config)
    init_state = functools.partial(
        step.init_state,
        optimizer=adam,
        target_decay=config.target_decay,
        target_optimizer=target_optimizer,
    )
    abstract = jax.eval_shape(init_state, built.abstract_params)
    if guide is not None:
        guide = dataclasses.replace(guide, mesh=config.mesh)
    return Training(
        config=config,
        mesh=mesh,
        network=built,
        optimizer=adam,
        abstract=abstract,
        shardings=sharding.params_sharding(mesh, abstract),
        guide=None if guide is None else placed(guide, network(guide, condition=condition), mesh=mesh),
    )
