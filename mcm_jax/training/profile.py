"""Traces some updates of a run for xprof (TensorBoard's profile plugin)."""

import contextlib
import dataclasses
import pathlib
import sys
import tempfile
from collections.abc import Generator

import jax

from mcm_jax.system import files
from mcm_jax.system.errors import InputError, reason
from mcm_jax.system.paths import Path


@dataclasses.dataclass(frozen=True)
class Profile:
    """Which updates to trace.

    Attributes:
      after: number of updates of this start before the trace, at least 1: the first compiles the program.
      updates: number of whole updates in the trace.

    Examples:
      >>> Profile.parse("10,3")
      Profile(after=10, updates=3)
    """

    after: int
    updates: int

    @classmethod
    def parse(cls, text: str) -> "Profile":
        """Parses START,STEPS; raises InputError if it is anything else."""
        parts = text.split(",")
        if len(parts) != 2 or not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
            raise InputError(
                f"--profile={text} is not START,STEPS: the number of updates before the trace, and in it, "
                "both at least 1"
            )
        return cls(*map(int, parts))


class Tracer:
    """Traces the updates of a profile and writes the result to workdir/profile.

    Each process writes a file of its own. A failure is reported, and training goes on.
    """

    def __init__(self, profile: Profile, workdir: Path, *, first_step: int):
        """first_step: number of updates done before this start."""
        self._first = first_step + profile.after
        # When the end of an update is known, the next one has begun already; the trace has it in part.
        self._last = self._first + 1 + profile.updates
        # The directories that xprof looks for: a run of the plugin `profile`.
        self._target = workdir / "profile" / "plugins" / "profile" / f"update_{self._first}"
        self._directory: tempfile.TemporaryDirectory[str] | None = None
        self._is_done = False

    def finished(self, step: int) -> None:
        """Called when the devices have finished update number `step`."""
        if self._is_done:
            return
        if self._directory is None and step >= self._first:
            with self._reporting_failure():
                self._directory = tempfile.TemporaryDirectory()
                jax.profiler.start_trace(self._directory.name)
        elif step >= self._last:
            self.stop()

    def stop(self) -> None:
        """Ends the trace and writes it; reports if there is none because the run has ended before."""
        if self._is_done:
            return
        self._is_done = True
        if self._directory is None:
            print(f"note: nothing was traced, as update {self._first + 1} was not reached", file=sys.stderr)
            return
        with self._directory as directory, self._reporting_failure():
            jax.profiler.stop_trace()
            for path in sorted(pathlib.Path(directory).rglob("*")):
                if path.is_file():
                    # Processes on one host name their files alike.
                    files.write_whole(self._target / f"{jax.process_index()}.{path.name}", path.read_bytes())

    @contextlib.contextmanager
    def _reporting_failure(self) -> Generator[None, None, None]:
        try:
            yield
        except Exception as error:  # The profiler raises almost any kind.
            self._is_done = True
            print(f"note: no profile in {self._target} ({reason(error)})", file=sys.stderr, flush=True)
