"""The directory of a run: identifies the run in it and checks whether another run may use it.

run.json      config, data set and the teacher's identity, written when the run starts or continues
lock          locked while a process trains here; names that process
checkpoints/  see training.checkpoints; damaged ones are moved to damaged_checkpoints/
samples/      grids of samples drawn during training
x_var/        measured variances for sampling
evaluation/   results and their grids
xla_cache/    compiled programs, for a fast restart

A folder written by `mcm_jax.export` can be given wherever a run is read: as a run to sample or evaluate, as a
teacher or as a guide. `read`, `steps`, `checkpoint_identity` and `restore_params` know both.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Generator

from mcm_jax import fields
from mcm_jax.config import validation
from mcm_jax.config.settings import Config
from mcm_jax.config.upgrade import upgraded
from mcm_jax.data.layout import DatasetInfo
from mcm_jax.fields import Affects
from mcm_jax.records import EXPORTED_FILE, RUN_FILE, JsonObject, Origin
from mcm_jax.runs import exported
from mcm_jax.system import distributed, files, json_text, locks
from mcm_jax.system.errors import InputError, reason, shortened
from mcm_jax.system.paths import Path, absolute, as_path, checked_path, resolved
from mcm_jax.training.checkpoints import CHECKPOINTS, Checkpoints, Parameters, newest_step
from mcm_jax.training.state import Params

_METADATA = "_CHECKPOINT_METADATA"
LOCK = "lock"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunRecord:
    """The content of run.json, or of config.json beside an exported model.

    Attributes:
      teacher: `checkpoint_identity` of the teacher's checkpoint that the run started from; None if there is
        no teacher or the file was written by an older version.
      guide: the same for the model that the teacher's guidance leads away from.
      origin: the published file that the parameters, or those of the first teacher, come from; None: none.
      guide_origin: the same for the guide's.
    """

    config: Config
    dataset: DatasetInfo
    teacher: str | None = None
    guide: str | None = None
    origin: Origin | None = None
    guide_origin: Origin | None = None

    def to_json(self) -> JsonObject:
        """The content of the file."""
        return json.loads(json.dumps(dataclasses.asdict(self), default=str))


def _exported(workdir: Path) -> exported.Exported | None:
    """What an exported model's folder contains; None if `workdir` is not one."""
    return None if (workdir / RUN_FILE).exists() else exported.find(workdir)


def steps(workdir: Path) -> list[int]:
    """Number of updates at each checkpoint, in ascending order.

    Raises:
      InputError: there is no checkpoint.
    """
    if (model := _exported(workdir)) is not None:
        return [model.checkpoint_step]
    with Checkpoints(workdir) as saved:
        return saved.require()


def restore_params(
    workdir: Path, abstract: Params, shardings: Params, *, parameters: Parameters, step: int | None = None
) -> Params:
    """Restores averaged ("ema") or raw ("raw") parameters at `step`, by default the newest checkpoint.

    Raises:
      InputError: there are no such parameters, or they are damaged.
    """
    if (model := _exported(workdir)) is not None:
        return exported.restore_params(workdir, model, abstract, shardings, parameters=parameters, step=step)
    with Checkpoints(workdir) as saved:
        return saved.restore_params(abstract, shardings, parameters=parameters, step=step)


def checkpoint_identity(workdir: Path, step: int) -> str | None:
    """Returns a hash that identifies a checkpoint, even among checkpoints of the same step.

    Hashes the metadata written by Orbax, which contain the time to the nanosecond, so that copying or moving
    the directory does not change the identity. None if there are no metadata. An exported model has the
    identity of its checkpoint.
    """
    if (model := _exported(workdir)) is not None:
        return model.checkpoint
    try:
        return hashlib.sha256(files.read_bytes(workdir / CHECKPOINTS / str(step) / _METADATA)).hexdigest()
    except (FileNotFoundError, NotADirectoryError):
        return None


def newest_identity(path: str | None) -> str | None:
    """`checkpoint_identity` of the newest checkpoint in the workdir `path`; None if there is none."""
    if path is None:
        return None
    workdir = as_path(path)
    model = _exported(workdir)
    step = newest_step(workdir) if model is None else model.checkpoint_step
    return None if step is None else checkpoint_identity(workdir, step)


def existing_run(workdir: Path, config: Config) -> RunRecord | None:
    """The run that was started in `workdir` with this config, teacher and guide; None if there is no run.

    Raises:
      InputError: the run there has another config, teacher or guide, or its file is damaged; or it is an
        exported model.
    """
    if _exported(workdir) is not None:
        raise InputError(
            f"--workdir={workdir} contains an exported model, which can't be trained further; start a "
            "student in another directory"
        )
    if not (workdir / RUN_FILE).exists():
        return None
    saved = read(workdir)
    _check_same_settings(workdir, config, saved.config)
    for name in ("teacher", "guide"):
        _check_same_model(workdir, config, saved, name=name)
    return saved


@contextlib.contextmanager
def claim(
    workdir: Path, run: RunRecord, *, existing: RunRecord | None, needed_bytes: int
) -> Generator[None, None, None]:
    """Makes `workdir` the directory of `run`, or checks that the run there continues on the same images.

    Within the context, no other process can train there (if the file system supports locks). Settings that
    may change (location of the data, sampling) are recorded with their current values. All processes call
    this together; the first one writes.

    Args:
      existing: the result of `existing_run`.
      needed_bytes: upper bound on the size of the checkpoints.

    Raises:
      InputError: the directory is not writable, has too little space, contains a run on other images, is not
        shared by all processes, or another process trains there.
    """
    with distributed.fail_together():
        _check_place(workdir, run.dataset, existing=existing, needed_bytes=needed_bytes)
    distributed.require_shared(workdir, "--workdir")
    with contextlib.ExitStack() as lock:
        with distributed.fail_together():
            if distributed.is_first():
                lock.enter_context(locks.locked(workdir / LOCK, f"--workdir={workdir}"))
                if existing is None and (workdir / RUN_FILE).exists():
                    raise InputError(
                        f"--workdir={workdir}: another process has just started a run there; choose another "
                        "directory, or run the same command again to continue it"
                    )
                _write(workdir, run)
        yield


def _check_place(
    workdir: Path, dataset: DatasetInfo, *, existing: RunRecord | None, needed_bytes: int
) -> None:
    """Raises InputError as `claim` does."""
    files.require_writable(workdir, "--workdir")
    free = files.free_bytes(workdir)
    if free is not None and free < needed_bytes:
        raise InputError(
            f"--workdir={workdir} has {free / 1e9:.3f} GB free, but its checkpoints need "
            f"{needed_bytes / 1e9:.3f} GB; free some space or choose another directory"
        )
    if existing is None and (workdir / CHECKPOINTS).exists():
        raise InputError(f"--workdir={workdir} has checkpoints but no {RUN_FILE}; choose another directory")
    if existing is not None and existing.dataset.fingerprints != dataset.fingerprints:
        raise InputError(
            f"--workdir={workdir} was trained on other images than those in {dataset.path} "
            "(their hashes differ); choose another directory"
        )
    if existing is not None and existing.dataset.encoding != dataset.encoding:
        raise InputError(
            f"--workdir={workdir} was trained on other embeddings of captions than those of {dataset.path} "
            "(their hashes differ); choose another directory"
        )


def read(workdir: Path) -> RunRecord:
    """Reads the record of the run in `workdir`.

    Raises:
      InputError: there is no run, or its file is damaged.
    """
    path = workdir / (RUN_FILE if _exported(workdir) is None else EXPORTED_FILE)
    try:
        content = json_text.loads(files.read_bytes(path))
        return RunRecord(
            config=validation.read_saved(upgraded(content["config"])),
            dataset=DatasetInfo.from_json(content["dataset"], path=as_path(content["dataset"]["path"])),
            teacher=content.get("teacher"),
            guide=content.get("guide"),
            origin=_origin(content.get("origin")),
            guide_origin=_origin(content.get("guide_origin")),
        )
    except FileNotFoundError:
        stages = ", ".join(sorted(path.parent.name for path in workdir.glob(f"*/{RUN_FILE}")))
        if stages:
            raise InputError(f"{workdir} contains the stages {stages} of a run; choose one of them") from None
        raise InputError(f"{workdir} is not a run ({RUN_FILE} is missing); train there first") from None
    except OSError as error:
        raise InputError(f"{path} can't be read ({reason(error)})") from error
    except InputError as error:
        raise InputError(f"{path}: {shortened(str(error))}; restore it") from error
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise InputError(
            f"{path} is damaged ({reason(error)}); restore it or train in another directory"
        ) from error


def _origin(content: object) -> Origin | None:
    return None if content is None else Origin.from_json(content)


def compilation_cache(workdir: Path) -> Path:
    """The directory for compiled programs; MCM_COMPILATION_CACHE sets one to share between runs."""
    shared = os.environ.get("MCM_COMPILATION_CACHE")
    cache = workdir / "xla_cache" if shared is None else checked_path(shared, "MCM_COMPILATION_CACHE")
    return absolute(cache)


def _write(workdir: Path, run: RunRecord) -> None:
    files.write_whole(workdir / RUN_FILE, json.dumps(run.to_json(), indent=2) + "\n")


def _check_same_settings(workdir: Path, config: Config, saved_config: Config) -> None:
    """Raises InputError if a setting differs that must not change; the models are compared separately."""
    saved = fields.flat(saved_config, Affects.TRAINING)
    for name, value in fields.flat(config, Affects.TRAINING).items():
        if name == "training.num_steps" and config.optimizer.decay == "constant":
            # Without decay, the learning rate does not depend on num_steps, so a run may be extended.
            continue
        if name in ("teacher_checkpoint", "guide_checkpoint"):
            # The path may change; _check_same_model compares the identity of the checkpoint.
            continue
        if value != saved[name]:
            raise _other_setting(workdir, name, saved[name], value)


def _check_same_model(workdir: Path, config: Config, saved: RunRecord, *, name: str) -> None:
    """Raises InputError unless config.NAME_checkpoint contains the model that the run started with.

    Compares identities, whatever the path. If the record has no identity, or the model no longer exists (a
    finished run does not need it), only the paths can be compared.

    Args:
      name: teacher or guide.
    """
    setting = f"{name}_checkpoint"
    before, now = getattr(saved.config, setting), getattr(config, setting)
    identity, saved_identity = newest_identity(now), getattr(saved, name)
    if saved_identity is None or identity is None:
        if _resolved(before) != _resolved(now):
            raise _other_setting(workdir, setting, before, now)
    elif identity != saved_identity:
        raise InputError(
            f"config.{setting}={now} contains another checkpoint than the one that the run in "
            f"--workdir={workdir} started from; restore that one, or choose another workdir"
        )


def _resolved(path: str | None) -> Path | None:
    return None if path is None else resolved(path)


def _other_setting(workdir: Path, name: str, before: object, now: object) -> InputError:
    return InputError(
        f"--workdir={workdir} contains a run with config.{name}={before!r}, now it is {now!r}; rerun with "
        "the same config to continue it, or choose another directory"
    )
