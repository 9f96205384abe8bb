"""Process settings for faster compiled programs.

The CPU settings were measured on two cores with the train step of configs/openmoji.py and jax 0.10.2; see
docs/speed.md and tests/benchmarks/torch_train_step.py. The TPU settings are based on the compiler's estimates
(results/plan/scaling.md) and have no effect without libtpu.
"""

import ctypes
import os
import sys

# The parameters of mallopt(3), from glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8

# Check these again with each new version of jax.
_XLA_FLAGS = (
    # In jax 0.10.2 the experimental YNNPACK convolutions use one thread; Eigen's use all.
    "--xla_cpu_experimental_ynn_fusion_type=-LIBRARY_FUSION_TYPE_INDIVIDUAL_CONVOLUTION",
    # Runs independent operations concurrently.
    "--xla_cpu_enable_concurrency_optimized_scheduler=true",
)

# On up to 32 chips, the compiler by default splits matrix products to overlap them with the exchange of
# parameters and gradients (windowed einsum). In the small network's train step on 8 chips this costs more
# than it hides: 0.442 s instead of 0.349 s. On 64 or more chips the compiler does not do it.
_LIBTPU_INIT_ARGS = (
    "--xla_tpu_enable_windowed_einsum_for_all_gather=false",
    "--xla_tpu_enable_windowed_einsum_for_reduce_scatter=false",
)


def tune() -> None:
    """Applies the settings; call before JAX first computes.

    Keeps what the user has set in XLA_FLAGS and LIBTPU_INIT_ARGS.
    """
    for variable, flags in (("XLA_FLAGS", _XLA_FLAGS), ("LIBTPU_INIT_ARGS", _LIBTPU_INIT_ARGS)):
        given = os.environ.get(variable, "")
        ours = [flag for flag in flags if flag.partition("=")[0] not in given]
        os.environ[variable] = " ".join([given, *ours]).strip()
    keep_freed_pages()


def keep_freed_pages() -> None:
    """Makes malloc keep freed pages instead of returning them to the operating system.

    XLA allocates its temporaries again in each step, and page faults took a third of the step. Processes that
    do not call `tune`, such as those that only read and resize images, gain as much and call this directly.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:  # the C library is not glibc
        return
    mallopt(_M_ARENA_MAX, 1)
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
