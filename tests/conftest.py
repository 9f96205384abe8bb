"""Shared by all tests: forced CPU devices, types checked at run time, one tiny trained teacher.

Programs split over eight devices compile slowly, so most tests see one device; those marked multi_device run
in a process of their own with MCM_TEST_DEVICES=8, as launch/test.sh does.
"""

import os
from pathlib import Path

# Before the first import of JAX.
DEVICES = int(os.environ.get("MCM_TEST_DEVICES", "1"))
FLAGS = (
    f"--xla_force_host_platform_device_count={DEVICES}",
    # Most of the time went into LLVM's optimisation of programs that run a few times. What is computed,
    # where, and sent to whom, is settled before it.
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
)
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS]).strip()
os.environ["JAX_PLATFORMS"] = "cpu"
CACHE = str(Path(__file__).parents[1] / ".xla_cache")
os.environ["MCM_COMPILATION_CACHE"] = os.environ["JAX_COMPILATION_CACHE_DIR"] = CACHE
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

from jaxtyping import install_import_hook

install_import_hook("mcm_jax", "beartype.beartype")

import hypothesis

# Derandomised: the same examples every time. No deadline: the first example of a shape compiles.
hypothesis.settings.register_profile("fixed", deadline=None, derandomize=True, max_examples=25)
hypothesis.settings.load_profile("fixed")

import pytest

from tests import tiny


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory):
    """data_dir of the prepared folder/tiny."""
    return tiny.prepare_folder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def teacher(tiny_data, tmp_path_factory):
    """workdir of a diffusion teacher after its four updates."""
    from mcm_jax.runs import trainer

    workdir = tmp_path_factory.mktemp("runs") / "teacher"
    assert trainer.train(tiny.config(tiny_data), workdir)
    return workdir


# What trains, compiles a whole network, or starts programs; `launch/test.sh --fast` leaves it out, with the
# tests that are marked slow one by one.
SLOW = (
    "bench",
    "config/test_paper_rows.py",
    "evaluation/test_inception.py",
    "evaluation/test_several_processes.py",
    "models/test_uvit.py",
    "planning/test_planner.py",
    "runs",
    "system/test_distributed.py",
    "test_clusters.py",
    "test_docs.py",
    "test_mutants.py",
    "test_programs.py",
    "test_report.py",
    "test_theorems.py",
)


def pytest_collection_modifyitems(items):
    """Tests of several devices need them, and the others are faster on one."""
    tests = Path(__file__).parent
    slow = [tests / name for name in SLOW]
    for item in items:
        if any(item.path.is_relative_to(place) for place in slow):
            item.add_marker(pytest.mark.slow)
        if item.get_closest_marker("multi_device") and DEVICES != 8:
            item.add_marker(pytest.mark.skip(reason="needs MCM_TEST_DEVICES=8, see launch/test.sh"))
