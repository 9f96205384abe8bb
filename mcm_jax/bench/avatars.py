"""Methods for few steps on 32x32 avatars, with one trained teacher, one network and one budget.

The style is the class. Distances are divided by that of the test images, which are new drawings of the same
distribution, so 1 is as good as new drawings.

Every method spends the same number of network calls, so one with cheaper updates has more of them. Most train
one student for all numbers of steps. Progressive distillation passes through them, and moment matching, which
has a student for each, divides its calls between them.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import ml_collections
import numpy as np
from matplotlib.figure import Figure

from mcm_jax import records
from mcm_jax.bench import images, summary
from mcm_jax.bench.cells import Cell, Values
from mcm_jax.bench.costs import CALLS
from mcm_jax.bench.studies import fitted_range
from mcm_jax.config import rows
from mcm_jax.data import preparation
from mcm_jax.reporting.trajectories import png
from mcm_jax.runs.run import load_run
from mcm_jax.system.paths import Path
from mcm_jax.system.pictures import image_grid


@dataclasses.dataclass(frozen=True)
class Problem:
    """The sizes of the comparison."""

    name: str
    num_train: int = 50_000
    resolution: int = 32
    widths: tuple[int, ...] = (32, 64, 128)
    blocks: tuple[int, ...] = (1, 1, 4)
    teacher_updates: int = 20_000
    student_calls: int = 2_000  # network calls per example of a batch, over a student's whole training
    learning_rate: float = 1e-3  # of students, in the middle of the grid
    student_steps: tuple[int, ...] = (1, 2, 4, 8, 16)
    tuned_steps: int = 4  # the number of steps at which learning rates are chosen
    num_samples: int = 2_000  # as many as there are test images


AVATARS = Problem("avatars")
QUICK = Problem(
    "avatars",
    num_train=32,
    resolution=8,
    widths=(8, 8, 32),
    blocks=(1, 1, 1),
    teacher_updates=4,
    student_calls=20,
    student_steps=(1, 2),
    tuned_steps=2,
    num_samples=32,
)
# The systems with a training for each number of steps.
_DIVIDED = ("progressive", "moments")


class Bench(images.Bench):
    """Measures cells of one problem; all students, of all seeds, start from the same teacher."""

    def __init__(self, problem: Problem, directory: Path, *, data_dir: Path = images.DATA_DIR):
        plan = preparation.plan(dataset="avatars", resolution=problem.resolution, num=problem.num_train)
        super().__init__(directory, plan, data_dir=data_dir)
        self.problem = problem

    def values(self, cell: Cell) -> Values:
        """The distance as a multiple of that of the test images, and both.

        `nearest_neighbour_distance` is the mean feature distance from a sample to the nearest training image.
        """
        num = self.problem.num_samples
        result = self.evaluate(cell, num=num)
        metric = records.with_count(records.DISTANCES[records.EFFICIENTNET], num)
        floor = f"{records.TEST_IMAGES}_{metric}"
        relative = result.metrics[metric] / result.bounds[floor]
        return {"distance": relative, **result.metrics, **result.bounds}

    def workdir(self, cell: Cell) -> Path:
        """The workdir of the model; for progressive distillation, that of the stage with the cell's steps."""
        if cell.system == "progressive":
            return self.root(cell) / f"steps_{cell.steps}"
        return super().workdir(cell)

    def teacher(self, cell: Cell) -> Cell:
        """The only one."""
        return Cell(cell.problem, "teacher", 1, seed=0)

    def root(self, cell: Cell) -> Path:
        """One for each seed, system and overrides, and for each number of steps where needed."""
        if cell.system == "teacher":
            return self.directory / "teacher"
        name = images.root_name(cell, per_steps=cell.system == "moments")
        return self.directory / f"seed{cell.seed}" / name

    def _row(self, cell: Cell) -> str:
        steps = {
            **dict.fromkeys(("cd", "ct", "scd", "sct"), "+".join(map(str, self.problem.student_steps))),
            "moments": str(cell.steps),
        }
        return f"{cell.system},steps={steps[cell.system]}" if cell.system in steps else cell.system

    def config(self, cell: Cell) -> ml_collections.ConfigDict:
        """A row of the tiny configs, with the comparison's network and training length."""
        problem, system = self.problem, cell.system
        config = rows.tiny(self._row(cell), dataset="avatars", resolution=problem.resolution)
        # The embedding of the noise level that continuous time needs; drawings are not symmetric.
        config.model.update(widths=problem.widths, blocks=problem.blocks, noise_scale="smooth")
        config.data.update(data_dir=str(self.data_dir), horizontal_flip=False)
        config.seed = 0 if system == "teacher" else cell.seed
        config.training.update(sample_every_steps=0, checkpoint_every_steps=1_000)
        if system == "teacher":
            warmup_steps = min(config.optimizer.warmup_steps, problem.teacher_updates // 10)
            config.optimizer.update(ema_decay=0.999, warmup_steps=warmup_steps)
            config.training.update(num_steps=problem.teacher_updates, keep_every_steps=2_000)
            return config
        parts = len(problem.student_steps) if system in _DIVIDED else 1
        updates = int(problem.student_calls / (CALLS[system] * parts))
        config.training.num_steps = updates
        # Averages over about the last tenth of the updates, few or many.
        config.optimizer.ema_decay = max(0.0, 1 - 10 / updates)
        config.teacher_checkpoint = str(self.root(self.teacher(cell)))
        half = max(1, updates // 2)
        if system in ("cd", "ct"):
            first, last = map(float, fitted_range(updates, power=0.5))
            config.consistency.update(teacher_steps_first=first, teacher_steps_last=last, anneal_steps=half)
        elif system in ("scd", "sct"):
            config.continuous.warmup_steps = half
        elif system == "ayf":
            config.flow_map.warmup_steps = half
        elif system == "shortcut":
            config.shortcut.target_decay = config.optimizer.ema_decay
        elif system == "progressive":
            config.progressive.stages = (2 * max(problem.student_steps), *reversed(problem.student_steps))
        cell.override(config)
        return config

    def picture(self, rows: Mapping[str, Sequence[Cell]]) -> bytes:
        """A PNG with an image of each style from every cell, all from the same noise.

        Args:
          rows: by name, measured cells of increasing steps.
        """
        columns = max(map(len, rows.values()))
        figure = Figure(figsize=(1.6 + 1.7 * columns, 0.4 + 1.2 * len(rows)), dpi=130, layout="constrained")
        axes = figure.subplots(len(rows), columns, squeeze=False)
        for (name, cells), places in zip(rows.items(), axes, strict=True):
            for cell, place in zip(cells, places, strict=True):
                place.imshow(self._drawn(cell), interpolation="nearest")
                place.set(xticks=[], yticks=[])
                place.set_title(summary.count(cell.steps), fontsize=8)
            places[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
        return png(figure)

    def _drawn(self, cell: Cell) -> np.ndarray:
        """One sample of each style, in two rows."""
        run = load_run(self.workdir(cell))
        labels = np.arange(run.dataset.num_classes, dtype=np.int32)
        drawn, _ = run.sample(len(labels), labels=labels, steps=cell.steps, sampler=cell.sampler)
        return image_grid(drawn, -(-len(labels) // 2))
