"""What a long computation has so far, in a file, so that it can go on after an interruption."""

import sys
import time
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mcm_jax.system import distributed
from mcm_jax.system.files import write_whole

# What an interruption costs at most, and the step that it was in.
EVERY_SECONDS = 60.0

Arrays = dict[str, np.ndarray]


class Unfinished:
    """The arrays of one computation, for which a file's name stands. Processes share it, the first writes."""

    def __init__(self, path: Path):
        self._path, self._written = path, time.monotonic()

    def read(self, check: Callable[[Arrays], object]) -> Arrays | None:
        """What was kept; None where nothing was. `check` raises where anything is missing."""

        def load() -> Arrays:
            with np.load(self._path, allow_pickle=False) as file:
                arrays = dict(file)
            check(arrays)
            return arrays

        arrays = read_kept(self._path, load)
        # Another command may have replaced it between the reading of two processes.
        distributed.require_same(_digest(arrays or {}), f"readings of {self._path}")
        return arrays

    def keep(self, arrays: Callable[[], Arrays]) -> None:
        """Writes `arrays()` if the last time is long enough ago."""
        if time.monotonic() - self._written < EVERY_SECONDS or not distributed.is_first():
            return
        found = arrays()
        try:
            write_whole(self._path, lambda file: np.savez(file, allow_pickle=False, **found))
        except OSError as error:  # The result itself needs little room.
            print(
                f"note: an interruption will begin anew, can't write {self._path} ({error})", file=sys.stderr
            )
        self._written = time.monotonic()

    def finish(self) -> None:
        """Forgets it: the result stands elsewhere."""
        if distributed.is_first():
            self._path.unlink(missing_ok=True)


def joined(parts: Mapping[str, Arrays]) -> Arrays:
    """The arrays of several parts under "part/name"."""
    return {f"{part}/{name}": array for part, arrays in parts.items() for name, array in arrays.items()}


def part(arrays: Arrays, name: str) -> Arrays:
    """One part's arrays out of `joined`.

    Raises:
      KeyError: it is not there.
    """
    found = {key.partition("/")[2]: value for key, value in arrays.items() if key.startswith(name + "/")}
    if not found:
        raise KeyError(name)
    return found


def _digest(arrays: Arrays) -> int:
    digest = 0
    for name in sorted(arrays):
        digest = zlib.crc32(np.ascontiguousarray(arrays[name]).tobytes(), zlib.crc32(name.encode(), digest))
    return digest


def read_kept(path: Path, load: Callable[[], Any]) -> Any | None:
    """What `load` reads from `path`; None where there is no such file or it is damaged, in any process.

    Raises:
      InputError: processes want different files; their names say what is in them.
    """
    distributed.require_same(path.name, "data sets, weights or flags")
    if not distributed.exists(path):
        return None
    kept = None
    try:
        kept = load()
    # A damaged file can fail in any way that zip, npy and JSON know; each means the same.
    except Exception as error:
        reason = " ".join(str(error).split())
        print(f"note: {path} is damaged ({reason}); computing it again", file=sys.stderr)
    # Computing is the work of all.
    return kept if distributed.all_true(kept is not None) else None
