"""Saves the state of a long computation, so that it can resume after an interruption."""

import sys
import time
import zlib
from collections.abc import Callable, Mapping
from typing import TypeVar

import numpy as np

from mcm_jax.system import archives, distributed
from mcm_jax.system.errors import reason
from mcm_jax.system.files import reading, write_whole
from mcm_jax.system.paths import Path

# Time between two saves: an interruption loses at most this much work plus the step in progress.
EVERY_SECONDS = 60.0

Arrays = dict[str, np.ndarray]
T = TypeVar("T")


class Unfinished:
    """A file with the arrays of one computation. All processes read it; only the first one writes it."""

    def __init__(self, path: Path):
        self._path, self._written = path, time.monotonic()

    def read(self, check: Callable[[Arrays], object]) -> Arrays | None:
        """Returns the saved arrays, or None if there are none; `check` must raise if something is missing."""

        def load() -> Arrays:
            with reading(self._path) as file:
                arrays = archives.read_npz(file)
            check(arrays)
            return arrays

        arrays = read_saved(self._path, load)
        # Another command may have replaced the file between the reads of two processes.
        distributed.require_same(_digest(arrays or {}), f"readings of {self._path}")
        return arrays

    def save_if_due(self, arrays: Callable[[], Arrays]) -> None:
        """Saves `arrays()` if the last save was at least EVERY_SECONDS ago."""
        if time.monotonic() - self._written < EVERY_SECONDS or not distributed.is_first():
            return
        found = arrays()
        try:
            write_whole(self._path, lambda file: np.savez(file, allow_pickle=False, **found))
        except OSError as error:  # Continue anyway: the result itself needs little space.
            print(
                f"note: an interrupted computation would start over, because {self._path} can't be "
                f"written ({error})",
                file=sys.stderr,
            )
        self._written = time.monotonic()

    def finish(self) -> None:
        """Deletes the file; call it once the result is saved elsewhere."""
        if distributed.is_first():
            self._path.unlink(missing_ok=True)


def joined(parts: Mapping[str, Arrays]) -> Arrays:
    """Joins the arrays of several parts under names "part/name"."""
    return {f"{part}/{name}": array for part, arrays in parts.items() for name, array in arrays.items()}


def part(arrays: Arrays, name: str) -> Arrays:
    """Extracts the arrays of one part from the output of `joined`.

    Raises:
      KeyError: the part does not exist.
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


def read_saved(path: Path, load: Callable[[], T]) -> T | None:
    """Returns `load()`, which reads `path`; None if the file does not exist or any process finds it damaged.

    Raises:
      InputError: the processes need different files (file names identify the content).
    """
    distributed.require_same(path.name, "data sets, weights or flags")
    if not distributed.exists(path):
        return None
    saved = None
    try:
        saved = load()
    # A damaged file can raise any exception of the zip, npy and JSON readers; all mean the same.
    except Exception as error:
        print(f"note: {path} is damaged ({reason(error)}); computing it again", file=sys.stderr)
    # If one process has to compute it, all do.
    return saved if distributed.all_true(saved is not None) else None
