"""Whether memory, file descriptors and threads stay constant over a long training and many samples.

    python -m tests.benchmarks.memory
    python -m tests.benchmarks.memory --updates=2000 --samples=5000

A tiny network trains with its checkpoints and pictures, then samples. The memory is this process's resident
set (Linux); its slope, by least squares over the last three quarters, is printed with its standard error.
Neighbouring values are correlated, so slope and error are those of 20 means of consecutive values.
"""

import argparse
import contextlib
import os
import tempfile
import threading
from pathlib import Path

import numpy as np

from mcm_jax.runs import trainer
from mcm_jax.runs.run import load_run
from mcm_jax.training import observer
from tests import (
    conftest,  # Sets JAX's environment, so it comes first.
    tiny,
)

assert conftest
_BLOCK = 500  # samples at a time


class Record:
    """Memory, descriptors and threads after each of some steps."""

    def __init__(self):
        self.rows = []

    def add(self, step: int) -> None:
        memory = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
        self.rows.append((step, memory, len(os.listdir("/proc/self/fd")), threading.active_count()))

    def report(self, name: str, unit: int) -> None:
        steps, memory, descriptors, threads = np.array(self.rows[len(self.rows) // 4 :]).T
        x, y = (
            np.array([part.mean() for part in np.array_split(values, 20)])
            for values in (steps / unit, memory)
        )
        slope, start = np.polyfit(x, y, 1)
        rest = y - (slope * x + start)
        error = np.sqrt((rest @ rest) / (len(x) - 2) / ((x - x.mean()) @ (x - x.mean())))
        print(
            f"{name}: {slope:+.3f} ± {error:.3f} MiB per {unit:,}, at {memory.mean():.0f} MiB; "
            f"descriptors {descriptors.min():.0f} to {descriptors.max():.0f}, "
            f"threads {threads.min():.0f} to {threads.max():.0f}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--updates", type=int, default=20_000)
    parser.add_argument("--samples", type=int, default=50_000)
    options = parser.parse_args()
    updates, samples, update = Record(), Record(), observer.RunObserver.update

    def recorded(self, step: int) -> None:
        update(self, step)
        if step % 20 == 0:
            updates.add(step)

    observer.RunObserver.update = recorded
    with tempfile.TemporaryDirectory() as directory, open(os.devnull, "w") as null:
        config = tiny.config(tiny.prepare_folder(Path(directory)))
        config.training.update(num_steps=options.updates, checkpoint_every_steps=options.updates // 40)
        config.training.update(sample_every_steps=options.updates // 10, log_every_steps=100)
        workdir = Path(directory) / "run"
        with contextlib.redirect_stdout(null):
            assert trainer.train(config, workdir)
        updates.report("updates", 1000)
        run = load_run(workdir)
        for first in range(0, options.samples, _BLOCK):
            run.sample(_BLOCK, first=first, batch_per_device=_BLOCK)
            samples.add(first + _BLOCK)
    samples.report("samples", 1000)


if __name__ == "__main__":
    main()
