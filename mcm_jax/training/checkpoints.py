"""Orbax checkpoints of a run: parameters, averaged parameters, optimizer and data iterator apart.

They are separate items, so that sampling reads the averaged parameters alone. A teacher's parameters
are in the teacher's checkpoint and never in the student's.
"""

import json
from pathlib import Path
from typing import Any, Literal

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp

from mcm_jax.system.errors import InputError
from mcm_jax.training.state import TrainState

Parameters = Literal["ema", "raw"]
_ITEMS = {"ema": "ema_params", "raw": "params"}
_TREES = ("params", "ema_params", "target_params", "opt_state")


class Checkpoints:
    """The checkpoints under workdir/checkpoints; use it as a context to wait for the last save."""

    def __init__(self, workdir: Path, *, keep: int | None = None):
        """keep: how many of the newest to keep; None opens them for reading only."""
        self.directory = Path(workdir).absolute() / "checkpoints"
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
        """`all_steps`, at least one; raises InputError where there is none."""
        if not self.all_steps():
            raise InputError(f"no checkpoint under {self.directory}; train there first")
        return self.all_steps()

    def save(self, state: TrainState, data: grain.DatasetIterator, *, step: int) -> None:
        """Starts saving in the background; complete or absent, never half. A step is saved once."""
        if step == self._manager.latest_step():
            return
        items = {name: ocp.args.StandardSave(tree) for name, tree in _trees(state).items()}
        items["step"] = ocp.args.JsonSave({"step": step})
        items["data"] = grain.checkpoint.CheckpointSave(data)
        # Orbax copies to the host by transfers that the loop's guard takes for mistakes.
        with jax.transfer_guard("allow"):
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)

    def wait(self) -> None:
        """Until the last save is on disk; raises what went wrong with it."""
        self._manager.wait_until_finished()

    def restore(self, abstract: TrainState, shardings: TrainState, data: grain.DatasetIterator) -> TrainState:
        """The newest state, laid out by `shardings`; sets `data` to where it was.

        The processes may be more or fewer than those that saved it.
        """
        targets = _with_shardings(abstract, shardings)
        items = {name: ocp.args.StandardRestore(tree) for name, tree in _trees(targets).items()}
        latest = self.latest_step()
        restored = self._manager.restore(latest, args=ocp.args.Composite(**items))
        self._restore_data(data, latest)
        trees = {name: restored[name] for name in _trees(targets)}
        return targets._replace(step=jax.device_put(np.int32(latest), targets.step.sharding), **trees)

    def _restore_data(self, data: grain.DatasetIterator, step: int) -> None:
        """Grain's handler wants the file of this process and of as many processes as there were.

        All are at the same batch, so that any one's file will do.
        """
        path = min((self.directory / str(step) / "data").glob("process_*-of-*.json"))
        data.set_state(json.loads(path.read_text()))
        data.start_prefetch()

    def restore_params(
        self, abstract: Any, shardings: Any, *, parameters: Parameters, step: int | None = None
    ) -> Any:
        """Averaged ("ema") or last ("raw") parameters of the newest or the given step.

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


def _trees(state: TrainState) -> dict[str, Any]:
    """The parts that are saved as trees of arrays; a target network only where there is one."""
    return {name: getattr(state, name) for name in _TREES if getattr(state, name) is not None}


def _with_shardings(abstract: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        abstract,
        shardings,
    )
