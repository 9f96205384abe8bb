"""Adds up what the time of a training run is spent on; its goodput is the share spent on updates."""

import contextlib
import time
from collections.abc import Generator
from typing import Literal, get_args

# start: from the creation of the clock to the end of the first update, which compiles the program
# updates: computing, while the host waits for the devices
# data: waiting for the next batch
# checkpoints: waiting for saves, which go on in the background
# samples: drawing grids of samples
Cause = Literal["start", "updates", "data", "checkpoints", "samples"]
CAUSES: tuple[Cause, ...] = get_args(Cause)


class Clock:
    """Every moment since its creation belongs to one cause.

    Examples:
      >>> clock = Clock()
      >>> clock.updates_begin()
      >>> with clock.spent("data"):
      ...     batch = [1, 2, 3]
      >>> sorted(clock.seconds())
      ['checkpoints', 'data', 'samples', 'start', 'updates']
    """

    def __init__(self):
        self._cause: Cause = "start"
        self._since = time.monotonic()
        self._seconds: dict[Cause, float] = dict.fromkeys(CAUSES, 0.0)

    def updates_begin(self) -> None:
        """The first update is done, so that the start is over."""
        if self._cause == "start":
            self._switch("updates")

    @contextlib.contextmanager
    def spent(self, cause: Cause) -> Generator[None, None, None]:
        """The time in the block belongs to `cause`, unless the run is still starting."""
        before = self._cause
        if before == "start":
            yield
            return
        self._switch(cause)
        try:
            yield
        finally:
            self._switch(before)

    def seconds(self) -> dict[Cause, float]:
        """Seconds spent on each cause so far."""
        self._switch(self._cause)
        return dict(self._seconds)

    def _switch(self, cause: Cause) -> None:
        now = time.monotonic()
        self._seconds[self._cause] += now - self._since
        self._cause, self._since = cause, now
