"""What reading training batches from disk costs, and how long a train step waits for them.

    python tests/benchmarks/reader.py --resolution=64

OpenMoji is prepared into a temporary directory and read record by record, as ImageNet is, which does not
fit in memory; the operating system has the files cached. First batches are drawn as fast as they come; then
a step of BATCH_SIZE / RATE seconds, in which this process sleeps as it does while an accelerator computes,
comes between them. Prints a table and, last, one line of JSON.
"""

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from absl import app, flags

from mcm_jax.data import pipeline, preparation
from mcm_jax.system import host

_RESOLUTION = flags.DEFINE_integer("resolution", 64, "Side of the images.", lower_bound=1)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 128, "Images a batch.", lower_bound=1)
_RATE = flags.DEFINE_integer("rate", 1000, "Images a second that training takes.", lower_bound=1)
_BATCHES = flags.DEFINE_integer("batches", 100, "Batches that count.", lower_bound=1)


def main(_: list[str]) -> None:
    """Prepares, then reads twice."""
    host.tune()
    with tempfile.TemporaryDirectory() as directory:
        print("preparing", file=sys.stderr)
        chosen = preparation.plan(dataset="openmoji", resolution=_RESOLUTION.value)
        preparation.prepare(chosen, data_dir=Path(directory))
        source = pipeline.open_split(
            data_dir=directory,
            dataset="openmoji",
            resolution=_RESOLUTION.value,
            split="train",
            in_memory_limit_bytes=0,
        )
        full, idle = (_read(source, seconds) for seconds in (0.0, _BATCH_SIZE.value / _RATE.value))
    images = _BATCHES.value * _BATCH_SIZE.value
    result = {
        "resolution": _RESOLUTION.value,
        "images_per_second": images / full["wall"],
        "images_per_core_second": images / full["cpu"],
        "waiting_share": idle["waiting"] / idle["wall"],
        "cores_busy": idle["cpu"] / idle["wall"],
    }
    print(f"as fast as they come: {result['images_per_second']:.0f} images a second")
    print(f"a core reads {result['images_per_core_second']:.0f} images a second")
    print(
        f"at {_RATE.value} images a second a step waits {result['waiting_share']:.2%} of its time, "
        f"and reading takes {result['cores_busy']:.0%} of a core"
    )
    print(json.dumps(result))


def _read(source: Any, step_seconds: float) -> dict[str, float]:
    """Seconds of all batches: in all, of all threads, and until a batch was there."""
    batches = pipeline.train_batches(source, batch_size=_BATCH_SIZE.value, seed=0, flip=True)
    for _ in range(4):  # Starts the threads and fills their buffers.
        next(batches)
    waiting, cpu, begin = 0.0, time.process_time(), time.perf_counter()
    for _ in range(_BATCHES.value):
        asked = time.perf_counter()
        next(batches)
        waiting += time.perf_counter() - asked
        time.sleep(step_seconds)
    return {
        "wall": time.perf_counter() - begin,
        "cpu": time.process_time() - cpu,
        "waiting": waiting,
    }


if __name__ == "__main__":
    app.run(main)
