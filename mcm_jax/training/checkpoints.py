"""Orbax checkpoints of a run; parameters, averages, optimizer, step and data iterator are separate items.

This lets sampling read only the averaged parameters. A student's checkpoint does not contain its teacher's
parameters.

The item "step" also contains a checksum of every other item. Orbax does not verify what it reads, so training
would silently use a flipped bit. Checkpoints of older versions have no checksums and are not verified.
"""

import contextlib
import json
import signal
import sys
import threading
import time
import types
import zlib
from collections.abc import Callable, Generator, Mapping
from typing import Any, Literal, TypeVar, cast

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from mcm_jax.system import distributed, files, json_text
from mcm_jax.system.errors import InputError, reason
from mcm_jax.system.paths import Path, absolute, is_in_bucket
from mcm_jax.training.checksums import checksums
from mcm_jax.training.state import Params, TrainState

CHECKPOINTS = "checkpoints"  # subdirectory of a run's directory
DAMAGED = "damaged_checkpoints"  # subdirectory for checkpoints that were set aside
# Iterator over this process's batches, each a dictionary of arrays.
Batches = grain.DatasetIterator[dict[str, np.ndarray]]
Parameters = Literal["ema", "raw"]
_ITEMS = {"ema": "ema_params", "raw": "params"}
_TREES = ("params", "ema_params", "target_params", "opt_state", "target_opt_state")
# Pauses before a failed save is repeated: during training, and each time at its end.
_RETRY_SECONDS, _FINAL_RETRY_SECONDS = 60.0, (5.0, 20.0)


T = TypeVar("T")


class DamagedError(InputError):
    """A checkpoint cannot be read, or differs from what was saved."""


@contextlib.contextmanager
def _interruptible() -> Generator[None, None, None]:
    """Raises KeyboardInterrupt if Ctrl-C interrupts the block, whatever the block makes of it.

    Orbax turns a KeyboardInterrupt in one of its coroutines into an error like that of a damaged file, and
    Python ignores one in a destructor.
    """
    previous = signal.getsignal(signal.SIGINT)
    # Ctrl-C only interrupts the main thread. Background jobs of a shell script ignore it.
    if threading.current_thread() is not threading.main_thread() or not callable(previous):
        yield
        return
    interrupted = threading.Event()

    def interrupt(number: int, frame: types.FrameType | None) -> None:
        interrupted.set()
        previous(number, frame)

    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    except Exception as error:
        if interrupted.is_set():
            raise KeyboardInterrupt from error
        raise
    finally:
        signal.signal(signal.SIGINT, previous)
    if interrupted.is_set():
        raise KeyboardInterrupt


class Checkpoints:
    """The checkpoints in workdir/checkpoints; a context manager that waits for the last save on exit.

    Attributes:
      saved: number of updates at the newest checkpoint that was restored or is known to be saved; None if
        there is none.
    """

    def __init__(self, workdir: Path, *, keep: int | None = None, keep_every: int | None = None):
        """Opens the directory.

        Args:
          keep: number of newest checkpoints to keep; None opens the directory read-only.
          keep_every: also keep the checkpoints whose number of updates is a multiple of this; None: none.
        """
        self.directory = absolute(workdir) / CHECKPOINTS
        self._options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            keep_period=keep_every,
            read_only=keep is None,
            enable_async_checkpointing=True,
            # Otherwise, if a directory cannot be created, the next save waits for it until a timeout.
            async_options=ocp.AsyncOptions(
                create_directories_asynchronously=False, barrier_sync_fn=_wait_unless_failed
            ),
        )
        self._manager = self._open()
        self.saved: int | None = None
        self._saving: int | None = None
        self._retry_at: float | None = None
        self._abandoned = False

    def _open(self) -> ocp.CheckpointManager:
        return ocp.CheckpointManager(
            self.directory, options=self._options, item_names=("step", *_TREES, "data")
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        if not self._abandoned:
            self._manager.close()

    def latest_step(self) -> int | None:
        """Number of updates at the newest complete checkpoint; None if there is no checkpoint.

        Omits checkpoints that were saved under another number, or whose number cannot be read.
        """
        return next(
            (step for step in reversed(self.all_steps()) if self._record(step).get("step") == step), None
        )

    def any(self) -> bool:
        """Whether the directory contains anything named like a checkpoint, even a damaged one."""
        return bool(self._entries())

    def all_steps(self) -> list[int]:
        """Number of updates at each complete checkpoint, in ascending order."""
        return sorted(self._manager.all_steps())

    def require(self) -> list[int]:
        """Returns `all_steps`; raises InputError if there is no checkpoint."""
        if not self.all_steps():
            raise InputError(f"no checkpoint under {self.directory}; train there first")
        return self.all_steps()

    def save(self, state: TrainState, data: Batches, *, step: int) -> None:
        """Starts saving in the background, unless this step is already saved.

        An interrupted save leaves no partial checkpoint. A failure is reported and makes `retry_is_due` true
        after a minute; with several processes, of which others may have succeeded, it is raised.
        """
        for act in (self._wait, lambda: self._start_saving(state, data, step)):
            try:
                act()
            except Exception as error:  # Orbax raises almost any kind if the storage fails.
                self._report_failure(error)

    def retry_is_due(self) -> bool:
        """Whether a save has failed and should be repeated now, with the state at that time."""
        if distributed.is_multi_process():
            return False
        # Orbax reports an error once. Asking earlier would hide it from Orbax's own thread, which would then
        # delete old checkpoints.
        if self._saving is not None and not self._manager.is_saving_in_progress():
            try:
                self._wait()
            except Exception as error:
                self._report_failure(error)
        return self._retry_at is not None and time.monotonic() >= self._retry_at

    def finish(self, state: TrainState, data: Batches, *, step: int) -> None:
        """Saves and waits until the state is on disk; repeats a failed save twice, then raises its error."""
        for pause in (*_FINAL_RETRY_SECONDS, None):
            try:
                self._wait()
                self._start_saving(state, data, step)
                self._wait()
                return
            except Exception as error:
                if pause is None:
                    raise
                self._report_failure(error)
                time.sleep(pause)

    def _report_failure(self, error: Exception) -> None:
        if distributed.is_multi_process():
            # Closing would wait for the other processes, which wait for this one.
            self._abandoned = True
            raise error
        # The threads of a failed save report further errors later, and its manager no longer lists the
        # checkpoints that it would have deleted.
        with contextlib.suppress(Exception):
            self._manager.close()
        self._manager = self._open()
        self._retry_at = time.monotonic() + _RETRY_SECONDS
        self._saving, full = None, files.full_disk_within(error)
        print(
            f"note: a checkpoint could not be saved ({_line(full or error)}); the save will be repeated",
            file=sys.stderr,
            flush=True,
        )

    def _wait(self) -> None:
        """Blocks until the last save is on disk; if it failed, raises its error."""
        self._manager.wait_until_finished()
        if self._saving is not None:
            self.saved, self._saving = self._saving, None

    def _start_saving(self, state: TrainState, data: Batches, step: int) -> None:
        if step == self._manager.latest_step():
            return
        trees = _trees(state)
        record = {"step": step, "checksums": {"data": _data_checksum(data.get_state()), **checksums(trees)}}
        items: dict[str, ocp.args.CheckpointArgs] = {
            name: ocp.args.StandardSave(tree) for name, tree in trees.items()
        }
        items["step"] = ocp.args.JsonSave(record)
        items["data"] = grain.checkpoint.CheckpointSave(data)
        # Orbax's copies to the host would be rejected by the training loop's transfer guard.
        with jax.transfer_guard("allow"):
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)
        self._saving, self._retry_at = step, None

    @_interruptible()
    def restore(self, abstract: TrainState, shardings: TrainState, data: Batches) -> TrainState:
        """Restores the newest undamaged state with `shardings`, and `data` to its position at that step.

        Damaged checkpoints that are newer are moved to workdir/damaged_checkpoints, and reported. The number
        of processes may differ from the number that saved the checkpoint.

        Raises:
          InputError: no checkpoint can be restored; all stay where they are.
        """
        entries = self._entries()
        distributed.require_same(entries, "the lists of checkpoints")
        damaged: dict[str, str] = {}
        for name in entries:
            try:
                state = self._restore(int(name), _with_shardings(abstract, shardings), data)
            except DamagedError as error:
                damaged[name] = str(error)
                continue
            self._set_aside(damaged, continuing=name)
            self.saved = int(name)
            return state
        reasons = "; ".join(f"{name}: {reason}" for name, reason in damaged.items())
        raise InputError(
            f"no checkpoint under {self.directory} can be restored ({reasons or 'there is none'}); restore "
            "one from a backup, or train in another directory"
        )

    def _entries(self) -> list[str]:
        """Everything in the directory that is named like a checkpoint, even a damaged one, the newest first.

        Omits interrupted saves. On local file systems they have other names; in a bucket they lack a mark.
        """
        with files.storage_errors(self.directory):
            found = [path for path in files.entries(self.directory) if path.name.isdecimal()]
            if is_in_bucket(self.directory):
                found = [path for path in found if ocp.utils.is_checkpoint_finalized(path)]
            return sorted((path.name for path in found), key=int, reverse=True)

    def _restore(self, step: int, targets: TrainState, data: Batches) -> TrainState:
        """Restores one checkpoint; raises DamagedError in all processes if it is damaged."""
        trees = self._read(step, _trees(targets))
        _agreed(lambda: self._restore_data(self._record(step), data, step))
        return targets._replace(step=jax.device_put(np.int32(step), targets.step.sharding), **trees)

    def _read(self, step: int, targets: Mapping[str, PyTree]) -> dict[str, PyTree]:
        """Reads and verifies items of a checkpoint; raises DamagedError in all processes if it is damaged."""

        def read() -> dict[str, PyTree]:
            self._require_record(step)
            items = {item: ocp.args.StandardRestore(tree) for item, tree in targets.items()}
            # Every process reads for itself: if one fails, the others would wait for it in Orbax.
            index = jax.process_index()
            alone = ocp.options.MultiprocessingOptions(
                primary_host=index, active_processes={index}, barrier_sync_key_prefix=f"reader_{index}"
            )
            options = ocp.CheckpointManagerOptions(read_only=True, multiprocessing_options=alone)
            with ocp.CheckpointManager(self.directory, options=options, item_names=tuple(items)) as manager:
                restored = manager.restore(step, args=ocp.args.Composite(**items))
            return {item: restored[item] for item in items}

        trees = _agreed(read)
        _verify(self._record(step), trees)
        return trees

    def _set_aside(self, damaged: Mapping[str, str], *, continuing: str) -> None:
        """Moves damaged checkpoints out of the way; they are never deleted."""
        if not damaged:
            return
        with distributed.fail_together():
            if distributed.is_first():
                for name, reason in damaged.items():
                    place = self._move(name)
                    print(
                        f"checkpoint {name} is damaged ({reason}) and was moved to {place}; using checkpoint "
                        f"{continuing}",
                        flush=True,
                    )
        self._manager.reload()

    def _move(self, name: str) -> Path:
        place = self.directory.parent / DAMAGED / name
        while place.exists():
            place = place.with_name(f"{place.name}_again")
        try:
            files.move_directory(self.directory / name, place)
        except OSError as error:
            raise InputError(
                f"{self.directory / name} is damaged, but cannot be moved to {place} "
                f"({reason(error)}); move it away and run the same command again"
            ) from error
        return place

    def _record(self, step: int) -> dict[str, Any]:
        """The content of the item "step"; empty if it is missing or damaged."""
        path = self.directory / str(step) / "step" / "metadata"
        try:
            record = json_text.loads(files.read_bytes(path))
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError):
            return {}
        except OSError as error:
            raise InputError(f"{path} cannot be read ({reason(error)})") from error
        return record if isinstance(record, dict) else {}

    def _require_record(self, step: int) -> dict[str, Any]:
        record = self._record(step)
        if record.get("step") != step:
            was = f"it was saved as {record['step']}" if "step" in record else "its step cannot be read"
            raise DamagedError(was)
        return record

    def _restore_data(self, record: Mapping[str, Any], data: Batches, step: int) -> None:
        """Restores the iterator from any process's file: all processes were at the same batch.

        Grain's own handler requires a file of this process and an unchanged number of processes.
        """
        path = min((self.directory / str(step) / "data").glob("process_*-of-*.json"))
        state = json_text.loads(files.read_bytes(path))
        if "checksums" in record and record["checksums"]["data"] != _data_checksum(state):
            raise DamagedError("its position in the data differs from what was saved")
        data.set_state(state)
        data.start_prefetch()

    @_interruptible()
    def restore_params(
        self, abstract: Params, shardings: Params, *, parameters: Parameters, step: int | None = None
    ) -> Params:
        """Restores averaged ("ema") or raw ("raw") parameters at `step`, by default the newest checkpoint.

        Raises:
          InputError: there is no checkpoint at all, none at `step`, or it is damaged.
        """
        steps = self.require()
        if step is not None and step not in steps:
            raise InputError(f"no checkpoint of step {step} under {self.directory}; available steps: {steps}")
        item = _ITEMS[parameters]
        step = steps[-1] if step is None else step
        try:
            return self._read(step, {item: _with_shardings(abstract, shardings)})[item]
        except DamagedError as error:
            if not (self.directory / str(step)).exists():
                raise InputError(f"checkpoint {step} under {self.directory} was deleted meanwhile") from error
            others = [other for other in steps if other != step]
            raise DamagedError(
                f"checkpoint {step} under {self.directory} is damaged ({error}); use another one of {others}"
            ) from error


def newest_step(workdir: Path) -> int | None:
    """Number of updates at the newest complete checkpoint of a run; None if there is no checkpoint.

    Unlike `Checkpoints`, this does not wait for other processes.
    """
    try:
        return max(ocp.utils.checkpoint_steps(workdir / CHECKPOINTS), default=None)
    except (FileNotFoundError, NotADirectoryError):
        return None


def _wait_unless_failed(*, key: str, timeout_ms: int) -> None:
    """Waits for the other processes as Orbax does, but not while an exception ends a save in this one.

    The others wait elsewhere, for what this process has not done, and nobody would report it until Orbax's
    timeout.
    """
    if sys.exc_info()[1] is None:
        ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)


def _trees(state: TrainState) -> dict[str, PyTree]:
    """The items saved as trees of arrays; includes the target network only if there is one."""
    return {name: getattr(state, name) for name in _TREES if getattr(state, name) is not None}


def _with_shardings(abstract: PyTree, shardings: PyTree) -> PyTree:
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        abstract,
        shardings,
    )


def _verify(record: Mapping[str, Any], trees: Mapping[str, PyTree]) -> None:
    """Raises DamagedError if a restored tree differs from what was saved."""
    if "checksums" not in record:
        return
    for item, value in checksums(trees).items():
        if record["checksums"][item] != value:
            raise DamagedError(f"its {item} differ from what was saved")


def _agreed(read: Callable[[], T]) -> T:
    """Returns `read()`, which each process calls for itself.

    Raises:
      DamagedError: in all processes, if one of them has found damage.
      KeyboardInterrupt: Ctrl-C interrupted this process.
      Exception: any other error, also in all processes.
    """
    result, damage = None, None
    with distributed.fail_together():
        try:
            with _interruptible():
                result = read()
        except Exception as error:  # Orbax raises almost any kind for a damaged file.
            if not _is_damage(error):
                raise
            damage = _line(error)
    if not distributed.all_true(damage is None):
        raise DamagedError(damage or "another process cannot read it")
    return cast(T, result)


def _is_damage(error: Exception) -> bool:
    """Whether the files of a checkpoint are damaged, and it is not the machine or the storage that failed."""
    if isinstance(error, InputError):
        return isinstance(error, DamagedError)
    if files.failed_storage_within(error) is not None:
        return False
    if isinstance(error, OSError):
        return isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError)
    if isinstance(error, MemoryError | jax.errors.JaxRuntimeError):
        return False
    return not any(status in str(error) for status in files.STORAGE_FAILURES)


def _data_checksum(state: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(state, sort_keys=True).encode())


def _line(error: Exception) -> str:
    """The start of an exception's message, in one line."""
    text = " ".join(str(error).split())[:100] or type(error).__name__
    return text if isinstance(error, InputError) else f"{type(error).__name__}: {text}"
