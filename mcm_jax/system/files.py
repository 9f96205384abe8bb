"""Writes files atomically, locks them, and checks early whether a directory is writable."""

import contextlib
import errno
import fcntl
import json
import os
import socket
import tempfile
import time
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import BinaryIO

from mcm_jax.system.errors import InputError

Content = bytes | str | Callable[[BinaryIO], object]


def write_whole(path: str | Path, content: Content) -> None:
    """Replaces the content of `path` atomically: after a crash it has either the old or the new content.

    The directory is created if missing.

    Args:
      content: bytes, text (written as UTF-8), or a function that writes to an open file.

    Raises:
      OSError: writing failed; the error names `path`, whose content is unchanged.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content.encode() if isinstance(content, str) else content)
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
        raise InputError(f"{path}: cannot write there ({_reason(error)}); choose another path") from error


def append_line(path: Path, record: Mapping[str, object]) -> None:
    """Appends one JSON line in a single write, so that lines of concurrent processes do not interleave.

    If a crash truncated the last line of the file, the new line starts on a line of its own.
    """
    line = json.dumps(record, allow_nan=False).encode() + b"\n"
    with open(path, "a+b", buffering=0) as file:
        if file.tell() > 0:
            file.seek(-1, os.SEEK_END)
            line = line if file.read(1) == b"\n" else b"\n" + line
        written = file.write(line)
        os.fsync(file.fileno())
    if written != len(line):
        raise OSError(errno.ENOSPC, f"only {written} of {len(line)} bytes could be written", str(path))


def require_writable(directory: Path, name: str) -> None:
    """Creates the directory if missing; raises InputError unless a file can be written there.

    Args:
      name: name of the directory in the message, such as a flag.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory) as probe:
            probe.write(b"\0")
    except OSError as error:
        raise InputError(
            f"{name}={directory}: cannot write there ({_reason(error)}); choose another directory"
        ) from error


def require_output(path: Path, flag: str) -> None:
    """Raises InputError unless a file can be written at `path`; creates its directory if missing."""
    if path.is_dir():
        raise InputError(f"{flag}={path} is a directory; specify a file")
    require_writable(path.absolute().parent, f"the directory of {flag}")


@contextlib.contextmanager
def locked(path: Path, name: str) -> Generator[None, None, None]:
    """Locks a file against other processes, and other calls in this one; the file says who holds it.

    The operating system releases the lock when the process ends, even if it is killed. On file systems
    without locks this does nothing.

    Args:
      name: the directory that the lock protects, for the message.

    Raises:
      InputError: another process holds the lock, or the file cannot be opened.
    """
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(open(path, "a+"))
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = path.read_text()[:200].strip() or "another process"
            raise InputError(
                f"{name} is in use by {holder}; stop that one or choose another directory; if it no longer "
                f"exists, delete {path}"
            ) from error
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise InputError(f"{path} cannot be locked ({_reason(error)}); delete it") from error
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {now}\n")
        file.flush()
        yield


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
    while error is not None:
        if isinstance(error, OSError) and is_full(error):
            return error
        # C++ libraries (Orbax's TensorStore, TensorFlow) only mention it in the text of their own errors.
        if (words := os.strerror(errno.ENOSPC)) in str(error):
            return OSError(errno.ENOSPC, words)
        error = error.__cause__ or error.__context__
    return None


def _reason(error: OSError) -> str:
    return error.strerror or str(error)
