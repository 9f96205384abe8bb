"""Runs a reader within limits of time and memory, and checks how it refuses a file."""

import contextlib
import resource
import sys
import time
from collections.abc import Callable, Generator
from pathlib import Path

from mcm_jax.system.errors import InputError

SECONDS, BYTES = 2.0, 10**9


@contextlib.contextmanager
def limited() -> Generator[None, None, None]:
    """Fails if the block computes for more than SECONDS; an allocation of BYTES in it is a MemoryError."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    if sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + BYTES, limits[1]))
    began = time.process_time()
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert time.process_time() - began < SECONDS


def refusal(read: Callable[[], object]) -> str | None:
    """The message with which `read` refuses its file; None if it reads it.

    A message must be one printable line, and must not come from an exhausted memory or stack.
    """
    try:
        with limited():
            read()
    except InputError as error:
        cause: BaseException | None = error
        while cause is not None:
            assert not isinstance(cause, MemoryError | RecursionError), cause
            cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
        message = str(error)
        assert message.isprintable() and len(message) < 2000, message
        return message
    return None
