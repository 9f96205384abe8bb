"""Settings of the process that make XLA's CPU back end faster; without effect on accelerators.

Measured on two cores with the train step of configs/openmoji.py and jax 0.10.2; see the README on speed
and tests/benchmarks/torch_train_step.py.
"""

import ctypes
import os
import sys

# The parameters of mallopt(3), from glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8

# In jax 0.10.2 the convolutions of YNNPACK run on one thread; without it Eigen's run on all. Experimental:
# look at it again with every new version of jax.
_XLA_FLAG = "--xla_cpu_experimental_ynn_fusion_type=-LIBRARY_FUSION_TYPE_INDIVIDUAL_CONVOLUTION"


def tune() -> None:
    """Call before JAX first computes. Keeps what the user has set in XLA_FLAGS."""
    flags = os.environ.get("XLA_FLAGS", "")
    if _XLA_FLAG.partition("=")[0] not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {_XLA_FLAG}".strip()
    if sys.platform == "linux":
        _keep_freed_pages()


def _keep_freed_pages() -> None:
    """XLA allocates its temporaries anew in every step; faulting the pages in again took a third of it."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # another C library than glibc
        return
    mallopt(_M_ARENA_MAX, 1)
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
