"""The programs as a user calls them: exit codes, one line for a mistake, files written."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests import forks

ROOT = Path(__file__).parents[1]


def call(program, *arguments):
    return forks.program(program, *arguments)


@pytest.mark.parametrize(
    ("program", "arguments", "message"),
    [
        ("train", ["--workdir=/none"], "config"),
        ("train", ["--config=configs/none.py:teacher", "--workdir=/none"], "configs/none.py"),
        ("train", ["--config=configs/openmoji.py:gan", "--workdir=/none"], "there is no config row 'gan'"),
        (
            "train",
            ["--config=configs/openmoji.py:teacher", "--config.model.width=3", "--workdir=/none"],
            "width",
        ),
        (
            "train",
            ["--config=configs/openmoji.py:teacher", "--config.seed=x", "--workdir=/none"],
            "seed",
        ),
        (
            "train",
            ["--config=configs/openmoji.py:teacher", "--config.data.data_dir=/none", "--workdir=/none"],
            "python -m mcm_jax.prepare --dataset=openmoji --resolution=16",
        ),
        ("train", ["--config=configs/openmoji.py:teacher", "--workdir=/none", "extra"], "'extra'"),
        ("sample", ["--workdir=/none", "--out=x.png"], "/none is not a run"),
        ("sample", ["--workdir=/none", "--out=x.gif"], "must end in .png"),
        (
            "sample",
            ["--workdir=/none", "--out=/dev/null/x.png"],
            "the directory of --out=/dev/null: cannot write",
        ),
        ("export", ["--workdir=/none", "--out=/none/out", "--format=safetensors"], "/none is not a run"),
        ("export", ["--workdir=s3://bucket/run", "--out=x", "--format=stablehlo"], "is a URL that can't be"),
        ("export", ["--workdir=/none", "--out=x", "--format=onnx"], "format"),
        ("train", ["--config=openmoji:teacher", f"--workdir=/tmp/{'x' * 300}"], "of more than 255 bytes"),
        ("train", ["--config=openmoji:teacher", "--workdir="], "--workdir is empty"),
        ("sample", ["--out=x.png"], "workdir"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(program, arguments, message):
    result = call(program, *arguments)
    assert result.returncode == 2, result.stderr
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert message in lines[0]
    assert "Traceback" not in lines[0]


@pytest.mark.parametrize("program", ["train", "sample", "evaluate", "export", "prepare", "report"])
def test_help(program):
    """In an interpreter of its own, which imports what the program imports."""
    command = [sys.executable, "-m", f"mcm_jax.{program}", "--help"]
    result = subprocess.run(command, cwd=forks.ROOT, capture_output=True, text=True, timeout=300)
    assert "mcm_jax." in result.stdout
    assert "Traceback" not in result.stderr


def test_sample_writes_a_grid_and_arrays(teacher, tmp_path):
    grid = call("sample", f"--workdir={teacher}", "--num=5", f"--out={tmp_path}/grid.png", "--columns=3")
    assert grid.returncode == 0, grid.stderr
    assert Image.open(tmp_path / "grid.png").size[0] > 3 * 8
    assert "4 steps of addim, seed 0, rounding nearest" in grid.stdout


@pytest.mark.parametrize(
    ("program", "arguments"),
    [
        ("sample", ["--workdir=/none", "--out"]),
        ("plan", ["--config=openmoji:teacher", "--topology=v5e:2x2", "--json"]),
        ("plan", ["--config=openmoji:teacher", "--topology=v5e:2x2", "--hlo"]),
        ("report", ["--figure=trajectories", "--out"]),
    ],
)
def test_a_directory_is_no_output_file(program, arguments, tmp_path):
    """Found before anything is computed."""
    (tmp_path / "x.png").mkdir()
    result = call(program, *arguments[:-1], f"{arguments[-1]}={tmp_path}/x.png")
    assert result.returncode == 2
    assert result.stderr == f"error: {arguments[-1]}={tmp_path}/x.png is a directory; specify a file\n"


def test_sample_takes_data_that_has_moved(teacher, tiny_data, tmp_path):
    """Also the other settings reach the sampler, and the file is one that ADM's evaluator takes."""
    run = tmp_path / "run"
    shutil.copytree(teacher, run)
    content = (run / "run.json").read_text()
    (run / "run.json").write_text(content.replace(str(tiny_data), "/none"))
    out = (f"--out={tmp_path}/x.npz", "--format=adm")
    how = ("--steps=2", "--label=1", "--x_var=measured", f"--data_dir={tiny_data}", "--rounding=floor")
    arrays = call("sample", f"--workdir={run}", "--num=5", *out, *how)
    assert arrays.returncode == 0, arrays.stderr
    assert "2 steps of addim, seed 0, rounding floor" in arrays.stdout
    with np.load(tmp_path / "x.npz") as content:
        # Of which ADM's evaluator reads the first.
        assert content["arr_0"].shape == (5, 8, 8, 3) and content["arr_0"].dtype == np.uint8
        np.testing.assert_array_equal(content["arr_1"], 1)


def test_sample_refuses_a_name_that_is_not_of_the_format(teacher, tmp_path):
    result = call("sample", f"--workdir={teacher}", f"--out={tmp_path}/x.png", "--format=adm")
    assert result.returncode == 2 and "x.png must end in .npz for --format=adm" in result.stderr


def test_sample_refuses_an_unknown_class(teacher, tmp_path):
    result = call("sample", f"--workdir={teacher}", f"--out={tmp_path}/x.png", "--label=2")
    assert result.returncode == 2
    assert "--label=2 is not one of the 2 classes: 0 even, 1 odd" in result.stderr
