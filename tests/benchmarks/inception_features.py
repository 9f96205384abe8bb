"""Our Inception features against torch-fidelity's and pytorch-fid's: the same weights, images and batch.

    bash launch/test.sh --parity    makes the environment, .venv-parity
    .venv-parity/bin/python -m tests.benchmarks.inception_features

Every evaluator has a process of its own, as its user starts it, in which the others' threads and allocator
settings have no part; they take turns, one batch each. Theirs also run with the settings of the allocator
that ours has by `mcm_jax.host`, which make PyTorch faster on CPUs too. Prints a table and, last, one line of
JSON; a ratio above 1 means that ours is faster. Needs an idle machine.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags

EVALUATORS = ("mcm_jax", "torch-fidelity", "pytorch-fid", "torch-fidelity, tuned", "pytorch-fid, tuned")

_BATCH_SIZE = flags.DEFINE_integer("batch_size", 32, "Images a batch.", lower_bound=1)
_RESOLUTION = flags.DEFINE_integer("resolution", 64, "Side of the images.", lower_bound=1)
_TURNS = flags.DEFINE_integer("turns", 9, "Batches of every evaluator that count.", lower_bound=1)
_SERVE = flags.DEFINE_enum("serve", None, EVALUATORS, "Be this evaluator, a batch for every line of input.")
_WEIGHTS = flags.DEFINE_string("weights", None, "A .pth; default: random ones.")


def main(_: list[str]) -> None:
    """The parent, or with --serve one evaluator."""
    if _SERVE.value is not None:
        _serve(_SERVE.value)
        return
    with tempfile.TemporaryDirectory() as directory:
        weights = _WEIGHTS.value or f"{directory}/inception.pth"
        if _WEIGHTS.value is None:
            code = f"from tests import torch_inception as t; t.write_random_weights({weights!r})"
            subprocess.run([sys.executable, "-c", code], check=True)
        shared = [f"--weights={weights}"]
        shared += [f"--{flag.name}={flag.value}" for flag in (_BATCH_SIZE, _RESOLUTION)]
        servers = {name: _start([*shared, f"--serve={name}"]) for name in EVALUATORS}
        seconds: dict[str, list[float]] = {name: [] for name in EVALUATORS}
        for turn in range(_TURNS.value + 1):
            for name in EVALUATORS if turn % 2 else reversed(EVALUATORS):
                took = _ask(servers[name])
                seconds[name] += [took] if turn else []  # The first compiles and warms up.
        for server in servers.values():
            server.stdin.close()
            server.wait()
    _report(seconds)


def _start(arguments: list[str]) -> subprocess.Popen:
    command = [sys.executable, "-m", "tests.benchmarks.inception_features", *arguments]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)


def _ask(server: Any) -> float:
    server.stdin.write("\n")
    return float(server.stdout.readline())


def _report(seconds: dict[str, list[float]]) -> None:
    results = {}
    print(f"{'evaluator':<24}{'images a second':>16}  ours / theirs, median of turns (least, greatest)")
    for name, times in seconds.items():
        ratios = [theirs / ours for theirs, ours in zip(times, seconds["mcm_jax"], strict=True)]
        rate = _BATCH_SIZE.value / statistics.median(times)
        results[name] = {"images_per_second": rate, "ratio": statistics.median(ratios)}
        print(
            f"{name:<24}{rate:>16.2f}  {statistics.median(ratios):.2f} ({min(ratios):.2f}, {max(ratios):.2f})"
        )
    print(json.dumps({"batch_size": _BATCH_SIZE.value, "resolution": _RESOLUTION.value, "results": results}))


def _serve(name: str) -> None:
    shape = (_BATCH_SIZE.value, _RESOLUTION.value, _RESOLUTION.value, 3)
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    run = _evaluator(name)
    for _ in sys.stdin:
        begin = time.perf_counter()
        run(images)
        print(time.perf_counter() - begin, flush=True)


def _evaluator(name: str) -> Any:
    from mcm_jax.system import host

    weights = Path(_WEIGHTS.value)
    if name == "mcm_jax" or name.endswith("tuned"):
        host.tune()
    if name == "mcm_jax":
        from mcm_jax.evaluation import inception_weights
        from mcm_jax.evaluation.features import Extractor

        return Extractor(inception_weights.load(weights).network(), batch_per_device=_BATCH_SIZE.value)
    from tests import torch_inception

    if name.startswith("torch-fidelity"):
        return torch_inception.torch_fidelity(weights)
    return torch_inception.pytorch_fid_pool(weights, as_published=True)


if __name__ == "__main__":
    app.run(main)
