"""Orbax checkpoints of a run: parameters, averaged parameters, optimizer and data iterator as separate items.

Sampling therefore reads the averaged parameters alone. A student's checkpoint never contains its teacher's
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

CHECKPOINTS = "checkpoints"  # below a run's directory
# This process's batches, by feature.
Batches = grain.DatasetIterator[dict[str, np.ndarray]]
Parameters = Literal["ema", "raw"]
_ITEMS = {"ema": "ema_params", "raw": "params"}
_TREES = ("params", "ema_params", "target_params", "opt_state")


class Checkpoints:
    """The checkpoints in workdir/checkpoints; a context manager, which waits for the last save at its end."""

    def __init__(self, workdir: Path, *, keep: int | None = None):
        """keep: number of newest checkpoints to keep; None opens them for reading only."""
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
        """Updates done at the newest complete checkpoint, None if there is none."""
        return self._manager.latest_step()

    def all_steps(self) -> list[int]:
        """Updates done at each complete checkpoint, ascending."""
        return sorted(self._manager.all_steps())

    def require(self) -> list[int]:
        """`all_steps`; raises InputError if there are none."""
        if not self.all_steps():
            raise InputError(f"no checkpoint under {self.directory}; train there first")
        return self.all_steps()

    def save(self, state: TrainState, data: Batches, *, step: int) -> None:
        """Starts saving in the background. A checkpoint is complete or absent, and saved once per step."""
        if step == self._manager.latest_step():
            return
        items: dict[str, ocp.args.CheckpointArgs] = {
            name: ocp.args.StandardSave(tree) for name, tree in _trees(state).items()
        }
        items["step"] = ocp.args.JsonSave({"step": step})
        items["data"] = grain.checkpoint.CheckpointSave(data)
        # Orbax copies to the host with transfers that the loop's guard would reject.
        with jax.transfer_guard("allow"):
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)

    def wait(self) -> None:
        """Blocks until the last save is on disk; raises its error if it failed."""
        self._manager.wait_until_finished()

    def restore(self, abstract: TrainState, shardings: TrainState, data: Batches) -> TrainState:
        """The newest state, laid out by `shardings`; also moves `data` to its position at that step.

        The number of processes may differ from that at the time of saving.
        """
        targets = _with_shardings(abstract, shardings)
        items = {name: ocp.args.StandardRestore(tree) for name, tree in _trees(targets).items()}
        latest = self.require()[-1]
        restored = self._manager.restore(latest, args=ocp.args.Composite(**items))
        self._restore_data(data, latest)
        trees = {name: restored[name] for name in _trees(targets)}
        return targets._replace(step=jax.device_put(np.int32(latest), targets.step.sharding), **trees)

    def _restore_data(self, data: Batches, step: int) -> None:
        """Restores the iterator from any process's file: all of them were at the same batch.

        Grain's own handler requires this process's file and an unchanged number of processes.
        """
        path = min((self.directory / str(step) / "data").glob("process_*-of-*.json"))
        data.set_state(json.loads(path.read_text()))
        data.start_prefetch()

    def restore_params(
        self, abstract: Params, shardings: Params, *, parameters: Parameters, step: int | None = None
    ) -> Params:
        """Averaged ("ema") or last ("raw") parameters at the given step, by default the newest.

        Raises:
          InputError: there is no checkpoint, or none at `step`.
        """
        steps = self.require()
        if step is not None and step not in steps:
            raise InputError(f"no checkpoint of step {step} under {self.directory}; there are {steps}")
        target = ocp.args.StandardRestore(_with_shardings(abstract, shardings))
        item = _ITEMS[parameters]
        step = steps[-1] if step is None else step
        return self._manager.restore(step, args=ocp.args.Composite(**{item: target}))[item]


def newest_step(workdir: Path) -> int | None:
    """Updates done at the newest complete checkpoint of a run; None if there is none.

    Unlike `Checkpoints`, it does not wait for other processes.
    """
    try:
        return max(ocp.utils.checkpoint_steps(workdir / CHECKPOINTS), default=None)
    except OSError:
        return None


def _trees(state: TrainState) -> dict[str, PyTree]:
    """The items that are saved as trees of arrays; the target network only if there is one."""
    return {name: getattr(state, name) for name in _TREES if getattr(state, name) is not None}


def _with_shardings(abstract: PyTree, shardings: PyTree) -> PyTree:
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        abstract,
        shardings,
    )
