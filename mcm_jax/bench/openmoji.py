"""The bench on 16x16 OpenMoji, with a trained teacher and a proxy distance; it uses the programs' own code.

Every cell is a training run in its own directory, which can be resumed, sampled and inspected like any other.
The distance is fd_effnet_lite0_1024, as reported by `evaluate`: a proxy, not FID.
"""

import contextlib
import dataclasses
import functools

import jax.numpy as jnp
import ml_collections

from mcm_jax import records
from mcm_jax.bench.cells import Cell, Values
from mcm_jax.bench.choices import Choice, choices
from mcm_jax.bench.findings import Finding, Term, findings
from mcm_jax.bench.mixture import mean_difference
from mcm_jax.config import rows, validation
from mcm_jax.config.settings import stage_configs
from mcm_jax.data import preparation
from mcm_jax.data.pixels import to_float
from mcm_jax.evaluation import scoring
from mcm_jax.runs import build, trainer
from mcm_jax.runs.run import load_run
from mcm_jax.system.files import appending
from mcm_jax.system.paths import Path, as_path

RESOLUTION = 16
_DATA_DIR = as_path("data")
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


class Bench:
    """Measures cells of one problem by training runs in `directory`."""

    def __init__(self, problem: Problem, directory: Path, *, data_dir: Path = _DATA_DIR):
        """Prepares the data set if it does not exist. The programs' output goes to directory/log.txt."""
        self.problem, self.directory, self.data_dir = problem, directory, data_dir
        plan = preparation.plan(dataset="openmoji", resolution=RESOLUTION)
        preparation.prepare(plan, data_dir=data_dir)
        directory.mkdir(parents=True, exist_ok=True)

    def __call__(self, cell: Cell) -> Values:
        """Trains unless already done, and evaluates; for CT also measures the difference from its teacher."""
        with appending(self.directory / "log.txt") as log, contextlib.redirect_stdout(log):
            return self._measure(cell)

    def _measure(self, cell: Cell) -> Values:
        workdir = self._workdir(cell)
        teacher = self._train(Cell(cell.problem, "teacher", 1, cell.seed, cell.shared))
        if cell.system != "teacher":
            self._train(cell)
        options = scoring.Options(
            workdirs=(workdir,),
            num=NUM_SAMPLES,
            steps=(cell.steps,),
            sampler=cell.sampler,
            seed=cell.seed,
            cache_dir=self.data_dir / "reference_cache",
            untrained_num=0,
        )
        (result,) = scoring.evaluate(options, load_run)
        values = {"distance": result.metrics[METRIC]}
        if cell.system == "ct":
            values["from_diffusion"] = _difference(workdir, teacher)
        return values

    def _train(self, cell: Cell) -> Path:
        """Trains the cell's model to the end; returns its workdir."""
        workdir = self._workdir(cell)
        if not trainer.train(self._config(cell), self._root(cell)):
            raise KeyboardInterrupt
        return workdir

    def _root(self, cell: Cell) -> Path:
        name = "_".join(
            [cell.system, *([str(cell.steps)] if cell.system in ("cd", "ct") else [])]
            + [f"{field}={value}" for field, value in cell.overrides]
        )
        return self.directory / f"seed{cell.seed}" / name

    def _workdir(self, cell: Cell) -> Path:
        """The workdir of the model; for progressive distillation, that of the last stage."""
        config = validation.validate(self._config(cell))
        return stage_configs(config, self._root(cell))[-1][0]

    def _config(self, cell: Cell) -> ml_collections.ConfigDict:
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
            teacher = Cell(cell.problem, "teacher", 1, cell.seed, cell.shared)
            config.teacher_checkpoint = str(self._root(teacher))
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
