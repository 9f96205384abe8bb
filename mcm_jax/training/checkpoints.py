"""Orbax checkpoints of a run; parameters, averages, optimizer, step and data iterator are separate items.

This lets sampling read only the averaged parameters. A student's checkpoint does not contain its teacher's
parameters.
"""

import json
from pathlib import Path
from typing import Literal

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from mcm_jax.system.errors import InputError
from mcm_jax.training.state import Params, TrainState

CHECKPOINTS = "checkpoints"  # subdirectory of a run's directory
# Iterator over this process's batches, each a dictionary of arrays.
Batches = grain.DatasetIterator[dict[str, np.ndarray]]
Parameters = Literal["ema", "raw"]
_ITEMS = {"ema": "ema_params", "raw": "params"}
_TREES = ("params", "ema_params", "target_params", "opt_state")


class Checkpoints:
    """The checkpoints in workdir/checkpoints; a context manager that waits for the last save on exit."""

    def __init__(self, workdir: Path, *, keep: int | None = None):
        """Opens the directory.

        Args:
          keep: number of newest checkpoints to keep; None opens the directory read-only.
        """
        self.directory = Path(workdir).absolute() / CHECKPOINTS
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, read_only=keep is None, enable_async_checkpointing=True
        )
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=options,
            item_names=("step", *_TREES, "data"),
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.close()

    def latest_step(self) -> int | None:
        """Number of updates at the newest complete checkpoint; None if there is no checkpoint."""
        return self._manager.latest_step()

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

        An interrupted save leaves no partial checkpoint.
        """
        if step == self._manager.latest_step():
            return
        items: dict[str, ocp.args.CheckpointArgs] = {
            name: ocp.args.StandardSave(tree) for name, tree in _trees(state).items()
        }
        items["step"] = ocp.args.JsonSave({"step": step})
        items["data"] = grain.checkpoint.CheckpointSave(data)
        # Orbax's copies to the host would be rejected by the training loop's transfer guard.
        with jax.transfer_guard("allow"):
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)

    def wait(self) -> None:
        """Blocks until the last save is on disk; if it failed, raises its error."""
        self._manager.wait_until_finished()

    def restore(self, abstract: TrainState, shardings: TrainState, data: Batches) -> TrainState:
        """Restores the newest state with `shardings`, and `data` to its position at that step.

        The number of processes may differ from the number that saved the checkpoint.
        """
        targets = _with_shardings(abstract, shardings)
        items = {name: ocp.args.StandardRestore(tree) for name, tree in _trees(targets).items()}
        latest = self.require()[-1]
        restored = self._manager.restore(latest, args=ocp.args.Composite(**items))
        self._restore_data(data, latest)
        trees = {name: restored[name] for name in _trees(targets)}
        return targets._replace(step=jax.device_put(np.int32(latest), targets.step.sharding), **trees)

    def _restore_data(self, data: Batches, step: int) -> None:
        """Restores the iterator from any process's file: all processes were at the same batch.

        Grain's own handler requires a file of this process and an unchanged number of processes.
        """
        path = min((self.directory / str(step) / "data").glob("process_*-of-*.json"))
        data.set_state(json.loads(path.read_text()))
        data.start_prefetch()

    def restore_params(
        self, abstract: Params, shardings: Params, *, parameters: Parameters, step: int | None = None
    ) -> Params:
        """Restores averaged ("ema") or raw ("raw") parameters at `step`, by default the newest checkpoint.

        Raises:
          InputError: there is no checkpoint at all, or none at `step`.
        """
        steps = self.require()
        if step is not None and step not in steps:
            raise InputError(f"no checkpoint of step {step} under {self.directory}; available steps: {steps}")
        target = ocp.args.StandardRestore(_with_shardings(abstract, shardings))
        item = _ITEMS[parameters]
        step = steps[-1] if step is None else step
        return self._manager.restore(step, args=ocp.args.Composite(**{item: target}))[item]


def newest_step(workdir: Path) -> int | None:
    """Number of updates at the newest complete checkpoint of a run; None if there is no checkpoint.

    Unlike `Checkpoints`, this does not wait for other processes.
    """
    try:
        return max(ocp.utils.checkpoint_steps(workdir / CHECKPOINTS), default=None)
    except OSError:
        return None


def _trees(state: TrainState) -> dict[str, PyTree]:
    """The items saved as trees of arrays; includes the target network only if there is one."""
    return {name: getattr(state, name) for name in _TREES if getattr(state, name) is not None}


def _with_shardings(abstract: PyTree, shardings: PyTree) -> PyTree:
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        abstract,
        shardings,
    )
