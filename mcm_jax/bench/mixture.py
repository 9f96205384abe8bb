"""The bench on a closed-form mixture, with an exact teacher and an exact distance; students are small MLPs.

The distance is mixtures.marginal_wasserstein of 10,000 samples. Every update uses new samples of the data, so
nothing can be memorised. The students' network is too small to be exact, so all students, and the diffusion
model from which they start, share the same lower limit of the distance, which makes them comparable.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mcm_jax.bench import vectors
from mcm_jax.bench.cells import Cell, Overrides, Values
from mcm_jax.bench.choices import Choice, choices
from mcm_jax.bench.findings import Finding, Term, findings
from mcm_jax.bench.vectors import VectorRun
from mcm_jax.config import validation
from mcm_jax.config.rows import FLOW_MAP_SETTINGS
from mcm_jax.config.settings import Config, default_config
from mcm_jax.diffusion import mixtures, process
from mcm_jax.diffusion.conditions import Cond
from mcm_jax.diffusion.mixtures import Mixture
from mcm_jax.diffusion.network import ModelFn
from mcm_jax.diffusion.schedules import Schedule
from mcm_jax.models.mlp import MLPSettings
from mcm_jax.objectives.progressive import Progressive
from mcm_jax.runs import build

NUM_SAMPLES = 10_000
# A quantity of samples of a mixture.
Measure = Callable[[Mixture, np.ndarray], float]
# Added to a cell's seed: cells of one seed share their sampling noise, other seeds have different noise.
_SAMPLING_SEED = 1000


@dataclasses.dataclass(frozen=True)
class Problem:
    """A mixture, a network, training lengths, and the step counts that are measured."""

    name: str
    dimension: int
    width: int = 256
    blocks: int = 2
    components: int = 3
    diffusion_updates: int = 4000
    student_updates: int = 1500
    batch_size: int = 256
    diffusion_learning_rate: float = 1e-3
    learning_rate: float = 5e-4  # of students
    student_steps: tuple[int, ...] = (1, 2, 4, 8)
    constants: tuple[int, ...] = (128, 256, 1024)
    sampler_steps: tuple[int, ...] = (16, 32, 64)
    diffusion_sampling_steps: int = 512
    progressive_first: int = 64  # steps of the teacher from which progressive distillation starts

    def findings(self) -> tuple[Finding, ...]:
        """The eight findings; in 2-D only the two about aDDIM, whose variance is meaningless there."""
        chosen = findings(
            student_steps=self.student_steps,
            constants=self.constants,
            constant_student_steps=self.student_steps,
            sampler_steps=self.sampler_steps,
            # Not the exact teacher: no network of this size can match it, however it is trained.
            best_teacher=Term(1.0, "diffusion", self.diffusion_sampling_steps, sampler="addim"),
        )
        return chosen if self.dimension > 2 else tuple(f for f in chosen if f.number in (4, 5))

    def choices(self) -> tuple[Choice, ...]:
        """The open choices of the paper; a mixture counts as data of the config's default resolution."""
        if self.dimension == 2:
            return ()
        return choices(self.learning_rate, default_config().data.resolution)


MIXTURE_64D = Problem("mixture", dimension=64)
MIXTURE_2D = Problem("mixture2d", dimension=2, width=64)
QUICK = Problem(
    "mixture",
    dimension=64,
    diffusion_updates=300,
    student_updates=50,
    student_steps=(1, 2),
    constants=(128,),
    sampler_steps=(16,),
    diffusion_sampling_steps=32,
    progressive_first=4,
)
QUICK_2D = dataclasses.replace(QUICK, name="mixture2d", dimension=2, width=64)


class Bench:
    """Measures cells of one problem; caches the models from which later cells of the same seed start.

    Args:
      exact: the mixture; None: `random_mixture` of the problem's sizes.
      measures: what to measure of the samples beside their distance, by name.
    """

    def __init__(
        self, problem: Problem, exact: Mixture | None = None, measures: Mapping[str, Measure] | None = None
    ):
        self.problem = problem
        self._measures = measures or {}
        if exact is None:
            exact = mixtures.random_mixture(
                0, dimension=problem.dimension, components=problem.components, mean_square=0.1
            )
        self.mixture = Mixture(*(np.asarray(a, np.float32) for a in exact))
        self._diffusion = functools.lru_cache(maxsize=1)(self._train_diffusion)
        self._stage = functools.lru_cache(maxsize=1)(self._train_stage)
        self._student = functools.lru_cache(maxsize=1)(self._train_student)

    def __call__(self, cell: Cell) -> Values:
        """The distance of the cell's samples; for CT also its difference from the diffusion model."""
        if cell.system == "data":
            return self._values(self._data(cell.seed))
        config = self._config(cell)
        if cell.system == "teacher":
            return self._sampled(mixtures.model_fn(self.mixture), config, cell)
        if cell.system == "diffusion":
            return self._sampled(self._diffusion(cell.seed, cell.shared).model_fn, config, cell)
        if cell.system == "progressive":
            stage = self._stage(cell.seed, cell.steps, cell.overrides)
            return self._sampled(stage.model_fn, config, cell)
        # One student for several numbers of steps is trained once for all of them.
        run = self._student(dataclasses.replace(cell, steps=1) if config.takes_end else cell)
        values = self._sampled(run.model_fn, config, cell)
        if cell.system == "ct" and not config.takes_end:
            start = self._diffusion(cell.seed, cell.shared)
            schedule = build.schedule(config)
            x = self._data(cell.seed)
            cond = jnp.zeros(len(x), jnp.int32)
            values["from_diffusion"] = mean_difference(
                run.model_fn, start.model_fn, x, cond, schedule=schedule
            )
        return values

    def _data(self, seed: int) -> Float[Array, "N d"]:
        return mixtures.sample(self.mixture, jax.random.key(seed + _SAMPLING_SEED), NUM_SAMPLES)

    def _sampled(self, model_fn: ModelFn, config: Config, cell: Cell) -> Values:
        """The values of samples of a model."""
        x = vectors.sample(
            model_fn,
            self.problem.dimension,
            NUM_SAMPLES,
            seed=cell.seed + _SAMPLING_SEED,
            num_steps=cell.steps,
            sampler=cell.sampler,
            schedule=build.schedule(config),
            takes_end=config.takes_end,
        )
        return self._values(x)

    def _values(self, x: Float[Array, "N d"]) -> Values:
        samples = np.asarray(x)
        measured = {name: measure(self.mixture, samples) for name, measure in self._measures.items()}
        return {"distance": mixtures.marginal_wasserstein(self.mixture, samples), **measured}

    def _train_diffusion(self, seed: int, overrides: Overrides) -> VectorRun:
        config = self._config(Cell(self.problem.name, "diffusion", 1, seed, overrides))
        return vectors.train(config, self._model(config), self.mixture)

    def _train_student(self, cell: Cell) -> VectorRun:
        config, start = self._config(cell), self._diffusion(cell.seed, cell.shared)
        return vectors.train(config, self._model(config), self.mixture, start=start.params)

    def _train_stage(self, seed: int, steps: int, overrides: Overrides) -> VectorRun:
        """Trains the stage of progressive distillation with this many steps, from the previous stage."""
        cell = Cell(self.problem.name, "progressive", steps, seed, overrides)
        first = 2 * steps == self.problem.progressive_first
        before = self._diffusion(seed, cell.shared) if first else self._stage(seed, 2 * steps, overrides)
        if not first:
            # Later teachers already include aDDIM's adjustment; see Progressive.later_xvar_frac.
            later = ("progressive.xvar_frac", Progressive().later_xvar_frac)
            cell = dataclasses.replace(cell, overrides=(*overrides, later))
        config = self._config(cell)
        return vectors.train(
            config,
            self._model(config),
            self.mixture,
            start=before.params,
            teacher=None if first else before.params,
        )

    def _model(self, config: Config) -> MLPSettings:
        return MLPSettings(
            width=self.problem.width,
            blocks=self.problem.blocks,
            dropout=config.model.dropouts[0],
            noise_scale=config.model.noise_scale,
        )

    def _config(self, cell: Cell) -> Config:
        config, problem = default_config(), self.problem
        config.seed = cell.seed
        diffusion = cell.system in ("diffusion", "teacher")
        num_steps = problem.diffusion_updates if diffusion else problem.student_updates
        config.optimizer.update(
            learning_rate=problem.diffusion_learning_rate if diffusion else problem.learning_rate,
            warmup_steps=min(100, num_steps // 2) if diffusion else 0,
            decay="linear",
            ema_decay=0.99,
        )
        config.training.update(num_steps=num_steps, batch_size=problem.batch_size)
        if not diffusion:
            config.objective = cell.system
            config.teacher_checkpoint = "in memory"
            if cell.system == "progressive":
                config.progressive.stages = (2 * cell.steps, cell.steps)
            elif cell.system in ("scd", "sct"):
                config.continuous.update(student_steps=(cell.steps,), warmup_steps=max(1, num_steps // 2))
            elif cell.system == "moments":
                config.moments.student_steps = cell.steps
            elif cell.system in FLOW_MAP_SETTINGS:
                warmup = {"warmup_steps": max(1, num_steps // 2)}
                config.flow_map.update({**warmup, **FLOW_MAP_SETTINGS[cell.system]})
            elif cell.system == "shortcut":
                config.shortcut.target_decay = config.optimizer.ema_decay
            else:
                # As in the paper, annealing takes half of the training.
                config.consistency.student_steps = (cell.steps,)
                if ("consistency.teacher_grid", "ect") not in cell.overrides:
                    config.consistency.anneal_steps = max(1, num_steps // 2)
        cell.override(config)
        return validation.validate(config)


def mean_difference(
    model_fn: ModelFn,
    other_fn: ModelFn,
    x: Float[Array, "B ..."],
    cond: Cond,
    *,
    schedule: Schedule,
) -> float:
    """Mean over data (x, cond), noise and t ~ U(0, 1) of ||x_hat(z_t) - x_hat'(z_t)||^2 / d."""

    @jax.jit
    def run(x: Float[Array, "B ..."], model_fn: ModelFn, other_fn: ModelFn) -> Float[Array, ""]:
        key_t, key_eps = jax.random.split(jax.random.key(0))
        logsnr_t = schedule(jax.random.uniform(key_t, x.shape[:1]))
        z_t = process.diffuse(x, jax.random.normal(key_eps, x.shape), logsnr_t=logsnr_t)
        a, b = (
            process.x_from_v(f(z_t, logsnr_t, cond, None), z_t, logsnr_t=logsnr_t)
            for f in (model_fn, other_fn)
        )
        return jnp.mean(process.mean_square(a - b))

    return float(run(x, *(vectors.as_pytree(f) for f in (model_fn, other_fn))))
