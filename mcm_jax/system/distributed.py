"""Several processes that work on one run, on one or more hosts: how they find each other and agree.

Every host runs the same command (on SLURM, one process per GPU). All of them compute; the first one also
writes all files other than checkpoints and prints.
"""

import atexit
import contextlib
import os
import signal
import sys
import threading
import time
import warnings
import zlib
from collections.abc import Generator
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from mcm_jax.system import software
from mcm_jax.system.errors import InputError

COORDINATOR, COUNT, INDEX = "MCM_COORDINATOR", "MCM_NUM_PROCESSES", "MCM_PROCESS_ID"

_WAITING_SECONDS = 30.0
# How long processes may take to end together, one of them still writing.
_PARTING_SECONDS = 120.0
# How long a new file may take to appear on another host: longer than NFS caches.
_SHARED_SECONDS = 90.0


@contextlib.contextmanager
def joined() -> Generator[None, None, None]:
    """Joins the processes that were started together; a single process stays on its own.

    Enter it before JAX first computes. MCM_COORDINATOR=HOST:PORT (of process 0), MCM_NUM_PROCESSES and
    MCM_PROCESS_ID identify the processes. Without them jax.distributed detects the cluster: SLURM (srun), TPU
    pods, GKE multislice and Open MPI. With MCM_NUM_PROCESSES=1 a process never waits for others.

    A process that fails exits at once; JAX then ends the others, which wait for it.

    Raises:
      InputError: the variables are incomplete or wrong, or the processes run different code.
    """
    _join()
    try:
        require_same_code()
        yield
    except InputError:
        # All processes raise it together and end as after a successful run. A process that raised it alone
        # would wait for the others in vain.
        if are_several():
            _leave_after(_PARTING_SECONDS, 2)
        raise
    except SystemExit:
        raise
    except BaseException as error:
        if are_several():
            # The handler registered last runs first: before JAX's own, which waits for the other processes.
            atexit.register(_leave, 130 if isinstance(error, KeyboardInterrupt) else 1)
        raise


def are_several() -> bool:
    """Whether several processes have joined. Does not start JAX's back end in a single process."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_first() -> bool:
    """Whether this process is the one that writes shared files and prints."""
    return not are_several() or jax.process_index() == 0


def say(text: str) -> None:
    """Prints a line in the first process only."""
    if is_first():
        print(text, flush=True)


@contextlib.contextmanager
def fail_together() -> Generator[None, None, None]:
    """A block that all processes leave together: where one fails in it, all of them fail.

    Raises:
      InputError: another process has failed.
    """
    if not are_several():
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

    what: the name of the value, in the plural, for the message.
    """
    if not are_several():
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
    """The first process's answer, in all processes."""
    return bool(multihost_utils.broadcast_one_to_all(np.array(answer))) if are_several() else answer


def all_true(answer: bool) -> bool:
    """Whether the answer is yes in all processes."""
    return bool(multihost_utils.process_allgather(np.array(answer)).all()) if are_several() else answer


def exists(path: Path) -> bool:
    """Whether the first process sees a file in a directory that all share; the others wait until they do too.

    Raises:
      InputError: another process still does not see it after a long wait.
    """
    found = broadcast(path.exists())
    if found and are_several():
        with fail_together():
            if not _appears(path):
                raise InputError(
                    f"{path} exists for process 0 but not for process {jax.process_index()}; name a "
                    "directory that all processes share"
                )
    return found


def require_shared(directory: Path, name: str) -> None:
    """Raises InputError in all processes unless `directory` is the same one for all of them."""
    if not are_several():
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
                    "process 0; all processes need one that they share, on NFS for example"
                )
    finally:
        if is_first():
            probe.unlink(missing_ok=True)


def _appears(path: Path) -> bool:
    until = time.monotonic() + _SHARED_SECONDS
    while not path.exists():
        if time.monotonic() > until:
            return False
        time.sleep(0.5)
    return True


def _join() -> None:
    """See `joined`. Removes JAX's handler of SIGTERM, which swallows the signal: the loop has its own."""
    before = signal.getsignal(signal.SIGTERM)
    _initialize()
    if jax.distributed.is_initialized():
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def _initialize() -> None:
    given = _given()
    if given is not None:
        address, count, index = given
        if count > 1:
            with _waiting(f"{count - 1} more, with {COORDINATOR}={address}"):
                jax.distributed.initialize(address, count, index, cluster_detection_method="deactivate")
        return
    if os.environ.get("SLURM_NTASKS") == "1":
        # One task may have several GPUs; jax.distributed would take the first only.
        return
    try:
        with _waiting("the others of this cluster"), warnings.catch_warnings():
            # In a pod of Kubernetes JAX advises to install what one process does not need.
            warnings.filterwarnings("ignore", message=r"\s*Kubernetes environment detected")
            jax.distributed.initialize()
    except ValueError as error:
        # JAX reports in this way that there is no cluster, which is no mistake.
        if "coordinator_address should be defined" not in str(error):
            raise


def _given() -> tuple[str | None, int, int] | None:
    """(address of process 0, number of processes, index of this one), if the variables are set."""
    values = {name: os.environ.get(name, "") for name in (COORDINATOR, COUNT, INDEX)}
    if not any(values.values()):
        return None
    if values[COUNT] == "1":
        return None, 1, 0
    missing = [name for name, value in values.items() if not value]
    if missing:
        raise InputError(f"{', '.join(missing)} is not set; {COORDINATOR}, {COUNT} and {INDEX} go together")
    host, _, port = values[COORDINATOR].rpartition(":")
    if not host or not port.isdecimal():
        raise InputError(f"{COORDINATOR}={values[COORDINATOR]} is not HOST:PORT")
    for name in (COUNT, INDEX):
        if not values[name].isdecimal():
            raise InputError(f"{name}={values[name]} is not a number")
    count, index = int(values[COUNT]), int(values[INDEX])
    if index >= count:
        raise InputError(f"{INDEX}={index} of {COUNT}={count}: count the processes from 0")
    return values[COORDINATOR], count, index


@contextlib.contextmanager
def _waiting(whom: str) -> Generator[None, None, None]:
    """Reports a long wait: JAX itself says nothing for five minutes, and then gives up."""
    timer = threading.Timer(
        _WAITING_SECONDS, lambda: print(f"waiting for other processes: {whom}", file=sys.stderr, flush=True)
    )
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _leave_after(seconds: float, code: int) -> None:
    timer = threading.Timer(seconds, _leave, [code])
    timer.daemon = True
    timer.start()


def _leave(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
