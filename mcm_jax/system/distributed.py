"""Coordinates multiple processes that work on one run, on one or more hosts.

All hosts run the same command (on SLURM, one process per GPU). All processes compute; only the first one
prints, and writes all files other than checkpoints.
"""

import atexit
import contextlib
import os
import signal
import socket
import sys
import threading
import time
import warnings
import zlib
from collections.abc import Generator

import jax
import numpy as np
from jax.experimental import multihost_utils

from mcm_jax.system import software
from mcm_jax.system.errors import InputError
from mcm_jax.system.paths import Path

COORDINATOR, COUNT, INDEX = "MCM_COORDINATOR", "MCM_NUM_PROCESSES", "MCM_PROCESS_ID"

_WAITING_SECONDS = 30.0
# A process without a heartbeat for this long counts as dead, and JAX ends the others.
_HEARTBEAT_SECONDS = 100
# Time for processes to exit together, while one of them may still be writing.
_EXIT_SECONDS = 120.0
# Time for a new file to appear on another host; longer than NFS caches entries.
_SHARED_SECONDS = 90.0


@contextlib.contextmanager
def joined() -> Generator[None, None, None]:
    """Connects the processes that were started together; does nothing for a single process.

    Enter this context before JAX first computes. MCM_COORDINATOR=HOST:PORT (of process 0), MCM_NUM_PROCESSES
    and MCM_PROCESS_ID identify the processes. Without them jax.distributed detects the cluster: SLURM (srun),
    TPU pods, GKE multislice and Open MPI. With MCM_NUM_PROCESSES=1 a process never waits for others.

    A process that fails says so in one line and exits immediately. JAX ends the others, which wait for it,
    after 100 seconds without its heartbeat.

    Raises:
      InputError: the variables are incomplete or wrong, or the processes run different code.
    """
    _join()
    try:
        require_same_code()
        yield
    except InputError:
        # Usually all processes raise it together and exit as after a successful run. A process that raised it
        # alone would wait for the others forever, so it exits after a timeout.
        if is_multi_process():
            _exit_after(_EXIT_SECONDS, 2)
        raise
    except SystemExit:
        raise
    except BaseException as error:
        if is_multi_process():
            # The last registered handler runs first, before JAX's own, which waits for the other processes.
            atexit.register(_exit_now, 130 if isinstance(error, KeyboardInterrupt) else 1)
            if isinstance(error, Exception):
                _report_failure(error)
        raise


def is_multi_process() -> bool:
    """Whether there are several processes. Does not initialize JAX's backend in a single process."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_first() -> bool:
    """Whether this process is the one that writes shared files and prints."""
    return not is_multi_process() or jax.process_index() == 0


def say(text: str) -> None:
    """Prints a line in the first process only."""
    if is_first():
        print(text, flush=True)


@contextlib.contextmanager
def fail_together() -> Generator[None, None, None]:
    """Waits for all processes at the end of a block; if one of them fails in it, all of them fail.

    Raises:
      InputError: another process has failed.
    """
    if not is_multi_process():
        yield
        return
    failed = None
    try:
        yield
    except Exception as error:
        failed = error
    all_failed = multihost_utils.process_allgather(np.array(failed is not None))
    if failed is not None:
        raise failed
    if all_failed.any():
        first = int(np.argmax(all_failed))
        raise InputError(f"process {first} of {len(all_failed)} has failed; see its output")


def require_same(value: object, what: str) -> None:
    """Raises InputError in all processes unless `value` has the same repr in all of them.

    Args:
      what: name of the value for the message, in the plural.
    """
    if not is_multi_process():
        return
    hashes = multihost_utils.process_allgather(np.uint32(zlib.crc32(repr(value).encode())))
    if (hashes != hashes[0]).any():
        other = int(np.argmax(hashes != hashes[0]))
        raise InputError(
            f"{what} of processes 0 and {other} differ; start all processes with the same command, from the "
            "same checkout, and with directories that all of them share"
        )


def require_same_code() -> None:
    """Raises InputError in all processes unless they run the same source files and library versions."""
    require_same(software.source_hash(), "the source files of mcm_jax")
    require_same(software.library_versions(), "the versions of Python and its libraries")


def broadcast(answer: bool) -> bool:
    """Returns the first process's answer in all processes."""
    return bool(multihost_utils.broadcast_one_to_all(np.array(answer))) if is_multi_process() else answer


def all_true(answer: bool) -> bool:
    """Whether the answer is True in all processes."""
    return bool(multihost_utils.process_allgather(np.array(answer)).all()) if is_multi_process() else answer


def exists(path: Path) -> bool:
    """Whether a file in a shared directory exists for the first process; the others wait until they see it.

    Raises:
      InputError: another process does not see the file after a long wait.
    """
    found = broadcast(path.exists())
    if found and is_multi_process():
        with fail_together():
            if not _appears(path):
                raise InputError(
                    f"{path} exists for process 0 but not for process {jax.process_index()}; use a "
                    "directory that all processes share"
                )
    return found


def require_shared(directory: Path, name: str) -> None:
    """Raises InputError in all processes unless they share `directory`."""
    if not is_multi_process():
        return
    token = int(multihost_utils.broadcast_one_to_all(np.int32(time.time_ns() % 2**31)))
    probe = directory / f".shared.{token}"
    try:
        with fail_together():
            if is_first():
                probe.touch()
        with fail_together():
            if not _appears(probe):
                raise InputError(
                    f"{name}={directory} is another directory in process {jax.process_index()} than in "
                    "process 0; use one that all processes share, for example in a bucket or on NFS"
                )
    finally:
        if is_first():
            with contextlib.suppress(Exception):  # The storage may fail; the probe is empty.
                probe.unlink(missing_ok=True)


def _appears(path: Path) -> bool:
    until = time.monotonic() + _SHARED_SECONDS
    while not path.exists():
        if time.monotonic() > until:
            return False
        time.sleep(0.5)
    return True


def _join() -> None:
    """See `joined`. Removes JAX's SIGTERM handler, which swallows the signal; the training loop has one."""
    before = signal.getsignal(signal.SIGTERM)
    _initialize()
    if jax.distributed.is_initialized():
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def _initialize() -> None:
    given = _from_environment()
    if given is not None:
        address, count, index = given
        if count > 1:
            with _waiting(f"{count - 1} more, with {COORDINATOR}={address}"):
                jax.distributed.initialize(
                    address,
                    count,
                    index,
                    cluster_detection_method="deactivate",
                    heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
                )
        return
    if os.environ.get("SLURM_NTASKS") == "1":
        # A single task may use several GPUs, but jax.distributed would use only the first.
        return
    try:
        with _waiting("all others of this cluster"), warnings.catch_warnings():
            # In a Kubernetes pod, JAX recommends a package that a single process does not need.
            warnings.filterwarnings("ignore", message=r"\s*Kubernetes environment detected")
            jax.distributed.initialize(heartbeat_timeout_seconds=_HEARTBEAT_SECONDS)
    except ValueError as error:
        # This error means that there is no cluster, which is fine.
        if "coordinator_address should be defined" not in str(error):
            raise


def _from_environment() -> tuple[str | None, int, int] | None:
    """(address of process 0, number of processes, index of this one) if the variables are set, else None."""
    values = {name: os.environ.get(name, "") for name in (COORDINATOR, COUNT, INDEX)}
    if not any(values.values()):
        return None
    if values[COUNT] == "1":
        return None, 1, 0
    missing = [name for name, value in values.items() if not value]
    if missing:
        raise InputError(f"{', '.join(missing)} is not set; set {COORDINATOR}, {COUNT} and {INDEX} together")
    host, _, port = values[COORDINATOR].rpartition(":")
    if not host or not port.isdecimal():
        raise InputError(f"{COORDINATOR}={values[COORDINATOR]} is not HOST:PORT")
    for name in (COUNT, INDEX):
        if not values[name].isdecimal():
            raise InputError(f"{name}={values[name]} is not a number")
    count, index = int(values[COUNT]), int(values[INDEX])
    if index >= count:
        raise InputError(f"{INDEX}={index} of {COUNT}={count}: process IDs start at 0")
    return values[COORDINATOR], count, index


@contextlib.contextmanager
def _waiting(whom: str) -> Generator[None, None, None]:
    """Reports a long wait on stderr: JAX itself prints nothing for five minutes and then fails."""
    timer = threading.Timer(
        _WAITING_SECONDS, lambda: print(f"waiting for other processes: {whom}", file=sys.stderr, flush=True)
    )
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _report_failure(error: Exception) -> None:
    """Prints one line before the traceback, which doesn't state the process and may be very long."""
    reason = next(iter(str(error).strip().splitlines()), "")
    print(
        f"error: process {jax.process_index()} of {jax.process_count()}, on {socket.gethostname()}, fails: "
        f"{type(error).__name__}: {reason}; the others end within {_HEARTBEAT_SECONDS} s",
        file=sys.stderr,
        flush=True,
    )


def _exit_after(seconds: float, code: int) -> None:
    timer = threading.Timer(seconds, _exit_now, [code])
    timer.daemon = True
    timer.start()


def _exit_now(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
