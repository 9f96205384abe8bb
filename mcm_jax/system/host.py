"""Settings of the process that make XLA's compilers give faster programs.

Those of the CPU were measured on two cores with the train step of configs/openmoji.py and jax 0.10.2; see
docs/speed.md and tests/benchmarks/torch_train_step.py. Those of TPUs are estimates of their compiler
(results/plan/scaling.md), and have no effect without libtpu.
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

# Up to 32 chips the compiler would exchange parameters and gradients piece by piece, between pieces of the
# products they belong to. In the small network's train step on 8 chips the products lose more by that than it
# hides: 0.442 s in place of 0.349. From 64 chips on it does not do so by itself.
_LIBTPU_INIT_ARGS = (
    "--xla_tpu_enable_windowed_einsum_for_all_gather=false",
    "--xla_tpu_enable_windowed_einsum_for_reduce_scatter=false",
)


def tune() -> None:
    """Call before JAX first computes. Keeps what the user has set in XLA_FLAGS and LIBTPU_INIT_ARGS."""
    for variable, flags in (("XLA_FLAGS", _XLA_FLAGS), ("LIBTPU_INIT_ARGS", _LIBTPU_INIT_ARGS)):
        given = os.environ.get(variable, "")
        ours = [flag for flag in flags if flag.partition("=")[0] not in given]
        os.environ[variable] = " ".join([given, *ours]).strip()
    keep_freed_pages()


def keep_freed_pages() -> None:
    """XLA allocates its temporaries anew in every step; faulting the pages in again took a third of it.

    For processes that `tune` does not reach: those that only read and resize images gain as much.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:  # another C library than glibc
        return
    mallopt(_M_ARENA_MAX, 1)
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
