"""Checks a config before any long work: every field, then combinations of fields."""

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

import ml_collections

from mcm_jax import fields
from mcm_jax.config.settings import (
    ARCHITECTURES,
    SECTIONS,
    Config,
    ScheduleSettings,
    Staged,
    without_none,
)
from mcm_jax.diffusion import schedules
from mcm_jax.models.adm import ADMSettings
from mcm_jax.models.unet import UNetSettings
from mcm_jax.objectives.consistency import Consistency
from mcm_jax.objectives.continuous import Continuous
from mcm_jax.objectives.flow_map import FlowMap
from mcm_jax.objectives.moments import Moments
from mcm_jax.objectives.multistep import Multistep
from mcm_jax.system.errors import InputError
from mcm_jax.system.paths import checked_path

_Settings = TypeVar("_Settings")


def validate(config: ml_collections.ConfigDict | Mapping[str, Any]) -> Config:
    """Checks all fields and their combinations; uses no device and no file.

    Raises:
      InputError: names the field, its value and the allowed values.
    """
    raw = config.to_dict() if isinstance(config, ml_collections.ConfigDict) else config
    result = _with_checked_paths(_read(Config, raw, prefix=""))
    _check_network(result)
    _check_objective(result)
    _check_schedule(result)
    _check_unused(result, SECTIONS, result.objective)
    _check_unused(result, ARCHITECTURES, result.architecture)
    _check_optimizer(result)
    _check_checkpoints(result)
    return result


def read_saved(raw: Mapping[str, Any]) -> Config:
    """Reads the config of a run that has started; checks only its fields, not their combinations.

    It passed `validate` at the start, perhaps in an older and more lenient version, and must remain readable.
    """
    return _read(Config, raw, prefix="")


def _with_checked_paths(config: Config) -> Config:
    """Expands `~` in the config's paths; raises InputError for paths that cannot be opened."""
    data_dir = str(checked_path(config.data.data_dir, "config.data.data_dir"))
    checkpoints = {
        name: str(checked_path(path, f"config.{name}"))
        for name in ("teacher_checkpoint", "guide_checkpoint")
        if (path := getattr(config, name)) is not None
    }
    data = dataclasses.replace(config.data, data_dir=data_dir)
    return dataclasses.replace(config, data=data, **checkpoints)


def _check_objective(config: Config) -> None:
    objective = config.objective
    if objective != "diffusion" and config.teacher_checkpoint is None:
        raise InputError(
            f"config.teacher_checkpoint is not set: {objective} starts from a trained "
            "teacher; set --config.teacher_checkpoint=DIR to the teacher's workdir"
        )
    if objective == "diffusion" and config.teacher_checkpoint is not None:
        raise InputError(
            f"config.teacher_checkpoint={config.teacher_checkpoint!r} has no effect on a diffusion "
            "model, which is trained from scratch; leave it out"
        )
    section = SECTIONS[objective]
    if isinstance(config.loss, Multistep):
        _check_student_steps(config.loss, objective)
    if isinstance(config.loss, Moments) and config.loss.student_steps is None:
        raise InputError(
            "config.moments.student_steps is not set: specify the student's number of steps, for example "
            "with the config row 'moments,steps=4'"
        )
    if isinstance(config.loss, Continuous | FlowMap):
        _check_differentiable(config)
    if isinstance(config.loss, Moments) and config.loss.instant and config.teacher_guidance > 0:
        raise InputError(
            f"config.moments.teacher_guidance={config.teacher_guidance}: config.moments.instant=True moves "
            "the teacher itself, without guidance; leave one of them out"
        )
    if isinstance(config.loss, Moments) and config.loss.instant and config.mesh.gather == "blocks":
        raise InputError(
            "config.mesh.gather=blocks: config.moments.instant=True differentiates by all parameters at "
            "once; use gather=all"
        )
    if isinstance(config.loss, Staged):
        _check_stages(objective, config.loss.stages)
    if objective == "guidance" and config.teacher_guidance == 0:
        raise InputError(
            "config.guidance.teacher_guidance=0.0: there is no guidance to distil; set it, for example to 0.5"
        )
    if objective == "shortcut" and config.shortcut.smallest_steps.bit_count() != 1:
        raise InputError(
            f"config.shortcut.smallest_steps={config.shortcut.smallest_steps} must be a power of two"
        )
    if isinstance(config.loss, Consistency):
        _check_teacher_grid(config.loss)
    if objective == "ct" and config.consistency.teacher_step == "heun":
        raise InputError(
            "config.consistency.teacher_step=heun has no effect on ct, which has no teacher; leave it out"
        )
    if config.teacher_guidance > 0 and not config.distils:
        raise InputError(
            f"config.{section}.teacher_guidance={config.teacher_guidance} has no effect on {objective}, "
            "which does not distil a teacher; leave it at 0"
        )
    if config.guide_checkpoint is not None and config.teacher_guidance == 0:
        raise InputError(
            f"config.guide_checkpoint={config.guide_checkpoint} has no effect without guidance of a teacher; "
            "set the objective's, such as config.consistency.teacher_guidance, or leave it out"
        )
    if config.sampling.guidance > 0 and not config.supports_guidance:
        raise InputError(
            f"config.sampling.guidance={config.sampling.guidance} needs a diffusion model that was also "
            "trained for 'any class'; train it with config.diffusion.label_dropout=0.1, or use guidance 0"
        )
    for side in config.diffusion.levels:
        if config.data.resolution % side:
            raise InputError(
                f"config.diffusion.levels={config.diffusion.levels!r}: {side} does not divide "
                f"config.data.resolution={config.data.resolution}"
            )


def _check_student_steps(loss: Multistep, objective: str) -> None:
    name, steps = f"config.{SECTIONS[objective]}", loss.student_steps
    if not steps:
        raise InputError(
            f"{name}.student_steps is not set: specify the student's number of steps, for example with the "
            f"config row '{objective},steps=4'"
        )
    if len(set(steps)) < len(steps):
        raise InputError(f"{name}.student_steps={steps!r}: a number appears twice; remove one")
    for power in ("steps_power", "steps_weight_power"):
        if getattr(loss, power) != 0 and not loss.takes_end:
            raise InputError(
                f"{name}.{power}={getattr(loss, power)} has no effect on a student of one number of steps; "
                "leave it at 0"
            )


def _check_differentiable(config: Config) -> None:
    """Refuses networks that change too fast with the noise level to be differentiated by it."""
    if config.architecture == "uvit" and config.model.noise_scale != "smooth":
        raise InputError(
            f"config.model.noise_scale={config.model.noise_scale}: {config.objective} differentiates the "
            "network by the noise level and may diverge with it; train the teacher and the student with "
            "--config.model.noise_scale=smooth"
        )
    if config.architecture == "adm" and config.adm.preconditioning != "edm":
        raise InputError(
            f"config.adm.preconditioning={config.adm.preconditioning}: {config.objective} differentiates the "
            "network by the noise level, with which this one changes too fast; use cd or ct"
        )


def _check_schedule(config: Config) -> None:
    if config.schedule.kind == "karras":
        for name in ("noise_resolution_low", "noise_resolution_high", "end_points"):
            value = getattr(config.schedule, name)
            if value != getattr(ScheduleSettings(), name):
                raise InputError(
                    f"config.schedule.{name}={value!r} has no effect on config.schedule.kind=karras; "
                    "leave it out"
                )
    grid, steps = config.sampling.noise_grid, config.sampling.teacher_steps
    if schedules.is_published(grid) and steps > 2:
        raise InputError(
            f"config.sampling.noise_grid={grid} has noise levels for 1 or 2 steps, not for "
            f"config.sampling.teacher_steps={steps}"
        )


def _check_unused(config: Config, sections: Mapping[str, str], selected: str) -> None:
    """Rejects changed settings in sections that are not the selected one, since they would have no effect."""
    used = sections[selected]
    for section in sorted(set(sections.values()) - {used}):
        changed = getattr(config, section)
        for name, default in fields.flat(type(changed)()).items():
            value = getattr(changed, name)
            if value != default:
                raise InputError(
                    f"config.{section}.{name}={value!r} has no effect on {selected}, whose settings "
                    f"are in config.{used}; leave it out"
                )


def _check_checkpoints(config: Config) -> None:
    every, kept = config.training.checkpoint_every_steps, config.training.keep_every_steps
    if kept % every:
        raise InputError(
            f"config.training.keep_every_steps={kept} keeps nothing unless it is a multiple of "
            f"config.training.checkpoint_every_steps={every}"
        )


def _check_optimizer(config: Config) -> None:
    warmup, updates = config.optimizer.warmup_steps, config.training.num_steps
    if warmup >= updates:
        raise InputError(
            f"config.optimizer.warmup_steps={warmup} must be below config.training.num_steps={updates}; "
            "shorten the warm-up or train longer"
        )


# The settings that have an effect only with some teacher_grid.
_OF_GRIDS = {
    **dict.fromkeys(("teacher_steps_first", "teacher_steps_last", "anneal_steps"), ("annealed", "doubling")),
    **dict.fromkeys(("ect_q", "ect_stages", "ect_stage_steps", "proposal"), ("ect",)),
    **dict.fromkeys(("proposal_mean", "proposal_std"), ("ect",)),
}


def _check_teacher_grid(loss: Consistency) -> None:
    """Raises InputError for a setting that has no effect with this teacher_grid, or does not go with it."""
    grid, default = f"config.consistency.teacher_grid={loss.teacher_grid}", Consistency()
    for name, grids in _OF_GRIDS.items():
        value = getattr(loss, name)
        if loss.teacher_grid not in grids and value != getattr(default, name):
            raise InputError(
                f"config.consistency.{name}={value} has no effect with {grid}; leave it out, or use "
                f"teacher_grid={' or '.join(grids)}"
            )
    if loss.teacher_grid == "ect" and loss.loss_weight == "inverse_gap":
        raise InputError(
            f"config.consistency.loss_weight=inverse_gap needs a grid; with {grid}, steps may be too short "
            "for it, so use edm"
        )
    if loss.teacher_grid == "doubling" and loss.teacher_steps_last < loss.teacher_steps_first:
        raise InputError(
            f"config.consistency.teacher_steps_last={loss.teacher_steps_last} must be at least "
            f"teacher_steps_first={loss.teacher_steps_first} with {grid}"
        )


def _check_stages(objective: str, stages: tuple[int, ...]) -> None:
    name = f"config.{objective}.stages={stages!r}"
    if len(stages) < 2:
        raise InputError(
            f"{name}: {objective} needs the steps of the teacher and of one or more students, for example "
            "(1024, 32, 1)"
        )
    for before, after in zip(stages, stages[1:], strict=False):
        if objective == "progressive" and before != 2 * after:
            raise InputError(f"{name}: each stage must halve the steps, {before} -> {before // 2}")
        if before <= after or before % after:
            raise InputError(
                f"{name}: {before} steps can't be grouped into {after} equal segments; use a smaller divisor"
            )


def _check_network(config: Config) -> None:
    if config.mesh.data == 0:
        raise InputError("config.mesh.data=0: use a positive number, or -1 for all remaining devices")
    network = config.network
    if isinstance(network, UNetSettings):
        _check_unet(config, network)
    else:
        _check_uvit(config)


def _check_unet(config: Config, network: UNetSettings) -> None:
    name = f"config.{config.architecture}"
    levels = len(network.widths)
    if len(network.attention_levels) != levels:
        raise InputError(
            f"{name}.attention_levels={network.attention_levels!r} must have one entry for each of the "
            f"{levels} levels of {name}.widths={network.widths!r}"
        )
    multiple = 2 ** max(levels - 1, 0)
    if levels == 0 or config.data.resolution % multiple:
        raise InputError(
            f"config.data.resolution={config.data.resolution} can't be halved {levels - 1} times for the "
            f"{levels} levels of {name}.widths; use a multiple of {multiple}, or fewer levels"
        )
    if config.data.encoder is not None:
        raise InputError(
            f"config.data.encoder={config.data.encoder!r}: config.architecture={config.architecture!r} "
            "supports class labels only; leave it out"
        )
    for shape in (*network.encoder, *network.decoder):
        heads = network.num_heads(shape.c_out)
        if shape.attention and shape.c_out % heads:
            raise InputError(
                f"{name}: its {heads} attention heads do not divide the width {shape.c_out} in {name}.widths="
                f"{network.widths!r}"
            )
        for width in (shape.c_joined, shape.c_out):
            if isinstance(network, ADMSettings) and width % network.num_groups(width):
                raise InputError(
                    f"{name}.groups={network.groups} and group_width={network.group_width} can't divide "
                    f"{width} channels of a block for {name}.widths={network.widths!r}"
                )
    if network.widths[0] % 2:
        raise InputError(f"{name}.widths={network.widths!r}: the first must be even")


def _check_uvit(config: Config) -> None:
    model, stages = config.model, len(config.model.kinds)
    for name in ("widths", "blocks", "dropouts"):
        if len(getattr(model, name)) != stages:
            raise InputError(
                f"config.model.{name}={getattr(model, name)!r} must have one entry for each of the "
                f"{stages} stages of config.model.kinds={model.kinds!r}"
            )
    multiple = model.patch * 2 ** (stages - 1)
    if stages == 0 or config.data.resolution % multiple:
        patches = "" if model.patch == 1 else f"divided by config.model.patch={model.patch} and "
        raise InputError(
            f"config.data.resolution={config.data.resolution} can't be {patches}halved {stages - 1} times "
            f"for the {stages} stages of config.model.kinds; use a multiple of {multiple}, or fewer stages"
        )
    for kind, width in zip(model.kinds, model.widths, strict=True):
        if kind == "transformer" and width % model.head_width:
            raise InputError(
                f"config.model.head_width={model.head_width} does not divide the transformer width "
                f"{width} in config.model.widths={model.widths!r}"
            )
    if model.resnet_norm == "group":
        # The output's norm has the first stage's width, regardless of that stage's kind.
        for kind, width in zip(("resnet", *model.kinds[1:]), model.widths, strict=True):
            if kind == "resnet" and (width < 4 or width % min(32, width // 4)):
                raise InputError(
                    f"config.model.resnet_norm='group' can't divide {width} in config.model.widths into "
                    f"{max(1, min(32, width // 4))} groups; use a multiple of 128, or 4, 8, 16, ..."
                )
    if model.embedding_width % 2:
        raise InputError(f"config.model.embedding_width={model.embedding_width} must be even")


def _read(kind: type[_Settings], raw: Any, *, prefix: str) -> _Settings:
    assert dataclasses.is_dataclass(kind)
    if not isinstance(raw, Mapping):
        raise InputError(f"config.{prefix.rstrip('.')}={raw!r} must be a section of settings")
    hints = typing.get_type_hints(kind)
    known = {field.name: field for field in dataclasses.fields(kind)}
    for name in raw:
        if name not in known:
            raise InputError(f"config.{prefix}{name} is not a setting; available: {sorted(known)}")
    values = {}
    for name, value in raw.items():
        if dataclasses.is_dataclass(hints[name]):
            values[name] = _read(hints[name], value, prefix=f"{prefix}{name}.")
        else:
            values[name] = _checked(value, hints[name], known[name].metadata, f"{prefix}{name}")
    return kind(**values)


def _checked(value: object, hint: Any, metadata: Mapping[str, Any], name: str) -> object:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):  # Literal[...] | None is a Union
        return None if value is None else _checked(value, without_none(hint), metadata, name)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise InputError(f"config.{name}={value!r} must be a tuple")
        return tuple(_checked(item, arguments[0], metadata, name) for item in value)
    if origin is Literal:
        if value not in arguments:
            raise InputError(f"config.{name}={value!r} must be one of {', '.join(arguments)}")
        return value
    if hint is float and type(value) is int:
        value = float(value)
    if type(value) is not hint:
        raise InputError(f"config.{name}={value!r} must be of type {hint.__name__}")
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"config.{name}={value!r} must be finite")
    low, high = metadata["low"], metadata["high"]
    if low is not None and value < low:
        raise InputError(f"config.{name}={value!r} must be at least {low}")
    if high is not None and value > high:
        raise InputError(f"config.{name}={value!r} must be at most {high}")
    return value
