"""Settings of the process that make XLA's CPU back end faster; without effect on accelerators.

Measured on two cores with the train step of configs/openmoji.py and jax 0.10.2; see the README on speed
and tests/benchmarks/torch_train_step.py.
"""

import ctypes
import os
import sys

# The parameters of mallopt(3), from glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8

# Look at them again with every new version of jax.
_XLA_FLAGS = (
    # In jax 0.10.2 the convolutions of YNNPACK, experimental, run on one thread; Eigen's run on all.
    "--xla_cpu_experimental_ynn_fusion_type=-LIBRARY_FUSION_TYPE_INDIVIDUAL_CONVOLUTION",
    # Operations that don't need each other's results run at the same time.
    "--xla_cpu_enable_concurrency_optimized_scheduler=true",
)


def tune() -> None:
    """Call before JAX first computes. Keeps what the user has set in XLA_FLAGS."""
    given = os.environ.get("XLA_FLAGS", "")
    ours = [flag for flag in _XLA_FLAGS if flag.partition("=")[0] not in given]
    os.environ["XLA_FLAGS"] = " ".join([given, *ours]).strip()
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
