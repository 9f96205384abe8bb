"""Reads, lists and writes files, on local file systems and in buckets.

A file is written atomically. A bucket supports neither renaming nor appending, and needs neither: an object
appears only once it is complete, and each appended line is an object of its own, so that no process rewrites
the lines of another one.
"""

import contextlib
import errno
import io
import json
import os
import pathlib
import re
import shutil
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import BinaryIO, TextIO, cast

import fsspec.core
from etils import epath

from mcm_jax.system.errors import InputError, reason
from mcm_jax.system.paths import Path, absolute, as_path

# In messages of TensorStore, which reads and writes arrays: the storage has failed, no file is damaged.
STORAGE_FAILURES = (
    "PERMISSION_DENIED",
    "UNAUTHENTICATED",
    "RESOURCE_EXHAUSTED",
    "UNAVAILABLE",
    "DEADLINE_EXCEEDED",
)
_DISK_FAILURES = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ESTALE, errno.ETIMEDOUT)
# Packages with the errors of a bucket's client.
_CLIENTS = ("aiohttp", "gcsfs", "google")
Content = bytes | str | Callable[[BinaryIO], object]


def write_whole(path: str | Path, content: Content) -> None:
    """Replaces the content of `path` atomically: after a crash it has either the old or the new content.

    The directory is created if missing.

    Args:
      content: bytes, text (written as UTF-8), or a function that writes to an open file.

    Raises:
      OSError: writing failed; the error names `path`, whose content is unchanged.
    """
    path = as_path(path)
    if isinstance(path, epath.Path):
        whole = _as_bytes(content)
        with storage_errors(path):
            path.write_bytes(whole)
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            if callable(content):
                content(file)
            else:
                file.write(_as_bytes(content))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None:
            # The error of a failed write does not contain the file name.
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def _as_bytes(content: Content) -> bytes:
    if callable(content):
        buffer = io.BytesIO()
        content(buffer)
        return buffer.getvalue()
    return content.encode() if isinstance(content, str) else content


def write_output(path: str | Path, content: Content) -> None:
    """Writes to a path chosen by the user, with `write_whole`.

    Raises:
      InputError: the path is not writable.
      OSError: the disk is full, which is not bad input.
    """
    try:
        write_whole(path, content)
    except OSError as error:
        if is_full(error):
            raise
        raise InputError(f"{path}: cannot write there ({reason(error)}); choose another path") from error


def append_line(path: Path, record: Mapping[str, object]) -> None:
    """Appends one JSON line in a single write, so that lines of concurrent processes do not interleave.

    If a crash truncated the last line of the file, the new line starts on a line of its own. In a bucket,
    `path` is a directory with one object for each line, whose names sort by time; see `read_lines`.
    """
    line = json.dumps(record, allow_nan=False).encode() + b"\n"
    if isinstance(path, epath.Path) or path.is_dir():
        write_whole(_new_part(path), line)
        return
    with open(path, "a+b", buffering=0) as file:
        if file.tell() > 0:
            file.seek(-1, os.SEEK_END)
            line = line if file.read(1) == b"\n" else b"\n" + line
        written = file.write(line)
        os.fsync(file.fileno())
    if written != len(line):
        raise OSError(errno.ENOSPC, f"only {written} of {len(line)} bytes could be written", str(path))


@contextlib.contextmanager
def appending(path: Path) -> Generator[TextIO, None, None]:
    """Opens a text file for appending; in a bucket, adds an object to the directory `path` at the end."""
    if not isinstance(path, epath.Path):
        with path.open("a") as file:
            yield file
        return
    buffer = io.StringIO()
    try:
        yield buffer
    finally:
        write_whole(_new_part(path), buffer.getvalue())


def _new_part(path: Path) -> Path:
    """A new object for `path`; the names sort by time."""
    return path / f"{time.time_ns()}_{uuid.uuid4().hex[:8]}{path.suffix}"


def read_lines(path: Path) -> list[bytes]:
    """The lines that `append_line` wrote, in order.

    Raises:
      OSError: reading failed; FileNotFoundError if there are none.
    """
    parts = [read_bytes(part) for part in sorted(entries(path), key=lambda part: part.name)]
    # A file that was copied to a bucket stays an object beside the directory of newer lines.
    if isinstance(path, epath.Path) and (first := read_if_exists(path)) is not None:
        parts.insert(0, first)
    elif not parts:
        parts = [read_bytes(path)]
    return b"".join(parts).split(b"\n")


def entries(directory: Path) -> list[Path]:
    """Everything in a directory; nothing if it does not exist or is a file.

    Raises:
      OSError: reading failed. `is_dir` of a bucket would be False then.
    """
    try:
        if not isinstance(directory, epath.Path):
            return list(directory.iterdir())
        with storage_errors(directory):
            system, root = fsspec.core.url_to_fs(str(directory))
            # It lists an object as its own content, and also objects such as "name/" that mark directories.
            names = {name.removeprefix(root).strip("/") for name in system.ls(root, detail=False)}
            return [directory / name for name in names if name]
    except (FileNotFoundError, NotADirectoryError):
        return []


def read_bytes(path: Path) -> bytes:
    """The content of a file; raises only OSErrors, also for a bucket."""
    with storage_errors(path):
        return path.read_bytes()


@contextlib.contextmanager
def reading(path: Path) -> Generator[io.BufferedIOBase, None, None]:
    """Opens a binary file that can be read in parts."""
    with storage_errors(path), path.open("rb") as file:
        # The objects of fsspec are raw files.
        yield file if isinstance(file, io.BufferedIOBase) else io.BufferedReader(cast(io.RawIOBase, file))


def read_if_exists(path: Path) -> bytes | None:
    """The content of a file; None if it does not exist."""
    try:
        return read_bytes(path)
    except FileNotFoundError:
        return None


def find(directory: Path, ending: str | Path) -> list[Path]:
    """Every path below `directory`, at any depth, that ends in `ending`; sorted."""
    if not isinstance(directory, epath.Path):
        return sorted(directory.glob(f"**/{ending}"))
    found = re.compile(rf"(.*/{re.escape(str(ending))})(/.*)?")
    matches = (found.fullmatch(name) for name in names_below(directory))
    return [directory / name for name in sorted({match[1][1:] for match in matches if match})]


def names_below(directory: epath.Path) -> list[str]:
    """The names of all objects below a directory in a bucket, each with a leading slash; sorted."""
    with storage_errors(directory):
        system, path = fsspec.core.url_to_fs(str(directory))
        # Other programs create objects such as "name/" to mark directories.
        return sorted(name.removeprefix(path) for name in system.find(path) if not name.endswith("/"))


def unlink(path: Path) -> None:
    """Deletes a file if it exists; raises only OSErrors, also for a bucket."""
    with storage_errors(path):
        path.unlink(missing_ok=True)


def size(path: Path) -> int:
    """Size of a file in bytes."""
    with storage_errors(path):
        return path.stat().length if isinstance(path, epath.Path) else path.stat().st_size


def move_into(temporary: pathlib.Path, path: Path) -> None:
    """Moves a complete local file to `path`, on the same file system or in a bucket, atomically."""
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    if not isinstance(path, epath.Path):
        temporary.rename(path)
        return
    with storage_errors(path):
        system, target = fsspec.core.url_to_fs(str(path))
        system.put_file(str(temporary), target)
    temporary.unlink()


def publish_tree(source: Path, target: epath.Path, *, last: str) -> None:
    """Replaces the directory `target` in a bucket by a copy of `source`, which may be local.

    The file `last` marks the directory as complete: it is the first to be deleted and the last to be written.
    """
    names = [str(path.relative_to(source)) for path in _files_below(source)]
    unlink(target / last)
    remove_tree(target)
    with storage_errors(target):
        _copy([name for name in names if name != last], source, target)
        _copy([last], source, target)


def move_directory(source: Path, target: Path) -> None:
    """Moves a directory within its file system or bucket; `target` must not exist."""
    if isinstance(source, epath.Path) and isinstance(target, epath.Path):
        with storage_errors(target):
            _copy([name[1:] for name in names_below(source)], source, target)
        remove_tree(source)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    source.rename(target)


def _copy(names: Sequence[str], source: Path, target: epath.Path) -> None:
    """Copies files with these names to a bucket, concurrently."""
    system, _ = fsspec.core.url_to_fs(str(target))
    copy = system.copy if isinstance(source, epath.Path) else system.put
    if names:
        copy([str(source / name) for name in names], [str(target / name) for name in names])


def _files_below(directory: Path) -> list[Path]:
    if isinstance(directory, epath.Path):
        return [directory / name[1:] for name in names_below(directory)]
    return sorted(path for path in directory.rglob("*") if path.is_file())


def remove_tree(directory: Path) -> None:
    """Deletes a directory and everything in it, if it exists."""
    if isinstance(directory, epath.Path):
        with storage_errors(directory):
            directory.rmtree(missing_ok=True)
    else:
        shutil.rmtree(directory, ignore_errors=True)


def free_bytes(directory: Path) -> int | None:
    """Free space on the file system of a directory; None for a bucket, which has no limit."""
    return None if isinstance(directory, epath.Path) else shutil.disk_usage(directory).free


@contextlib.contextmanager
def storage_errors(path: Path) -> Generator[None, None, None]:
    """Turns any error of a bucket's client into an OSError with a number, a description and `path`."""
    try:
        yield
    except Exception as error:
        if not isinstance(path, epath.Path) or isinstance(error, InputError):
            raise
        words = reason(error)
        numbers = {FileNotFoundError: errno.ENOENT, FileExistsError: errno.EEXIST}
        number = numbers.get(type(error), errno.EACCES if words.startswith("Forbidden") else errno.EIO)
        raise OSError(number, words if number == errno.EIO else os.strerror(number), str(path)) from error


def require_writable(directory: Path, name: str) -> None:
    """Creates the directory if missing; raises InputError unless a file can be written there.

    Args:
      name: name of the directory in the message, such as a flag.
    """
    try:
        if isinstance(directory, epath.Path):
            # Processes that start together need objects of their own.
            probe = directory / f".writable.{uuid.uuid4().hex[:8]}"
            write_whole(probe, b"\0")
            unlink(probe)
            return
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory) as file:
            file.write(b"\0")
    except OSError as error:
        why = reason(error)
        if isinstance(error, FileNotFoundError) and isinstance(directory, epath.Path):
            why = "there is no such bucket"  # Its client reports only the address of the request.
        raise InputError(
            f"{name}={directory}: cannot write there ({why}); choose another directory"
        ) from error


def require_output(path: Path, flag: str) -> None:
    """Raises InputError unless a file can be written at `path`; creates its directory if missing."""
    if path.is_dir():
        raise InputError(f"{flag}={path} is a directory; specify a file")
    require_writable(absolute(path).parent, f"the directory of {flag}")


@contextlib.contextmanager
def writing_to(directory: Path, flag: str, *error_numbers: int) -> Generator[None, None, None]:
    """Turns OSErrors (all of them, or only those with these numbers) into an InputError that names `flag`."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        # ArrayRecord's writer raises RuntimeError if the disk is full.
        cause = error if isinstance(error, OSError) else full_disk_within(error)
        if cause is None or (error_numbers and cause.errno not in error_numbers):
            raise
        raise InputError(
            f"{flag}={directory}: cannot write there ({cause.strerror}); choose a directory with write "
            "access and free space"
        ) from error


def is_full(error: OSError) -> bool:
    """Whether the error means that the disk or the user's quota is full."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def full_disk_within(error: BaseException | None) -> OSError | None:
    """The first error that means a full disk among `error` and its causes; None if there is none."""
    for one in _chain(error):
        if isinstance(one, OSError) and is_full(one):
            return one
        # C++ libraries (Orbax's TensorStore, TensorFlow) only mention it in the text of their own errors.
        if (words := os.strerror(errno.ENOSPC)) in str(one):
            return OSError(errno.ENOSPC, words)
    return None


def failed_storage_within(error: BaseException | None) -> str | None:
    """Describes the first failure of a disk or bucket among `error` and its causes; None if there is none."""
    for one in _chain(error):
        if isinstance(one, OSError) and (
            str(one.filename).startswith("gs://") or (one.filename and one.errno in _DISK_FAILURES)
        ):
            return f"{one.filename}: {reason(one)}"
        # gcsfs raises an OSError without a number if permission is denied.
        forbidden = isinstance(one, OSError) and one.errno is None and str(one).startswith("Forbidden: ")
        if forbidden or type(one).__module__.partition(".")[0] in _CLIENTS:
            return reason(one)
        # TensorStore raises ValueError for everything.
        if "gs://" in str(one) and any(status in str(one) for status in STORAGE_FAILURES):
            return reason(one)
    return None


def _chain(error: BaseException | None) -> Generator[BaseException, None, None]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


class GrowingObject(io.BytesIO):
    """A binary file in a bucket for a log: uploaded as a whole, at most every UPLOAD_SECONDS and on close."""

    UPLOAD_SECONDS = 30.0

    def __init__(self, path: epath.Path):
        super().__init__()
        self._path, self._due = path, time.monotonic()

    def flush(self) -> None:
        """Uploads the content if it is due; a failure is reported, and the next upload repeats it."""
        if time.monotonic() >= self._due:
            self._upload()

    def close(self) -> None:
        """Uploads the content."""
        if not self.closed:
            self._upload()
        super().close()

    def _upload(self) -> None:
        try:
            write_whole(self._path, self.getvalue())
        except OSError as error:
            print(f"note: {self._path} could not be written ({reason(error)})", file=sys.stderr, flush=True)
        self._due = time.monotonic() + self.UPLOAD_SECONDS
