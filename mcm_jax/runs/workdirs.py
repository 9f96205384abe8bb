"""What a run's directory holds besides checkpoints: its config and its data set's description.

run.json      config and data set, written when the run starts or continues
checkpoints/  see training.checkpoints
samples/      a grid of samples every now and then
evaluation/   results and their grids
xla_cache/    compiled programs, so that a second start is fast
"""

import dataclasses
import hashlib
import json
import os
import shutil
from pathlib import Path

from mcm_jax import fields
from mcm_jax.config import validation
from mcm_jax.config.settings import Config
from mcm_jax.config.upgrade import upgraded
from mcm_jax.data.layout import DatasetInfo
from mcm_jax.fields import Affects
from mcm_jax.records import RUN_FILE
from mcm_jax.system import distributed, files
from mcm_jax.system.errors import InputError

CHECKPOINTS = "checkpoints"
_NOTE = "_CHECKPOINT_METADATA"


def checkpoint_identity(workdir: Path, step: int) -> str | None:
    """A hash that tells a checkpoint from another of the same step: of Orbax's note of it, with its time.

    It goes along when the directory is copied. None where there is no such note.
    """
    try:
        return hashlib.sha256((workdir / CHECKPOINTS / str(step) / _NOTE).read_bytes()).hexdigest()
    except OSError:
        return None


def started(workdir: Path, config: Config) -> DatasetInfo | None:
    """The data set of the run that was started in `workdir` with this config; None if none was.

    Raises:
      InputError: the run there has another config, or its file is damaged.
    """
    if not (workdir / RUN_FILE).exists():
        return None
    saved_config, dataset = read(workdir)
    _check_same(workdir, config, saved_config)
    return dataset


def claim(
    workdir: Path, config: Config, dataset: DatasetInfo, *, trained_on: DatasetInfo | None, needed_bytes: int
) -> None:
    """Makes `workdir` this run's, or makes sure that it goes on there with the same images.

    Settings that may change (where the data lies, how to sample) are kept as they are now. Several processes
    call it together, the first one writes.

    Args:
      trained_on: what `started` said.
      needed_bytes: what the checkpoints will take at most.

    Raises:
      InputError: the directory can't be written, has no room, was trained on other images, or is not the same
        one for all processes.
    """
    with distributed.together():
        _check_place(workdir, dataset, trained_on=trained_on, needed_bytes=needed_bytes)
    distributed.require_shared(workdir, "--workdir")
    with distributed.together():
        if distributed.is_first():
            _write(workdir, config, dataset)


def _check_place(
    workdir: Path, dataset: DatasetInfo, *, trained_on: DatasetInfo | None, needed_bytes: int
) -> None:
    """Raises as `claim`."""
    files.require_writable(workdir, "--workdir")
    free = shutil.disk_usage(workdir).free
    if free < needed_bytes:
        raise InputError(
            f"--workdir={workdir} has {free / 1e9:.3f} GB free and its checkpoints need "
            f"{needed_bytes / 1e9:.3f} GB; make room or choose another directory"
        )
    if trained_on is None and (workdir / CHECKPOINTS).exists():
        raise InputError(f"--workdir={workdir} has checkpoints but no {RUN_FILE}; choose another directory")
    if trained_on is not None and trained_on.fingerprints != dataset.fingerprints:
        raise InputError(
            f"--workdir={workdir} was trained on other images than those in {dataset.path} "
            f"(their hashes differ); choose another directory"
        )


def read(workdir: Path, *, data_dir: str | None = None) -> tuple[Config, DatasetInfo]:
    """The config and data set of the run in `workdir`, its data looked for in `data_dir` if given.

    Raises:
      InputError: there is no run, or its file is damaged.
    """
    path = workdir / RUN_FILE
    try:
        content = json.loads(path.read_text())
        config = validation.validate(upgraded(content["config"]))
        dataset = DatasetInfo.from_json(content["dataset"], path=Path(content["dataset"]["path"]))
    except FileNotFoundError:
        stages = ", ".join(sorted(path.parent.name for path in workdir.glob(f"*/{RUN_FILE}")))
        if stages:
            raise InputError(f"{workdir} holds the stages {stages} of a run; name one of these") from None
        raise InputError(f"{workdir} is not a run ({RUN_FILE} is missing); train there first") from None
    except OSError as error:
        raise InputError(f"{path} can't be read ({error.strerror})") from error
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise InputError(f"{path} is damaged ({error}); restore it or train in another directory") from error
    if data_dir is not None:
        data = dataclasses.replace(config.data, data_dir=data_dir)
        config = dataclasses.replace(config, data=data)
    return config, dataset


def compilation_cache(workdir: Path) -> Path:
    """Where compiled programs are kept; MCM_COMPILATION_CACHE names one for several runs."""
    return Path(os.environ.get("MCM_COMPILATION_CACHE", workdir / "xla_cache")).absolute()


def _write(workdir: Path, config: Config, dataset: DatasetInfo) -> None:
    content = {"config": dataclasses.asdict(config), "dataset": dataclasses.asdict(dataset)}
    files.write_whole(workdir / RUN_FILE, json.dumps(content, indent=2, default=str) + "\n")


def _check_same(workdir: Path, config: Config, saved_config: Config) -> None:
    """Raises InputError if the saved config would train other parameters than `config`."""
    saved = fields.flat(saved_config, Affects.TRAINING)
    for name, value in fields.flat(config, Affects.TRAINING).items():
        if name == "training.num_steps" and config.optimizer.decay == "constant":
            # A longer run is the same run, unless the learning rate's decay depends on its length.
            continue
        if name == "teacher_checkpoint" and value is not None and saved[name] is not None:
            same = Path(value).resolve() == Path(saved[name]).resolve()
        else:
            same = value == saved[name]
        if not same:
            raise InputError(
                f"--workdir={workdir} holds a run with config.{name}={saved[name]!r}, now it is "
                f"{value!r}; rerun with the same config to continue it, or choose another directory"
            )
