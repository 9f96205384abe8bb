"""Compiles a config's program for a TPU slice and formats plans; used by the command `plan`."""

import dataclasses
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import ml_collections

from mcm_jax.records import JsonObject
from mcm_jax.system import json_text
from mcm_jax.system.errors import InputError, reason
from mcm_jax.system.files import read_bytes
from mcm_jax.system.paths import Path

if TYPE_CHECKING:  # Slow to import.
    from mcm_jax.config.settings import Config
    from mcm_jax.models.conditions import Condition
    from mcm_jax.planning.compilation import Plan, TooLarge
    from mcm_jax.planning.computations import Program
    from mcm_jax.planning.topologies import Topology

# The keys of `computations.PROGRAMS`.
PROGRAMS = ("train", "sample", "features")


# The batch size of the paper's published speeds.
_PUBLISHED_BATCH = 2048


_COSTLIEST = 10


def plan(
    raw_config: ml_collections.ConfigDict,
    topology: str,
    *,
    program: str = "train",
    num_classes: int | None = None,
) -> tuple[JsonObject, str, str]:
    """Compiles a program of the config for a TPU slice; if it does not fit, searches for settings that do.

    Args:
      topology: name of the slice, such as "v5e:8x8".
      program: one of PROGRAMS.
      num_classes: number of classes of the data set; None: see `computations.condition`.

    Returns:
      (record, report, text): the outputs for --json, the terminal and --hlo.

    Raises:
      InputError: the config or the topology is invalid, or libtpu is not installed.
    """
    # Slow to import; --help and misspelt flags should not wait for it.
    import jax.numpy as jnp

    from mcm_jax.config import validation
    from mcm_jax.models import attention
    from mcm_jax.models.conditions import Classes
    from mcm_jax.planning import compilation, computations, report, topologies
    from mcm_jax.reporting import paper

    described = topologies.describe(topology)
    if raw_config.objective != "diffusion" and raw_config.teacher_checkpoint is None:
        raw_config = raw_config.copy_and_resolve_references()
        # Never read: only shapes matter, and they follow from the student's.
        raw_config.teacher_checkpoint = "any"
    config = validation.validate(raw_config)
    if num_classes is not None and config.data.encoder is not None:
        raise InputError("--num_classes applies only to configs without config.data.encoder; remove it")
    condition = computations.condition(config) if num_classes is None else Classes(num_classes)
    size, compiled = _compile(program, config, described, condition)
    fitting = None
    if not compiled.fits(described.chip):
        for name, smaller in _smaller(program, config, described.num_chips):
            print(f"does not fit; trying {name}", file=sys.stderr, flush=True)
            if _compile(program, smaller, described, condition)[1].fits(described.chip):
                fitting = name
                break
    published = None
    if (program, size.images, described.chip.name) == ("train", _PUBLISHED_BATCH, "v5e"):
        published = paper.steps_per_second(
            num_params=size.num_params,
            resolution=config.data.resolution,
            objective=config.objective,
            num_chips=described.num_chips,
        )
    unfused = None
    if isinstance(compiled, compilation.Plan) and any(one.attention for one in compiled.operations):
        unfused = compilation.seconds_unfused(
            compiled, attention.einsum, described, dtype=jnp.dtype(config.network.dtype)
        )
    record = report.record(
        compiled,
        described,
        program=program,
        num_params=size.num_params,
        images=size.images,
        accumulation_steps=config.training.accumulation_steps if program == "train" else 1,
        published=published,
        fitting=fitting,
        seconds_unfused=unfused,
    )
    text = "" if isinstance(compiled, compilation.TooLarge) else compiled.text
    return record, report.as_text(compiled, record, described, costliest=_COSTLIEST), text


def _compile(
    program: str, config: "Config", topology: "Topology", condition: "Condition"
) -> "tuple[Program, Plan | TooLarge]":
    """Builds and compiles the same program that `train` or `evaluate` runs."""
    from mcm_jax.planning import compilation, computations

    built = computations.PROGRAMS[program](config, topology.devices, condition=condition)
    package = pathlib.Path(__file__).parents[1]
    return built, compilation.plan(
        built.function, built.arguments, topology, mesh=built.mesh, package=package
    )


def _smaller(program: str, config: "Config", num_chips: int) -> "Iterator[tuple[str, Config]]":
    """Yields cumulative changes to try when a program does not fit, the cheapest first."""
    changes = []
    if program == "features":
        return  # Its batch size is not configurable.
    if program == "sample":
        images = config.sampling.batch_per_device // 2
        while images:
            changes.append(("sampling", "batch_per_device", images))
            images //= 2
        yield from _changed(config, changes)
        return
    from mcm_jax.config.settings import ARCHITECTURES

    if config.network.remat != "full":
        changes.append((ARCHITECTURES[config.architecture], "remat", "full"))
    if config.mesh.fsdp != num_chips:
        if config.mesh.data != -1:
            changes.append(("mesh", "data", -1))
        changes.append(("mesh", "fsdp", num_chips))
    parts = 2 * config.training.accumulation_steps
    while config.training.batch_size % (parts * num_chips) == 0:
        changes.append(("training", "accumulation_steps", parts))
        parts *= 2
    yield from _changed(config, changes)


def _changed(
    config: "Config", changes: Sequence[tuple[str, str, int | str]]
) -> "Iterator[tuple[str, Config]]":
    """Yields (flags, config) after each of the changes (section, field, value)."""
    named = {}
    for section, field, value in changes:
        config = dataclasses.replace(
            config, **{section: dataclasses.replace(getattr(config, section), **{field: value})}
        )
        named[f"--config.{section}.{field}"] = value
        if field == "data":
            continue  # Only meaningful together with the next change.
        yield " ".join(f"{name}={given}" for name, given in named.items()), config


def table(directory: Path) -> str:
    """Formats the records that --json wrote into a directory as a Markdown table.

    Raises:
      InputError: the directory contains no records, or a file that is not a record.
    """
    from mcm_jax.planning import table as tables

    return tables.table(_records(directory, "--table", tables.table))


def scaling(directory: Path) -> str:
    """Formats the same records as tables of scaling with the number of chips; raises as `table`."""
    from mcm_jax.planning import table as tables

    return tables.scaling(_records(directory, "--scaling", tables.scaling))


def _records(directory: Path, flag: str, show: Callable[[Sequence[JsonObject]], str]) -> list[JsonObject]:
    """Reads all records in a directory and checks that `show` can format each."""
    files = sorted(directory.glob("*.json"))
    if not files:
        raise InputError(
            f"{flag}={directory} contains no plans (*.json); write one with --json={directory}/NAME.json"
        )
    records = []
    for file in files:
        try:
            records.append(json_text.loads(read_bytes(file)))
            show(records[-1:])
        except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
            why = f"{type(error).__name__}: {reason(error)}"
            raise InputError(
                f"{file} is not the record of a plan ({why}); remove it or write it again"
            ) from error
    return records
