"""Saves the state of a long computation, so that it can continue after an interruption."""

import sys
import time
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import numpy as np

from mcm_jax.system import distributed
from mcm_jax.system.files import write_whole

# Time between two savings: an interruption loses at most this much work, and the step in progress.
EVERY_SECONDS = 60.0

Arrays = dict[str, np.ndarray]
T = TypeVar("T")


class Unfinished:
    """The arrays of one computation in a file. All processes share it; the first one writes."""

    def __init__(self, path: Path):
        self._path, self._written = path, time.monotonic()

    def read(self, check: Callable[[Arrays], object]) -> Arrays | None:
        """The saved arrays, or None if there are none. `check` raises if something is missing from them."""

        def load() -> Arrays:
            with np.load(self._path, allow_pickle=False) as file:
                arrays = dict(file)
            check(arrays)
            return arrays

        arrays = read_kept(self._path, load)
        # Another command may have replaced the file after one process read it and before another did.
        distributed.require_same(_digest(arrays or {}), f"readings of {self._path}")
        return arrays

    def keep(self, arrays: Callable[[], Arrays]) -> None:
        """Writes `arrays()` if the last time was long enough ago."""
        if time.monotonic() - self._written < EVERY_SECONDS or not distributed.is_first():
            return
        found = arrays()
        try:
            write_whole(self._path, lambda file: np.savez(file, allow_pickle=False, **found))
        except OSError as error:  # Continue: the result itself needs little space.
            print(
                f"note: after an interruption this would start from the beginning, as {self._path} can't be "
                f"written ({error})",
                file=sys.stderr,
            )
        self._written = time.monotonic()

    def finish(self) -> None:
        """Deletes the file, once the result is saved elsewhere."""
        if distributed.is_first():
            self._path.unlink(missing_ok=True)


def joined(parts: Mapping[str, Arrays]) -> Arrays:
    """The arrays of several parts, named "part/name"."""
    return {f"{part}/{name}": array for part, arrays in parts.items() for name, array in arrays.items()}


def part(arrays: Arrays, name: str) -> Arrays:
    """The arrays of one part in those of `joined`.

    Raises:
      KeyError: there are none.
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


def read_kept(path: Path, load: Callable[[], T]) -> T | None:
    """What `load` reads from `path`; None if there is no such file, or if it is damaged for any process.

    Raises:
      InputError: the processes need different files, whose names identify their content.
    """
    distributed.require_same(path.name, "data sets, weights or flags")
    if not distributed.exists(path):
        return None
    kept = None
    try:
        kept = load()
    # A damaged file can fail in any way that zip, npy and JSON know; all of them mean the same.
    except Exception as error:
        reason = " ".join(str(error).split())
        print(f"note: {path} is damaged ({reason}); computing it again", file=sys.stderr)
    # If one process has to compute it, all do.
    return kept if distributed.all_true(kept is not None) else None
