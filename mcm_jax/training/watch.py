"""Watches a training run: prints a note on stderr about updates that are far from the usual."""

import collections
import socket
import statistics
import sys
import time
from collections.abc import Iterator
from typing import TypeVar

from mcm_jax.system import distributed

T = TypeVar("T")

# The usual value is the median of the last updates, so that single outliers do not change it.
_USUAL_OF, _WARM_UP = 100, 20
# An update is slow if it takes this many times as long as usual, and this much longer. On a laptop, other
# programs and the writing of a checkpoint often cost a fraction of a second.
_SLOW, _SLOW_SECONDS = 10, 1.0
# With a batch of only 16 images, the norms of healthy runs stay below 4 times the usual one.
_EXPLODING = 20
# Number of updates in which at most one note of a kind is printed.
_QUIET = 100


class Watch:
    """Prints a note about every update that is far slower or has a far larger gradient than usual.

    Each process watches its own time. The gradient is the same in all of them, so only the first one reports
    it.
    """

    def __init__(self):
        self._seconds, self._norms = _Usual(), _Usual()
        self._slow, self._exploding = _Notes(), _Notes()
        self._reading, self._last = 0.0, time.monotonic()

    def read(self, batches: Iterator[T]) -> T:
        """Returns the next batch and takes the time: in a slow update, only some hosts may wait for data."""
        start = time.monotonic()
        batch = next(batches)
        self._reading = time.monotonic() - start
        return batch

    def updated(self, step: int, *, usual: bool) -> None:
        """Takes the time since the last call.

        The loop waits for the update before, so a slow computation is reported one update late.

        Args:
          usual: whether this was the time of one update alone, without compiling, saving or drawing.
        """
        now = time.monotonic()
        seconds, self._last = now - self._last, now
        if not usual:
            return
        median = self._seconds.add(seconds)
        if median is not None and seconds > max(_SLOW * median, median + _SLOW_SECONDS):
            self._slow.add(
                step,
                f"update {step} took {seconds:.1f} s on {socket.gethostname()} "
                f"({self._reading:.1f} s of them to wait for data), usually {median:.2g} s",
            )

    def gradient(self, step: int, norm: float, *, last_good: str) -> None:
        """Receives the norm of a finite gradient, and a sentence about the last good checkpoint."""
        median = self._norms.add(norm)
        if median is not None and norm > _EXPLODING * median > 0 and distributed.is_first():
            self._exploding.add(
                step,
                f"the gradient of update {step} has norm {norm:.3g} on {socket.gethostname()}, usually "
                f"{median:.3g}; {last_good}",
            )


class _Usual:
    """The median of the last values."""

    def __init__(self):
        self._values: collections.deque[float] = collections.deque(maxlen=_USUAL_OF)

    def add(self, value: float) -> float | None:
        """Adds a value and returns the median of those before it; None during the warm-up."""
        median = statistics.median(self._values) if len(self._values) >= _WARM_UP else None
        self._values.append(value)
        return median


class _Notes:
    """Prints notes of one kind, and counts those that come too soon after the last one."""

    def __init__(self):
        self._next_step, self._left_out = 0, 0

    def add(self, step: int, text: str) -> None:
        """Prints the note, or counts it for the next one."""
        if step < self._next_step:
            self._left_out += 1
            return
        more = f" ({self._left_out} more since the last note)" if self._left_out else ""
        print(f"note: {text}{more}", file=sys.stderr, flush=True)
        self._next_step, self._left_out = step + _QUIET, 0
