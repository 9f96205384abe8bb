"""Benches on images: every cell is a training run in its own directory, made by the programs' own code.

A run can be resumed, sampled, reported and inspected like any other. The distance is fd_effnet_lite0, as
reported by `evaluate`: a proxy, not FID.
"""

import abc
import contextlib

import ml_collections

from mcm_jax.bench.cells import Cell, Values
from mcm_jax.config import validation
from mcm_jax.config.settings import stage_configs
from mcm_jax.data import preparation
from mcm_jax.evaluation import scoring
from mcm_jax.records import Result
from mcm_jax.runs import trainer
from mcm_jax.runs.run import load_run
from mcm_jax.system.files import appending
from mcm_jax.system.paths import Path, as_path

DATA_DIR = as_path("data")


def root_name(cell: Cell, *, per_steps: bool) -> str:
    """The name of a workdir: the system, its number of steps if each has a training, and the overrides."""
    steps = [str(cell.steps)] if per_steps else []
    return "_".join([cell.system, *steps, *(f"{field}={value}" for field, value in cell.overrides)])


class Bench(abc.ABC):
    """Measures cells by training runs in `directory`."""

    def __init__(self, directory: Path, plan: preparation.Plan, *, data_dir: Path = DATA_DIR):
        """Prepares the data set if it does not exist. The programs' output goes to directory/log.txt."""
        self.directory, self.data_dir = directory, data_dir
        preparation.prepare(plan, data_dir=data_dir)
        directory.mkdir(parents=True, exist_ok=True)

    @abc.abstractmethod
    def config(self, cell: Cell) -> ml_collections.ConfigDict:
        """The config of the cell's model."""

    @abc.abstractmethod
    def teacher(self, cell: Cell) -> Cell:
        """The teacher of a cell's model; of a teacher's cell, the one that is trained for it."""

    @abc.abstractmethod
    def root(self, cell: Cell) -> Path:
        """The workdir of the cell's config; cells with the same one share their training."""

    @abc.abstractmethod
    def values(self, cell: Cell) -> Values:
        """Evaluates the cell's model, which is trained."""

    def __call__(self, cell: Cell) -> Values:
        """The values of a cell, after training what is not trained yet; all output goes to the log."""
        with appending(self.directory / "log.txt") as log, contextlib.redirect_stdout(log):
            self.train(self.teacher(cell))
            if cell.system != "teacher":
                self.train(cell)
            return self.values(cell)

    def workdir(self, cell: Cell) -> Path:
        """The workdir of the model; for progressive distillation, that of the last stage."""
        return stage_configs(validation.validate(self.config(cell)), self.root(cell))[-1][0]

    def train(self, cell: Cell) -> None:
        """Trains the cell's model to the end."""
        if not trainer.train(self.config(cell), self.root(cell)):
            raise KeyboardInterrupt

    def evaluate(self, cell: Cell, *, num: int) -> Result:
        """Scores `num` samples of the cell's model, with the cell's steps, sampler and seed."""
        options = scoring.Options(
            workdirs=(self.workdir(cell),),
            num=num,
            steps=(cell.steps,),
            sampler=cell.sampler,
            seed=cell.seed,
            cache_dir=self.data_dir / "reference_cache",
            untrained_num=0,
        )
        (result,) = scoring.evaluate(options, load_run)
        return result
