"""Copies of data sets in a bucket: reading record by record would take a request for each.

Copies lie in MCM_LOCAL_DATA, by default in a directory for temporary files, for all runs on a machine. At
every start, their sizes are compared with the bucket, but not their content.
"""

import fcntl
import os
import pathlib
import tempfile
from typing import cast

import fsspec.core
from etils import epath

from mcm_jax.data import layout
from mcm_jax.system import files, paths, progress
from mcm_jax.system.errors import InputError
from mcm_jax.system.paths import Path

# Files copied at a time; their parts are requested concurrently.
_FILES = 16


def local_copy(directory: Path) -> pathlib.Path:
    """Returns `directory`, or a local copy of it if it is a data set in a bucket.

    Files that exist with the right size are not copied again, unless the data set's summary differs from that
    of the copy: then its images do too. Other processes on this machine wait for the copy.

    Raises:
      InputError: there is no space, or a file has another size than in the bucket.
      OSError: reading the bucket failed.
    """
    if not isinstance(directory, epath.Path):
        return directory
    copy = place() / str(directory).removeprefix("gs://")
    copy.mkdir(parents=True, exist_ok=True)
    with open(copy.with_name(f".{copy.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _update(copy, directory)
    return copy


def place() -> pathlib.Path:
    """The directory for copies, and for data sets while they are written to a bucket; created if missing."""
    given = os.environ.get(layout.LOCAL_DATA)
    if given and paths.is_in_bucket(given):
        raise InputError(f"{layout.LOCAL_DATA}={given} must be a local directory")
    path = pathlib.Path(tempfile.gettempdir()) / f"mcm_jax_data_{os.getuid()}"
    path = pathlib.Path(given).expanduser() if given else path
    path.mkdir(parents=True, exist_ok=True)
    return path


def _update(copy: pathlib.Path, directory: epath.Path) -> None:
    with files.storage_errors(directory):
        system, root = fsspec.core.url_to_fs(str(directory))
        found = cast(dict[str, dict[str, int]], system.find(root, detail=True))
        sizes = {
            name.removeprefix(f"{root}/"): info["size"]
            for name, info in found.items()
            if not name.endswith("/")  # An object that marks a directory.
        }
    summary = files.read_if_exists(directory / layout.SUMMARY_FILE)
    if summary is None or files.read_if_exists(copy / layout.SUMMARY_FILE) != summary:
        for path in copy.iterdir():
            path.unlink()
        if summary is not None:
            # First, so that a copy continues after a kill.
            files.write_whole(copy / layout.SUMMARY_FILE, summary)
    missing = [name for name, size in sizes.items() if _size(copy / name) != size]
    _require_space(copy, sum(sizes[name] for name in missing))
    parts = [missing[start : start + _FILES] for start in range(0, len(missing), _FILES)]
    for part in progress.bar(parts, f"copying {directory}"):
        with files.storage_errors(directory):
            temporary = [str(copy / f"{name}.part") for name in part]
            system.get([f"{root}/{name}" for name in part], temporary)
        for name in part:
            (copy / f"{name}.part").rename(copy / name)
    wrong = [name for name, size in sizes.items() if _size(copy / name) != size]
    if wrong:
        raise InputError(f"{directory / wrong[0]} was cut off while it was copied; run the command again")


def _size(path: pathlib.Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def _require_space(copy: pathlib.Path, needed: int) -> None:
    free = files.free_bytes(copy)
    if free is not None and free < needed:
        raise InputError(
            f"{copy} has {free / 1e9:.3f} GB free, but a copy of the data set needs {needed / 1e9:.3f} GB; "
            f"set {layout.LOCAL_DATA} to a directory with enough space"
        )
