"""Traces some updates of a run for xprof (TensorBoard's profile plugin)."""

import dataclasses
import pathlib
import sys
import tempfile

import jax

from mcm_jax.system import files
from mcm_jax.system.errors import InputError
from mcm_jax.system.paths import Path


@dataclasses.dataclass(frozen=True)
class Profile:
    """Which updates to trace.

    Attributes:
      after: number of updates of this start before the trace; the first compiles the program.
      updates: number of updates to trace.

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
        if len(parts) != 2 or not all(part.strip().isdecimal() for part in parts) or int(parts[1]) == 0:
            raise InputError(
                f"--profile={text} is not START,STEPS: the number of updates before the trace, and in it"
            )
        return cls(*map(int, parts))


class Tracer:
    """Traces the updates of a profile and writes the result to workdir/profile.

    Each process writes a file of its own. A trace that cannot be written is reported, and training goes on.
    """

    def __init__(self, profile: Profile, workdir: Path, *, first_step: int):
        """first_step: number of updates done before this start."""
        self._first, self._last = first_step + profile.after, first_step + profile.after + profile.updates
        # The directories that xprof looks for: a run of the plugin `profile`.
        self._target = workdir / "profile" / "plugins" / "profile" / f"update_{self._first}"
        self._directory: tempfile.TemporaryDirectory[str] | None = None

    def update(self, step: int) -> None:
        """Called after each update; `step` updates are done or dispatched."""
        if self._directory is None and self._first <= step < self._last:
            self._directory = tempfile.TemporaryDirectory()
            jax.profiler.start_trace(self._directory.name)
        elif self._directory is not None and step >= self._last:
            self.stop()

    def stop(self) -> None:
        """Ends the trace, if there is one, and writes it."""
        if self._directory is None:
            return
        with self._directory as directory:
            jax.profiler.stop_trace()
            self._write(pathlib.Path(directory))
        self._directory, self._last = None, 0

    def _write(self, directory: pathlib.Path) -> None:
        try:
            for path in sorted(directory.rglob("*")):
                if path.is_file():
                    # Processes on one host name their files alike.
                    files.write_whole(self._target / f"{jax.process_index()}.{path.name}", path.read_bytes())
        except (OSError, InputError) as error:
            print(f"note: {self._target} could not be written ({error})", file=sys.stderr, flush=True)
