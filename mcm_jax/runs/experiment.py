"""From a config to the parts of a run: network, schedule, objective, optimizer."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float

from mcm_jax.config.settings import Config
from mcm_jax.diffusion import schedules, segments
from mcm_jax.diffusion.network import ModelFn
from mcm_jax.diffusion.schedules import Schedule
from mcm_jax.models import attention
from mcm_jax.models.network import Network
from mcm_jax.models.placement import Placement
from mcm_jax.models.uvit import Stage, UViTSpec
from mcm_jax.objectives.consistency import consistency_loss
from mcm_jax.objectives.diffusion import diffusion_loss
from mcm_jax.objectives.guidance import guidance_loss
from mcm_jax.objectives.progressive import progressive_loss
from mcm_jax.objectives.tract import tract_loss
from mcm_jax.system import sharding
from mcm_jax.training import optimizer, step

CHANNELS = 3


def build_network(config: Config, *, num_classes: int) -> Network:
    """The UViT of config.model for the images of config.data."""
    model = config.model
    stages = tuple(
        Stage(kind=kind, width=width, blocks=blocks, dropout=dropout)
        for kind, width, blocks, dropout in zip(
            model.kinds, model.widths, model.blocks, model.dropouts, strict=True
        )
    )
    return Network(
        UViTSpec(
            resolution=config.data.resolution,
            channels=CHANNELS,
            num_classes=num_classes,
            stages=stages,
            embedding_width=model.embedding_width,
            head_width=model.head_width,
            mlp_factor=model.mlp_factor,
            resnet_norm=model.resnet_norm,
            noise_scale=model.noise_scale,
            dtype=model.dtype,
            remat=model.remat,
            saved=model.saved,
            unroll=model.unroll,
        )
    )


def build_schedule(config: Config) -> Schedule:
    """The interpolated schedule; the plain or shifted cosine where both its ends are equal."""
    resolution = config.data.resolution
    return schedules.interpolated(
        noise_resolution_low=config.schedule.noise_resolution_low or resolution,
        noise_resolution_high=config.schedule.noise_resolution_high or resolution,
        image_resolution=resolution,
        end_points=config.schedule.end_points,
    )


def build_loss_fn(config: Config, network: Network, *, mesh: Mesh) -> step.LossFn:
    """(params, teacher_params, target_params, batch, key, train_step) -> loss of every example."""
    network = placed(config, network, mesh=mesh)
    placement = network.spec.placement

    def bind(params: Any) -> ModelFn:
        # Gathered once for all that is done with them, not layer by layer and again for the gradient.
        params = sharding.gathered(mesh, network.rounded(params))
        return lambda z_t, logsnr_t, cond, key: placement.constrain(
            network.apply(params, placement.constrain(z_t), logsnr_t, cond, key)
        )

    objective = build_objective(config, null_class=network.null_class)

    def loss_fn(params, teacher_params, target_params, batch, key, train_step):
        return objective(
            bind(params),
            None if teacher_params is None else bind(teacher_params),
            None if target_params is None else bind(target_params),
            batch["image"],
            batch["label"],
            key,
            train_step,
        )

    return loss_fn


def placed(config: Config, network: Network, *, mesh: Mesh) -> Network:
    """The same network on a mesh, told how feature maps lie there and which attention its devices have.

    Feature maps are split by example: unasked the compiler replicates them where parameters are split.
    """
    over_batch = sharding.batch_sharding(mesh)
    attend = attention.einsum
    if config.model.attention == "fused" and mesh.devices.flat[0].platform == "tpu":
        attend = jax.shard_map(
            attention.fused, mesh=mesh, in_specs=over_batch.spec, out_specs=over_batch.spec, check_vma=False
        )
    placement = Placement(
        constrain=functools.partial(jax.lax.with_sharding_constraint, shardings=over_batch),
        attend=attend,
        by_column=functools.partial(sharding.by_column, mesh),
    )
    return dataclasses.replace(network, spec=dataclasses.replace(network.spec, placement=placement))


# (model_fn, teacher_fn, target_fn, x, cond, key, train_step) -> loss of every example; functions that the
# objective has no use for may be None.
ObjectiveFn = Callable[..., Float[Array, "B"]]


def build_objective(config: Config, *, null_class: int) -> ObjectiveFn:
    """What config.objective minimises, as a function of networks and a batch; null_class: 'any class'."""
    build = {
        "diffusion": _diffusion,
        "cd": _consistency,
        "ct": _consistency,
        "tract": _tract,
        "progressive": _progressive,
        "guidance": _guidance,
    }[config.objective]
    return build(config, build_schedule(config), null_class)


def _diffusion(config: Config, schedule: Schedule, null_class: int) -> ObjectiveFn:
    loss = functools.partial(
        diffusion_loss,
        schedule=schedule,
        label_dropout=config.diffusion.label_dropout,
        null_class=null_class,
        levels=config.diffusion.levels,
        level_weights=config.diffusion.level_weights,
    )
    return lambda model_fn, teacher_fn, target_fn, x, cond, key, train_step: loss(model_fn, x, cond, key)


def _consistency(config: Config, schedule: Schedule, null_class: int) -> ObjectiveFn:
    settings = config.consistency
    teacher_steps = functools.partial(
        segments.annealed_teacher_steps,
        first=settings.teacher_steps_first,
        last=settings.teacher_steps_last,
        anneal_steps=settings.anneal_steps,
    )
    loss = functools.partial(
        consistency_loss,
        schedule=schedule,
        student_steps=settings.student_steps,
        teacher_step=settings.teacher_step,
        xvar_frac=settings.xvar_frac,
        teacher_guidance=config.teacher_guidance,
        null_class=null_class,
        huber_epsilon=settings.huber_epsilon,
        reduction=settings.huber_reduction,
        **_loss_weight(config),
    )
    return lambda model_fn, teacher_fn, target_fn, x, cond, key, train_step: loss(
        model_fn, teacher_fn, x, cond, key, target_fn=target_fn, teacher_steps=teacher_steps(train_step)
    )


def _tract(config: Config, schedule: Schedule, null_class: int) -> ObjectiveFn:
    teacher_steps, student_steps = config.consistency.stages
    loss = functools.partial(
        tract_loss,
        schedule=schedule,
        student_steps=student_steps,
        teacher_steps=teacher_steps,
        **_loss_weight(config),
    )
    return lambda model_fn, teacher_fn, target_fn, x, cond, key, train_step: loss(
        model_fn, teacher_fn, target_fn, x, cond, key
    )


def _progressive(config: Config, schedule: Schedule, null_class: int) -> ObjectiveFn:
    settings = config.consistency
    loss = functools.partial(
        progressive_loss,
        schedule=schedule,
        student_steps=settings.stages[1],
        teacher_step=settings.teacher_step,
        xvar_frac=settings.xvar_frac,
        **_loss_weight(config),
    )
    return lambda model_fn, teacher_fn, target_fn, x, cond, key, train_step: loss(
        model_fn, teacher_fn, x, cond, key
    )


def _guidance(config: Config, schedule: Schedule, null_class: int) -> ObjectiveFn:
    loss = functools.partial(
        guidance_loss, schedule=schedule, teacher_guidance=config.teacher_guidance, null_class=null_class
    )
    return lambda model_fn, teacher_fn, target_fn, x, cond, key, train_step: loss(
        model_fn, teacher_fn, x, cond, key
    )


def _loss_weight(config: Config) -> dict[str, str]:
    """Where the config names none, every objective has its own default."""
    kind = config.consistency.loss_weight
    return {} if kind is None else {"loss_weight": kind}


def distils(config: Config) -> bool:
    """Whether the objective calls a teacher while it trains."""
    return config.objective not in ("diffusion", "ct")


def target_decay(config: Config) -> float | None:
    """Decay of the target network's average; None where x_ref is the student's own."""
    decay = config.consistency.target_decay
    if config.objective == "tract":
        return 0.5 if decay is None else decay
    if config.objective in ("cd", "ct") and config.consistency.target_network == "ema":
        return 0.95 if decay is None else decay
    return None


def build_optimizer(config: Config) -> optax.GradientTransformation:
    """Adam with this run's learning rate schedule."""
    settings = config.optimizer
    learning_rate = optimizer.learning_rate_schedule(
        peak=settings.learning_rate,
        warmup_steps=settings.warmup_steps,
        decay=settings.decay,
        num_steps=config.training.num_steps,
    )
    return optimizer.adam(
        learning_rate,
        b1=settings.b1,
        b2=settings.b2,
        eps=settings.eps,
        clip_norm=settings.clip_norm,
    )


def init_key(seed: int) -> jax.Array:
    """The key of the fresh parameters, apart from the updates' fold_in(key(seed), 0), 1, ..."""
    return jax.random.fold_in(jax.random.key(seed), 2**31)
