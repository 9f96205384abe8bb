"""From a config to the parts of a run: network, schedule, objective, optimizer."""

import functools
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from mcm_jax.configuration import Config
from mcm_jax.diffusion import schedules, segments
from mcm_jax.diffusion.network import ModelFn
from mcm_jax.diffusion.schedules import Schedule
from mcm_jax.models.network import Network
from mcm_jax.models.uvit import Stage, UViTSpec
from mcm_jax.objectives.consistency import consistency_loss
from mcm_jax.objectives.diffusion import diffusion_loss
from mcm_jax.training import optimizer, sharding, step

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
    """(params, teacher_params, batch, key, train_step) -> loss of every example."""
    schedule = build_schedule(config)
    over_batch = sharding.batch_sharding(mesh)

    def bind(params: Any) -> ModelFn:
        # Without the constraints the compiler may replicate activations where parameters are split.
        constrain = functools.partial(jax.lax.with_sharding_constraint, shardings=over_batch)
        return lambda z_t, logsnr_t, cond, key: constrain(
            network.apply(params, constrain(z_t), logsnr_t, cond, key)
        )

    def diffusion(params, teacher_params, batch, key, train_step):
        del teacher_params, train_step
        return diffusion_loss(bind(params), batch["image"], batch["label"], key, schedule=schedule)

    def consistency(params, teacher_params, batch, key, train_step):
        settings = config.consistency
        return consistency_loss(
            bind(params),
            bind(teacher_params) if config.objective == "cd" else None,
            batch["image"],
            batch["label"],
            key,
            schedule=schedule,
            student_steps=settings.student_steps,
            teacher_steps=segments.annealed_teacher_steps(
                train_step,
                first=settings.teacher_steps_first,
                last=settings.teacher_steps_last,
                anneal_steps=settings.anneal_steps,
            ),
            teacher_step=settings.teacher_step,
            xvar_frac=settings.xvar_frac,
            huber_epsilon=settings.huber_epsilon,
            loss_weight=settings.loss_weight,
        )

    return diffusion if config.objective == "diffusion" else consistency


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
