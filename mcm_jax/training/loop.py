"""The training loop: feeds data to the train step, reports metrics, draws samples and saves checkpoints."""

import contextlib
import dataclasses
import math
import signal
import socket
import threading
import time
from collections.abc import Callable, Generator
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PyTree

from mcm_jax.fields import Affects, setting
from mcm_jax.system import sharding
from mcm_jax.training.checkpoints import Batches, Checkpoints
from mcm_jax.training.clock import Clock
from mcm_jax.training.state import Params, TrainState
from mcm_jax.training.watch import Watch
from mcm_jax.training.watchdog import Watchdog
from mcm_jax.training.writers import WriterName


class NonFiniteError(RuntimeError):
    """The loss or the gradient is not finite; the last good checkpoint is still valid."""


@runtime_checkable
class Observer(Protocol):
    """Receives the progress of a run: a progress bar, plain lines, metrics in files.

    Attributes:
      clock: adds up what the time is spent on.
    """

    clock: Clock

    def update(self, step: int) -> None:
        """Called after each update; `step` updates are done or dispatched to the device."""

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Receives the metrics of update number `step`; called for every update."""

    def pictures(self, step: int, params: Params) -> None:
        """Draws samples from the averaged parameters."""


@dataclasses.dataclass(frozen=True)
class TrainingSettings:
    """Number of updates, batch size, and how often to save and report."""

    num_steps: int = setting(200_000, "total number of updates", low=1)
    batch_size: int = setting(2048, "images per update, over all devices", low=1, high=2**20)
    accumulation_steps: int = setting(
        1, "parts of a batch whose gradients are computed one after another, to save memory", low=1
    )
    log_every_steps: int = setting(100, "updates between reports of metrics", low=1, affects=Affects.NOTHING)
    checkpoint_every_steps: int = setting(
        5_000, "updates between checkpoints", low=1, affects=Affects.NOTHING
    )
    checkpoint_every_minutes: float = setting(
        0.0, "minutes between additional checkpoints; 0: none", low=0, affects=Affects.NOTHING
    )
    keep_checkpoints: int = setting(2, "number of newest checkpoints to keep", low=1, affects=Affects.NOTHING)
    keep_every_steps: int = setting(
        0,
        "also keep permanently the checkpoints whose number of updates is a multiple of this; 0: none",
        low=0,
        affects=Affects.NOTHING,
    )
    sample_every_steps: int = setting(
        10_000, "updates between sample grids; 0: none", low=0, affects=Affects.NOTHING
    )
    metrics_to: tuple[WriterName, ...] = setting(
        ("tensorboard",),
        "where metrics go besides the console: tensorboard, json (WORKDIR/metrics.jsonl), wandb",
        affects=Affects.NOTHING,
    )
    hang_minutes: float = setting(
        30.0,
        "minutes without progress (compiling, saves and grids included), after which a process prints its "
        "stacks and ends; 0: never",
        low=0,
        affects=Affects.NOTHING,
    )


def train(
    state: TrainState,
    teacher_params: PyTree,
    train_step: Callable[..., tuple[TrainState, dict[str, jax.Array]]],
    data: Batches,
    *,
    mesh: Mesh,
    settings: TrainingSettings,
    checkpoints: Checkpoints,
    observer: Observer,
) -> bool:
    """Trains until settings.num_steps updates are done, then saves a checkpoint.

    Metrics are read one update late, so the host waits for the current update only to save or to sample.
    SIGINT (Ctrl-C) or SIGTERM (preemption) saves a checkpoint and returns early. With several processes, a
    signal to one of them stops all after the same update. A `Watch` reports unusual updates, and a `Watchdog`
    ends a process that hangs.

    Returns:
      Whether all updates are done; False after a signal.

    Raises:
      NonFiniteError: the loss or the gradient is not finite; this state is not saved.
    """
    step = int(state.step)
    pending: tuple[int, dict[str, jax.Array]] | None = None
    watch, clock = Watch(), observer.clock
    with (
        _stop_signals() as signalled,
        Watchdog(60 * settings.hang_minutes) as watchdog,
        jax.transfer_guard("disallow"),
    ):
        requests = _Requests(mesh, signalled, save_every_seconds=60 * settings.checkpoint_every_minutes)
        while step < settings.num_steps and not requests.stop():
            with clock.spent("data"):
                batch = sharding.global_batch(mesh, watch.read(data))
            state, metrics = train_step(state, teacher_params, batch)
            step += 1
            _report(pending, observer, watch, checkpoints.saved)
            waited, pending = pending is not None, (step, metrics)
            observer.update(step)
            save_now = (
                _is_due(step, settings.checkpoint_every_steps) or requests.save or checkpoints.retry_is_due()
            )
            draw_now = _is_due(step, settings.sample_every_steps)
            if save_now or draw_now:
                # Only save or sample a state whose metrics are known to be finite.
                _report(pending, observer, watch, checkpoints.saved)
                pending = None
            if waited or pending is None:
                clock.updates_begin()
            if save_now:
                with clock.spent("checkpoints"):
                    checkpoints.save(state, data, step=step)
                requests.saved()
                watchdog.alive(step)
            if draw_now:
                with clock.spent("samples"):
                    observer.pictures(step, state.ema_params)
            # Only if it waited for the update before did the host take the time of one update.
            watch.updated(step, usual=waited and not (save_now or draw_now))
            watchdog.alive(step)
        watchdog.alive(step)
        _report(pending, observer, watch, checkpoints.saved)
        clock.updates_begin()
        with clock.spent("checkpoints"):
            checkpoints.finish(state, data, step=step)
    return step >= settings.num_steps


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _report(
    pending: tuple[int, dict[str, jax.Array]] | None,
    observer: Observer,
    watch: Watch,
    saved: int | None,
) -> None:
    if pending is None:
        return
    step, values = pending[0], {k: float(v) for k, v in jax.device_get(pending[1]).items()}
    last_good = "there is no checkpoint yet" if saved is None else f"the last good checkpoint is {saved}"
    if not all(math.isfinite(value) for value in values.values()):
        host = socket.gethostname()
        raise NonFiniteError(f"update {step} is not finite on {host}: {values}; {last_good}")
    watch.gradient(step, values["gradient_norm"], last_good=last_good)
    observer.metrics(step, values)


class _Requests:
    """Whether to stop, and whether to save for the sake of time: the same answers in every process.

    With several processes, all vote before each update. The votes are read one update late, so that no host
    waits for the update that it just started.

    Attributes:
      save: whether a checkpoint is due by time; updated by `stop`.
    """

    def __init__(self, mesh: Mesh, signalled: threading.Event, *, save_every_seconds: float):
        self._mesh, self._signalled = mesh, signalled
        self._save_every = save_every_seconds or math.inf
        self.save = False
        self._saved_at, self._is_stale = time.monotonic(), False
        self._voted: jax.Array | None = None
        any_of = jax.jit(lambda votes: jnp.any(votes, axis=0), out_shardings=sharding.replicated(mesh))
        self._count = any_of if mesh.is_multi_process else None

    def saved(self) -> None:
        """A checkpoint has just been saved. The votes that are on their way no longer ask for one."""
        self._saved_at, self._is_stale = time.monotonic(), self._count is not None

    def stop(self) -> bool:
        """Whether to stop before the next update."""
        votes = [self._signalled.is_set(), time.monotonic() - self._saved_at >= self._save_every]
        if self._count is not None:
            local = np.tile(votes, (len(self._mesh.local_devices), 1))
            counted = self._count(sharding.global_batch(self._mesh, {"votes": local})["votes"])
            last, self._voted = self._voted, counted
            votes = [False, False] if last is None else jax.device_get(last).tolist()
        stop, due = votes
        self.save, self._is_stale = due and not self._is_stale, False
        return stop


@contextlib.contextmanager
def _stop_signals() -> Generator[threading.Event, None, None]:
    """Makes SIGINT and SIGTERM set the yielded event instead of ending the process during an update."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    signals = (signal.SIGINT, signal.SIGTERM)
    previous = [signal.signal(number, lambda *_: stop.set()) for number in signals]
    try:
        yield stop
    finally:
        for number, handler in zip(signals, previous, strict=True):
            signal.signal(number, handler)
