"""The bench on 16x16 OpenMoji, with a trained teacher for each seed."""

import dataclasses
import functools

import jax.numpy as jnp
import ml_collections

from mcm_jax import records
from mcm_jax.bench import images
from mcm_jax.bench.cells import Cell, Values
from mcm_jax.bench.choices import Choice, choices
from mcm_jax.bench.findings import Finding, Term, findings
from mcm_jax.bench.mixture import mean_difference
from mcm_jax.config import rows
from mcm_jax.data import preparation
from mcm_jax.data.pixels import to_float
from mcm_jax.runs import build
from mcm_jax.runs.run import load_run
from mcm_jax.system.paths import Path

RESOLUTION = 16
NUM_SAMPLES = 1024
METRIC = records.with_count(records.DISTANCES[records.EFFICIENTNET], NUM_SAMPLES)


@dataclasses.dataclass(frozen=True)
class Problem:
    """Training lengths, and the step counts that are measured."""

    name: str
    teacher_updates: int = 1000
    student_updates: int = 250
    student_steps: tuple[int, ...] = (1, 2, 4, 8)
    constants: tuple[int, ...] = (128, 1024)
    constant_student_steps: tuple[int, ...] = (1, 8)
    sampler_steps: tuple[int, ...] = (16, 32, 64)
    teacher_sampling_steps: int = 512
    progressive_first: int = 64  # steps of the teacher from which progressive distillation starts
    learning_rate: float = 3e-4  # of students

    def findings(self) -> tuple[Finding, ...]:
        """The paper's eight findings, at these step counts."""
        return findings(
            student_steps=self.student_steps,
            constants=self.constants,
            constant_student_steps=self.constant_student_steps,
            sampler_steps=self.sampler_steps,
            best_teacher=Term(1.0, "teacher", self.teacher_sampling_steps, sampler="addim"),
        )

    def choices(self) -> tuple[Choice, ...]:
        """The open choices of the paper."""
        return choices(self.learning_rate, RESOLUTION)


OPENMOJI = Problem("openmoji")
QUICK = Problem(
    "openmoji",
    teacher_updates=100,
    student_updates=5,
    student_steps=(1, 2),
    constants=(128,),
    constant_student_steps=(1,),
    sampler_steps=(16,),
    teacher_sampling_steps=32,
    # At least two stages per student: a single-stage run would lie in the directory of the others' stages.
    progressive_first=8,
)


class Bench(images.Bench):
    """Measures cells of one problem."""

    def __init__(self, problem: Problem, directory: Path, *, data_dir: Path = images.DATA_DIR):
        plan = preparation.plan(dataset="openmoji", resolution=RESOLUTION)
        super().__init__(directory, plan, data_dir=data_dir)
        self.problem = problem

    def values(self, cell: Cell) -> Values:
        """The distance; for CT also the difference from the teacher."""
        values = {"distance": self.evaluate(cell, num=NUM_SAMPLES).metrics[METRIC]}
        if cell.system == "ct":
            values["from_diffusion"] = _difference(self.workdir(cell), self.workdir(self.teacher(cell)))
        return values

    def teacher(self, cell: Cell) -> Cell:
        """One for each seed and noise schedule."""
        return Cell(cell.problem, "teacher", 1, cell.seed, cell.shared)

    def root(self, cell: Cell) -> Path:
        """One for each seed, system and overrides; students of consistency also for each number of steps."""
        name = images.root_name(cell, per_steps=cell.system in ("cd", "ct"))
        return self.directory / f"seed{cell.seed}" / name

    def config(self, cell: Cell) -> ml_collections.ConfigDict:
        """A row of the tiny configs, with the problem's training length."""
        row = {"cd": f"cd,steps={cell.steps}", "ct": f"ct,steps={cell.steps}"}.get(cell.system, cell.system)
        config = rows.tiny(row, dataset="openmoji", resolution=RESOLUTION)
        config.data.data_dir = str(self.data_dir)
        config.seed = cell.seed
        config.sampling.label_rule = "train_frequency"
        config.training.update(sample_every_steps=0, checkpoint_every_steps=10_000)
        config.training.num_steps = self.problem.student_updates
        if cell.system == "teacher":
            config.training.num_steps = self.problem.teacher_updates
        else:
            config.teacher_checkpoint = str(self.root(self.teacher(cell)))
            config.optimizer.learning_rate = self.problem.learning_rate
        if cell.system in ("cd", "ct"):
            # As in the paper, annealing takes half of the training.
            config.consistency.anneal_steps = max(1, self.problem.student_updates // 2)
        warmup_steps = min(config.optimizer.warmup_steps, config.training.num_steps // 10)
        config.optimizer.warmup_steps = warmup_steps
        if cell.system == "progressive":
            stages = [self.problem.progressive_first]
            while stages[-1] > cell.steps:
                stages.append(stages[-1] // 2)
            config.progressive.stages = tuple(stages)
        cell.override(config)
        return config


def _difference(workdir: Path, teacher: Path) -> float:
    """`mean_difference` of two runs on a random sample of training images."""
    student_run, teacher_run = load_run(workdir), load_run(teacher)
    images, labels = student_run.random_images("train", NUM_SAMPLES)
    student_fn, teacher_fn = (
        functools.partial(run.network.apply, run.params) for run in (student_run, teacher_run)
    )
    x, cond = jnp.asarray(to_float(images)), jnp.asarray(labels)
    schedule = build.schedule(student_run.config)
    return mean_difference(student_fn, teacher_fn, x, cond, schedule=schedule)
