"""Locks that let only one process use a directory: a file lock, or a lease in a bucket."""

import contextlib
import errno
import fcntl
import json
import os
import pathlib
import socket
import sys
import threading
import time
import uuid
from collections.abc import Generator

import fsspec.core

from mcm_jax.system import files, json_text, paths
from mcm_jax.system.errors import InputError, reason
from mcm_jax.system.paths import Path

# A lease that was not renewed for LEASE_SECONDS is taken over: its process no longer exists, or hangs.
LEASE_SECONDS = 60.0
_RENEWAL_SECONDS = 10.0
_POLL_SECONDS = 1.0


def locked(path: Path, name: str) -> contextlib.AbstractContextManager[None]:
    """Locks a file against other processes, and other calls in this one; the file says who holds it.

    A local lock ends with its process, even if that is killed, and does nothing on file systems without
    locks. A lease in a bucket is renewed by a thread. After its process is killed, the same machine can lock
    the file at once, another one after LEASE_SECONDS.

    Args:
      name: the directory that the lock protects, for the message.

    Raises:
      InputError: another process holds the lock, or the file cannot be opened.
    """
    return (_leased if paths.is_in_bucket(path) else _file_locked)(path, name)


@contextlib.contextmanager
def _file_locked(path: Path, name: str) -> Generator[None, None, None]:
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(open(path, "a+"))
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise _in_use(path, name, path.read_text()[:200].strip()) from error
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise InputError(f"{path} cannot be locked ({reason(error)}); delete it") from error
        file.truncate(0)
        file.write(f"{_this_process()}\n")
        file.flush()
        yield


@contextlib.contextmanager
def _leased(path: Path, name: str) -> Generator[None, None, None]:
    lease = _Lease(path, name)
    lease.acquire()
    ended = threading.Event()
    renewal = threading.Thread(target=lease.keep, args=(ended,), daemon=True)
    renewal.start()
    try:
        yield
    finally:
        ended.set()
        renewal.join()
        with contextlib.suppress(OSError):
            lease.release()


class _Lease:
    """An object in a bucket that says who uses a directory, with a counter that its holder increases.

    Waiting processes compare contents, not times: clocks of several machines differ. If two take over the
    same lease at once, one of them loses it, notices that at its next renewal and exits.
    """

    def __init__(self, path: Path, name: str):
        self._path, self._name, self._token, self._renewals = path, name, uuid.uuid4().hex, 0
        self._holder = _this_process()

    def acquire(self) -> None:
        """Creates the object; replaces that of a process that no longer exists.

        Raises:
          InputError: another process renews it.
        """
        while not self._create():
            found = files.read_if_exists(self._path)
            if found is None:
                continue
            holder = _content(found)
            if not _has_ended(holder):
                self._wait_for_end(found, str(holder.get("holder", "another process")))
            if files.read_if_exists(self._path) == found:
                files.unlink(self._path)

    def release(self) -> None:
        """Deletes the object, unless another process has taken it over."""
        if self._is_own(files.read_if_exists(self._path)):
            files.unlink(self._path)

    def _is_own(self, found: bytes | None) -> bool:
        return found is not None and _content(found).get("token") == self._token

    def keep(self, ended: threading.Event) -> None:
        """Renews the lease until `ended`; exits the process if another one has taken it over."""
        while not ended.wait(_RENEWAL_SECONDS):
            # The storage may fail for a while. Its next answer shows whether the lease is lost.
            with contextlib.suppress(OSError):
                found = files.read_if_exists(self._path)
                if not self._is_own(found):
                    holder = "" if found is None else f" by {_content(found).get('holder')}"
                    print(f"error: {self._name} was taken over{holder}", file=sys.stderr, flush=True)
                    os._exit(2)  # Anything that this process still saved would mix with the other's files.
                self._renewals += 1
                files.write_whole(self._path, self._text())

    def _create(self) -> bool:
        system, path = fsspec.core.url_to_fs(str(self._path))
        with files.storage_errors(self._path):
            try:
                system.pipe_file(path, self._text().encode(), mode="create")
            except FileExistsError:
                # The answer to an earlier request may have been lost.
                return self._is_own(files.read_if_exists(self._path))
        return True

    def _wait_for_end(self, found: bytes, holder: str) -> None:
        """Waits LEASE_SECONDS; raises InputError as soon as the lease changes."""
        print(f"waiting to see whether {holder} still uses {self._name}", file=sys.stderr, flush=True)
        until = time.monotonic() + LEASE_SECONDS
        while time.monotonic() < until:
            time.sleep(_POLL_SECONDS)
            now = files.read_if_exists(self._path)
            if now is None:
                return
            if now != found:
                raise _in_use(self._path, self._name, str(_content(now).get("holder", "")))

    def _text(self) -> str:
        return json.dumps(
            {
                "holder": self._holder,
                "process": _identity(os.getpid()),
                "token": self._token,
                "renewals": self._renewals,
            }
        )


def _content(text: bytes) -> dict[str, object]:
    try:
        found = json_text.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _has_ended(holder: dict[str, object]) -> bool:
    """Whether the holder was a process of this machine, and of this container, that no longer exists."""
    process, own = holder.get("process"), _identity(os.getpid())
    if not isinstance(process, dict) or own is None or not isinstance(process.get("number"), int):
        return False
    here = process.get("machine") == own["machine"] and process.get("container") == own["container"]
    return here and _identity(process["number"]) != process


def _identity(process: int) -> dict[str, object] | None:
    """What tells a process from all others, on Linux; None if it does not exist, or on another system.

    Containers may share the name of their host, and reuse the numbers of processes.
    """
    try:
        return {
            "number": process,
            "machine": pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
            "container": os.readlink("/proc/self/ns/pid"),
            "started": pathlib.Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19],
        }
    except OSError:
        return None


def _this_process() -> str:
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    return f"process {os.getpid()} on {socket.gethostname()} since {now}"


def _in_use(path: Path, name: str, holder: str) -> InputError:
    return InputError(
        f"{name} is in use by {holder or 'another process'}; stop that one or choose another directory; if "
        f"it no longer exists, delete {path}"
    )
