"""Configuration shared by all tests: simulated CPU devices, run-time type checks, one tiny trained teacher.

Programs for eight devices compile slowly, so most tests see one device. Tests marked multi_device run in a
separate process with MCM_TEST_DEVICES=8, as in launch/test.sh.
"""

import functools
import gc
import importlib
import importlib.metadata
import importlib.util
import os
from pathlib import Path

# Must be set before the first import of JAX. launch/gpu_check.sh sets MCM_TEST_GPU=1.
GPU = os.environ.get("MCM_TEST_GPU") == "1"
os.environ["JAX_PLATFORMS"] = "cuda,cpu" if GPU else "cpu"
DEVICES = int(os.environ.get("MCM_TEST_DEVICES", "1"))
FLAGS = (
    f"--xla_force_host_platform_device_count={DEVICES}",
    # XLA's fused kernels and LLVM's optimisations would take most of the time, for programs that run only a
    # few times. They do not change what is computed on which device and which data are exchanged.
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_parallel_codegen_split_count=1",
)
# XLA aborts on unknown flags, and later versions do not have this one.
if importlib.metadata.version("jaxlib").startswith(("0.9.", "0.10.")):
    FLAGS += ("--xla_cpu_use_fusion_emitters=false",)
# Workers of pytest-xdist inherit XLA_FLAGS; repeated flags would change the keys of the compilation cache.
flags = os.environ.get("XLA_FLAGS", "").split()
if not GPU:  # A GPU is tested as it is used.
    os.environ["XLA_FLAGS"] = " ".join([*(flag for flag in flags if flag not in FLAGS), *FLAGS])
CACHE = str(Path(__file__).parents[1] / ".xla_cache")
os.environ["MCM_COMPILATION_CACHE"] = os.environ["JAX_COMPILATION_CACHE_DIR"] = CACHE
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
if not GPU:
    # JAX would write the cache's directory into the options of the compiler, and so into the keys: a copy of
    # the cache in another checkout would be useless.
    os.environ["JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES"] = "none"
    # With the lowest effort, plans for TPUs compile in a third of the time.
    os.environ["JAX_EXEC_TIME_OPTIMIZATION_EFFORT"] = os.environ["JAX_MEMORY_FITTING_EFFORT"] = "-1"

import jaxtyping

from tests import libraries

# While the hook below imports a module, Python looks for all bytecode under the hook's names. It would not
# find that of the libraries, and compile thousands of files, so they are imported first. Where PyTorch is
# installed, its Triton crashes when it is imported after them.
if importlib.util.find_spec("torch") is None:
    for name in libraries.LIBRARIES:
        importlib.import_module(name)
jaxtyping.install_import_hook("mcm_jax", "beartype.beartype")

import hypothesis

# Derandomised, for the same examples every time; no deadline, as the first example of each shape compiles.
hypothesis.settings.register_profile("fixed", deadline=None, derandomize=True, max_examples=25)
hypothesis.settings.load_profile("fixed")

import pytest

from tests import buckets, compiled, tiny


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory):
    """The data_dir with the prepared folder/tiny."""
    return tiny.prepare_folder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def teacher(tiny_data, tmp_path_factory):
    """The workdir of a diffusion teacher after its four updates."""
    from mcm_jax.runs import trainer

    workdir = tmp_path_factory.mktemp("runs") / "teacher"
    assert trainer.train(tiny.config(tiny_data), workdir)
    return workdir


@pytest.fixture(scope="session")
def _bucket():
    with buckets.Bucket() as bucket, bucket.environment(proxy=True):
        yield bucket


@pytest.fixture
def bucket(_bucket):
    """A bucket for this and all later tests: clients remember the server's address."""
    yield _bucket
    _bucket.proxy.recover()


# Tests that train, compile a whole network or start programs, in the order in which they run: the longest
# first. `launch/test.sh --fast` skips them and all other tests marked slow.
SLOW = (
    "system/test_distributed.py",
    "runs",
    "exporting",
    "test_commands.py",
    "models/test_uvit.py",
    "planning/test_planner.py",
    "config/test_paper_rows.py",
    "test_programs.py",
    "test_buckets.py",
    "teachers",
    "training/test_two_processes.py",
    "training/test_checkpoints.py",
    "evaluation/test_inception_weights.py",
    "test_fuzz.py",
    "evaluation/test_several_processes.py",
    "data/test_avatars.py",
    "evaluation/test_attributes.py",
    "system/test_buckets.py",
    "bench",
    "test_docs.py",
    "test_theorems.py",
    "evaluation/test_inception.py",
    "test_mutants.py",
    "test_clusters.py",
    "reporting/test_demo.py",
    "test_report.py",
    "evaluation/test_caption_scores.py",
    "training/test_watchdog.py",
)


# Tests of whole runs and whole networks. In them, checking shapes and types at run time would take a quarter
# of the time. The same functions are checked in the tests of their own modules, and runs in other files of
# runs/.
UNCHECKED = (
    "runs/test_trainer.py",
    "runs/test_run.py",
    "test_commands.py",
    "teachers",
    "planning",
    "config/test_paper_rows.py",
    "bench",
    "test_report.py",
    "test_cost.py",
    "evaluation/test_inception.py",
    "evaluation/test_inception_weights.py",
    "evaluation/test_attributes.py",
    "evaluation/test_caption_scores.py",
)


@pytest.fixture(autouse=True, scope="module")
def _checked_types(request):
    tests = Path(__file__).parent
    unchecked = any(request.path.is_relative_to(tests / name) for name in UNCHECKED)
    jaxtyping.config.update("jaxtyping_disable", unchecked)


@pytest.fixture(autouse=True, scope="session")
def _functions():
    return {}


@pytest.fixture(autouse=True)
def _shared_functions(request, _functions):
    """Shares jitted functions with earlier tests, but not with those that patch what they call."""
    patched = "monkeypatch" in request.fixturenames
    with compiled.shared({} if patched else _functions):
        yield


def pytest_collection_finish():
    """Collects garbage less often: searching all objects of the libraries took a tenth of the run time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 100)


def pytest_ignore_collect(collection_path):
    """With eight devices, imports only the files that contain tests for them.

    The files in tests/parity need the environment of `launch/test.sh --parity`.
    """
    if collection_path.name == "parity" and importlib.util.find_spec("torch") is None:
        return True
    if DEVICES == 8 and collection_path.name.startswith("test_"):
        return "multi_device" not in collection_path.read_text() or None
    return None


def pytest_collection_modifyitems(items):
    """Marks slow tests and runs them first, and skips multi-device tests without eight devices."""
    tests = Path(__file__).parent

    @functools.cache
    def place(path):
        matches = (number for number, name in enumerate(SLOW) if path.is_relative_to(tests / name))
        return next(matches, len(SLOW))

    items.sort(key=lambda item: place(item.path))
    for item in items:
        if place(item.path) < len(SLOW):
            item.add_marker(pytest.mark.slow)
        if item.get_closest_marker("multi_device") and DEVICES != 8:
            item.add_marker(pytest.mark.skip(reason="needs MCM_TEST_DEVICES=8, see launch/test.sh"))
        if item.get_closest_marker("gpu") and not GPU:
            item.add_marker(pytest.mark.skip(reason="needs a GPU, see launch/gpu_check.sh"))
