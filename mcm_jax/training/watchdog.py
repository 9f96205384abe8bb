"""Ends a process that hangs, after printing what all of its threads are doing.

A dead mount or a lost host makes a process wait for ever, and with it all others, so each watches itself.
"""

import faulthandler
import os
import socket
import sys
import threading
import time

# How often it looks. Looks are counted, not time, so that a process that was suspended is not ended.
_LOOK_SECONDS = 1.0
# The first process that ends takes the others with it, so it waits until they have printed their stacks too.
_LINGER_SECONDS = 5.0
EXIT_CODE = 1


class Watchdog:
    """A context manager, in which the process ends with exit code 1 unless `alive` is called in time.

    The first update has the same limit, including compiling.
    """

    def __init__(self, limit_seconds: float):
        """limit_seconds: the longest time between two calls of `alive`; 0: unlimited."""
        self._limit = limit_seconds
        self._step: int | None = None
        self._calls = 0
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
        self._step = step
        self._calls += 1

    def _watch(self) -> None:
        calls, seconds = self._calls, 0.0
        while not self._over.wait(pause := min(_LOOK_SECONDS, self._limit / 4)):
            seconds = seconds + pause if self._calls == calls else 0.0
            calls = self._calls
            if seconds > self._limit:
                self._end(seconds)

    def _end(self, seconds: float) -> None:
        # In a thread of its own: the output may be on the mount that is dead.
        threading.Thread(target=self._report, args=(seconds,), daemon=True).start()
        time.sleep(_LINGER_SECONDS)
        os._exit(EXIT_CODE)

    def _report(self, seconds: float) -> None:
        after = "no update is done yet" if self._step is None else f"the last was update {self._step}"
        print(
            f"error: training hangs on {socket.gethostname()}, process {os.getpid()}: no progress for "
            f"{seconds:.0f} s ({after}); the stacks of its threads follow, the newest call first",
            file=sys.stderr,
            flush=True,
        )
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        sys.stderr.flush()
