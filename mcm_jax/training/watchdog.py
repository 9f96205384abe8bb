"""Ends a process that hangs, after printing what all of its threads are doing.

A dead mount or a lost host makes a process wait for ever, and with it all others, so each watches itself.
"""

import faulthandler
import os
import socket
import sys
import threading
import time

# A signal asks the loop to stop after the current update, which a process that hangs never finishes.
_STOP_SECONDS = 120.0
_LOOK_SECONDS = 1.0
# The first process that ends takes the others with it, so it waits until they have printed their stacks too.
_LINGER_SECONDS = 5.0
EXIT_CODE = 1


class Watchdog:
    """A context manager, in which the process ends with exit code 1 unless `alive` is called in time.

    The first call has no longer than the others, although the program is compiled before it.
    """

    def __init__(self, limit_seconds: float, *, stopping: threading.Event):
        """Does nothing yet.

        Args:
          limit_seconds: the longest time between two calls of `alive`; 0: unlimited.
          stopping: set when a signal has asked the loop to stop; then two minutes are the limit.
        """
        self._limit, self._stopping = limit_seconds, stopping
        self._step: int | None = None
        self._last = time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")

    def __enter__(self) -> "Watchdog":
        if self._limit > 0:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()

    def alive(self, step: int) -> None:
        """The loop goes on; `step` updates are done or dispatched."""
        self._step, self._last = step, time.monotonic()

    def stopped(self) -> None:
        """The loop has ended, and the last save begins: a signal no longer shortens the limit."""
        self._stopping, self._last = threading.Event(), time.monotonic()

    def _watch(self) -> None:
        signalled_at = None
        while not self._over.wait(min(_LOOK_SECONDS, self._limit / 4)):
            now, limit, since = time.monotonic(), self._limit, self._last
            if self._stopping.is_set():
                signalled_at = signalled_at or now
                if limit > _STOP_SECONDS:
                    limit, since = _STOP_SECONDS, max(since, signalled_at)
            if now - since > limit:
                self._end(now - self._last)

    def _end(self, seconds: float) -> None:
        after = "no update is done yet" if self._step is None else f"the last was update {self._step}"
        print(
            f"error: training hangs on {socket.gethostname()}, process {os.getpid()}: no progress for "
            f"{seconds:.0f} s ({after}); the stacks of its threads follow, the newest call first",
            file=sys.stderr,
            flush=True,
        )
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        sys.stderr.flush()
        time.sleep(_LINGER_SECONDS)
        os._exit(EXIT_CODE)
