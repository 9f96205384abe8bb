"""The comparison with PyTorch that launch/gpu_check.sh makes on a GPU, in small."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("pytorch_fid")
from tests.benchmarks import gpu, gpu_torch

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("system", ["ct", "cd"])
def test_both_compute_the_same_loss(system):
    """Theirs is Algorithm 1 as printed, in float64."""
    gpu_torch.check_agreement(system)


def test_a_small_check_runs_to_its_end(tmp_path):
    out = tmp_path / "checked.json"
    # torch.compile takes minutes on a CPU.
    arguments = [
        "--small",
        "--nocompiled",
        "--turns=1",
        "--turn_seconds=0",
        "--batch_size=2",
        "--cases=ct,features",
    ]
    command = [sys.executable, "-m", "tests.benchmarks.gpu", f"--out={out}", *arguments]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    record = json.loads(out.read_text())
    assert set(record["results"]) == {"ct", "features"}
    for case in record["results"].values():
        assert set(case) == set(gpu.VARIANTS) - {"torch.compile"}
        assert all(found["median_seconds"] > 0 and found["ratio"] for found in case.values())
    flops = record["torch"]["flops"]
    assert flops["cd"] == 5 / 4 * flops["ct"] > 0
    assert record["results"]["ct"]["jax"]["tflops_per_second"] > 0
