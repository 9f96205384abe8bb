"""Studies on mixtures that explain three findings: what many-step CT learns, aDDIM's teachers, and annealing.

median: an unsquared distance of a whole vector is smallest, on average, at the geometric median of x given
z_t; a squared one is smallest at the mean. Where few independent coordinates are undecided, CT with a small
huber_epsilon therefore favours the largest mode. With n of them, ||x - f|| varies less as n grows, and the
median differs from the mean by about E[(x - E x)^3] / (2 n Var x) in each.

annealing: the paper anneals N_teacher from 64 to 1280 in 200,000 updates. `fitted_range` is the rule for
shorter trainings. It was fixed before its measurement, but after a trial in which 8 -> 128 had been better in
1,500 updates than constants and than 64 -> 1280.

teachers: DDIM and aDDIM as samplers of diffusion models that were trained for different numbers of updates.
The relative distance of a model is its distance in 512 steps of DDIM, divided by the distance of as many new
samples of the data.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from mcm_jax.bench import cells, findings, runner, summary
from mcm_jax.bench.cells import RESULTS, Cell, Overrides, Store
from mcm_jax.bench.mixture import Bench, Problem
from mcm_jax.bench.one_student import OneStudent
from mcm_jax.bench.runner import STUDIES
from mcm_jax.diffusion.mixtures import Mixture, random_mixture
from mcm_jax.diffusion.sampling import Sampler
from mcm_jax.objectives.consistency import Consistency
from mcm_jax.system.errors import InputError
from mcm_jax.system.files import write_whole
from mcm_jax.system.paths import Path

WEIGHTS = (0.7, 0.2, 0.1)  # of the modes; the largest is the first
_MODES = np.array([-1.0, 2.0, 3.0])  # their mean is 0
_STD, _DECIDED_STD = 0.25, 0.1
_SHARE = "largest_share"
DISTANCES: dict[str, Overrides] = {
    "unsquared": (),
    "squared": (("consistency.huber_epsilon", 1.0), ("consistency.loss_weight", "snr_plus_one")),
}
SAMPLERS: tuple[Sampler, ...] = ("ddim", "addim")


@runtime_checkable
class Study(Protocol):
    """Cells of some problems, and a table of them."""

    @property
    def problems(self) -> Sequence[Problem]:
        """The problems, each of its own name."""
        ...

    def plan(self, seeds: Sequence[int]) -> list[tuple[Bench, list[Cell]]]:
        """The cells of each problem, seed by seed, and the bench that measures them."""
        ...

    def table(self, store: Store, seeds: Sequence[int]) -> list[str]:
        """Lines of Markdown."""
        ...


@dataclasses.dataclass(frozen=True)
class Modes(Problem):
    """Coordinates of three modes in a random basis: all of them, or only the first few.

    Attributes:
      undecided: the number of coordinates with modes, None for all; the others are narrow Gaussians.
    """

    undecided: int | None = None

    def mixture(self) -> Mixture:
        """Modes at -1, 2 and 3 of weights 0.7, 0.2 and 0.1, scaled to E ||x||^2 / d = 0.1."""
        basis = random_mixture(0, dimension=self.dimension, components=1).basis
        has_modes = (np.arange(self.dimension) < self._undecided)[:, None]
        weights = np.tile(WEIGHTS, (self.dimension, 1))
        means = np.where(has_modes, _MODES, 0.0)
        stds = np.broadcast_to(np.where(has_modes, _STD, _DECIDED_STD), means.shape)
        scale = np.sqrt(0.1 / np.mean(np.sum(weights * (means**2 + stds**2), axis=1)))
        return Mixture(basis, weights, scale * means, scale * stds)

    def largest_share(self, exact: Mixture, samples: np.ndarray) -> float:
        """The share of coordinates with modes that are nearest to the largest mode; 0.7 for the data."""
        u = samples @ np.asarray(exact.basis)[:, : self._undecided]
        distances = np.abs(u[..., None] - np.asarray(exact.means)[: self._undecided])
        return float(np.mean(np.argmin(distances, axis=-1) == 0))

    @property
    def _undecided(self) -> int:
        return self.dimension if self.undecided is None else self.undecided


@dataclasses.dataclass(frozen=True)
class Median:
    """CT with the unsquared and with the squared distance, by dimension and student steps."""

    problems: tuple[Modes, ...]

    def plan(self, seeds: Sequence[int]) -> list[tuple[Bench, list[Cell]]]:
        """The cells of each problem, seed by seed, and the bench that measures them."""
        return [
            (
                Bench(problem, problem.mixture(), {_SHARE: problem.largest_share}),
                [cell for seed in seeds for cell in self._cells(problem, seed)],
            )
            for problem in self.problems
        ]

    def _cells(self, problem: Modes, seed: int) -> list[Cell]:
        return [
            Cell(problem.name, "ct", steps, seed, overrides)
            for overrides in DISTANCES.values()
            for steps in problem.student_steps
        ]

    def table(self, store: Store, seeds: Sequence[int]) -> list[str]:
        """Lines of Markdown."""
        first = self.problems[0]
        lines = [
            "CT where some coordinates are undecided between modes of weights "
            f"{', '.join(map(str, WEIGHTS))}, mean ± one standard error of {len(seeds)} seeds; "
            f"{first.student_updates} updates of {first.batch_size} examples. 'unsquared': huber_epsilon "
            "1e-4 and loss weight sqrt(SNR + 1); 'squared': 1 and SNR + 1.",
        ]
        steps = sorted({steps for problem in self.problems for steps in problem.student_steps})
        for quantity, title in (
            (_SHARE, f"Share of the largest mode (data: {WEIGHTS[0]})"),
            ("distance", "Squared Wasserstein distance"),
        ):
            lines += ["", *summary.head([title, *map(summary.count, steps)])]
            for problem in self.problems:
                lines += self._rows(problem, steps, store, seeds, quantity)
        return lines

    def _rows(
        self, problem: Modes, steps: Sequence[int], store: Store, seeds: Sequence[int], quantity: str
    ) -> list[str]:
        name = f"{problem.dimension}-D, {problem.undecided or 'all'} undecided"
        rows = {label: [f"{name}, {label}"] for label in (*DISTANCES, "difference")}
        for n in steps:
            if n not in problem.student_steps:
                for row in rows.values():
                    row.append("")
                continue
            found = [
                [Cell(problem.name, "ct", n, seed, overrides) for seed in seeds]
                for overrides in DISTANCES.values()
            ]
            for label, cells_of_seeds in zip(DISTANCES, found, strict=True):
                measured = summary.paired(store, cells_of_seeds, quantity=quantity)
                rows[label].append(summary.mean(measured, digits=4))
            measured = summary.paired(store, *found, quantity=quantity)
            rows["difference"].append(summary.difference(measured, digits=4))
        return [summary.row(row) for row in rows.values()]


@dataclasses.dataclass(frozen=True)
class Teachers:
    """DDIM and aDDIM as samplers of diffusion models of different trainings, and of the exact denoiser."""

    problems: tuple[Problem, ...]

    def plan(self, seeds: Sequence[int]) -> list[tuple[Bench, list[Cell]]]:
        """The cells of each problem, seed by seed, and the bench that measures them."""
        last = self.problems[-1]
        found = []
        for problem in self.problems:
            sampled = [cell for seed in seeds for cell in _samplings(problem, "diffusion", seed)]
            if problem == last:  # The exact denoiser and the data are the same for all problems.
                sampled += [cell for seed in seeds for cell in _samplings(problem, "teacher", seed)]
                sampled += [_data(problem, seed) for seed in seeds]
            found.append((Bench(problem), sampled))
        return found

    def table(self, store: Store, seeds: Sequence[int]) -> list[str]:
        """Lines of Markdown."""
        last = self.problems[-1]
        heads = [summary.count(steps) for steps in last.sampler_steps]
        lines = [
            "Diffusion models of the 64-dimensional mixture: DDIM's distance minus aDDIM's, by sampling "
            f"steps (positive: aDDIM is better), mean ± one standard error of {len(seeds)} seeds. "
            f"Relative distance: the distance in {last.diffusion_sampling_steps} steps of DDIM, divided by "
            "the mean distance of as many new samples of the data.",
            "",
            *summary.head(["Teacher", "relative distance", *heads]),
        ]
        floor = summary.paired(store, [_data(last, seed) for seed in seeds]).mean
        models = [(f"{p.diffusion_updates} updates", p, "diffusion") for p in self.problems]
        for name, problem, system in (*models, ("exact denoiser", last, "teacher")):
            relative = [
                store[_sampling(problem, system, problem.diffusion_sampling_steps, seed)]["distance"] / floor
                for seed in seeds
            ]
            differences = [
                summary.paired(
                    store,
                    [_sampling(problem, system, steps, seed) for seed in seeds],
                    [_sampling(problem, system, steps, seed, "addim") for seed in seeds],
                )
                for steps in problem.sampler_steps
            ]
            lines.append(
                summary.row(
                    [
                        name,
                        summary.mean(findings.measure(relative), digits=1),
                        *(summary.difference(one, digits=4) for one in differences),
                    ]
                )
            )
        return lines


def _sampling(problem: Problem, system: str, steps: int, seed: int, sampler: Sampler = "ddim") -> Cell:
    return Cell(problem.name, system, steps, seed, sampler=sampler)


def _samplings(problem: Problem, system: str, seed: int) -> list[Cell]:
    return [
        *(
            _sampling(problem, system, steps, seed, sampler)
            for steps in problem.sampler_steps
            for sampler in SAMPLERS
        ),
        _sampling(problem, system, problem.diffusion_sampling_steps, seed),
    ]


def _data(problem: Problem, seed: int) -> Cell:
    return Cell(problem.name, "data", 1, seed)


def fitted_range(updates: int, *, power: float) -> tuple[int, int]:
    """The paper's 64 and 1280 teacher steps times (updates / 200,000)^power, at least 1.

    power = 1 keeps the paper's number of updates per teacher step. power = 1/2, the rule of the study,
    balances two errors: that of the teacher's steps, which falls as 1 / N, and that of learning each step
    from the next one, which grows as N / updates. Their sum is smallest where N grows as the root of the
    updates.

    Examples:
      >>> fitted_range(1500, power=0.5), fitted_range(1500, power=1.0), fitted_range(200_000, power=0.5)
      ((6, 111), (1, 10), (64, 1280))
    """
    paper = Consistency()
    scale = (updates / (2 * paper.anneal_steps)) ** power  # annealing takes half of the paper's training
    first, last = (max(1, round(scale * n)) for n in (paper.teacher_steps_first, paper.teacher_steps_last))
    return first, last


@dataclasses.dataclass(frozen=True)
class Annealing:
    """CD with N_teacher annealed over the fitted range, against other ranges and constants."""

    problems: tuple[Problem, ...]

    def plan(self, seeds: Sequence[int]) -> list[tuple[Bench, list[Cell]]]:
        """The cells of each problem, seed by seed, and the bench that measures them."""
        return [
            (
                Bench(problem),
                [
                    _annealed(problem, chosen, seed)
                    for seed in seeds
                    for chosen in self._ranges(problem).values()
                ],
            )
            for problem in self.problems
        ]

    def table(self, store: Store, seeds: Sequence[int]) -> list[str]:
        """Lines of Markdown."""
        (steps,) = self.problems[0].student_steps
        lines = [
            f"CD in {summary.count(steps)} on the 64-dimensional mixture: squared Wasserstein distance, mean "
            f"± one standard error of {len(seeds)} seeds. The rule multiplies the paper's N_teacher, "
            "64 → 1280, by the root of updates / 200,000. Annealing takes half of each training. A positive "
            "difference: the rule is better.",
        ]
        for problem in self.problems:
            ranges = self._ranges(problem)
            rule = [_annealed(problem, ranges["the rule"], seed) for seed in seeds]
            lines += [
                "",
                *summary.head(
                    [f"{problem.student_updates} updates", "N_teacher", "distance", "minus the rule's"]
                ),
            ]
            for name, (first, last) in ranges.items():
                found = [_annealed(problem, (first, last), seed) for seed in seeds]
                difference = "" if found == rule else summary.difference(summary.paired(store, found, rule))
                teacher_steps = f"{first}" if first == last else f"{first} → {last}"
                distance = summary.mean(summary.paired(store, found))
                lines.append(summary.row([name, teacher_steps, distance, difference]))
        return lines

    def _ranges(self, problem: Problem) -> dict[str, tuple[int, int]]:
        paper = Consistency()
        return {
            "the rule": fitted_range(problem.student_updates, power=0.5),
            "as many updates per teacher step": fitted_range(problem.student_updates, power=1.0),
            "the paper's range": (int(paper.teacher_steps_first), int(paper.teacher_steps_last)),
            **{f"constant {n}": (n, n) for n in problem.constants},
        }


def _annealed(problem: Problem, chosen: tuple[int, int], seed: int) -> Cell:
    (steps,) = problem.student_steps
    return Cell(problem.name, "cd", steps, seed, findings.annealed(*chosen))


def _full() -> dict[str, Study]:
    modes = [
        Modes(
            f"modes{dimension}d_{undecided or 'all'}",
            dimension=dimension,
            width=128,
            diffusion_updates=2000,
            student_steps=student_steps,
            undecided=undecided,
        )
        for dimension, undecided, student_steps in (
            *((2, None, (8,)), (8, None, (1, 2, 4, 8)), (32, None, (8,))),
            *((8, 1, (1, 8)), (32, 1, (8,)), (128, 1, (8,))),
        )
    ]
    annealing = [
        Problem(
            f"annealing{updates}",
            dimension=64,
            student_updates=updates,
            student_steps=(4,),
            constants=(8, 32, 128, 1024),
        )
        for updates in (1500,)
    ]
    teachers = [
        Problem(f"teacher{updates}", dimension=64, diffusion_updates=updates) for updates in (250, 1000, 4000)
    ]
    return {
        "median": Median(tuple(modes)),
        "annealing": Annealing(tuple(annealing)),
        "teachers": Teachers(tuple(teachers)),
        "one_student": OneStudent((Problem("one_student", dimension=64),)),
    }


def _quick() -> dict[str, Study]:
    tiny: dict[str, Any] = {
        "width": 16,
        "blocks": 1,
        "diffusion_updates": 4,
        "student_updates": 4,
        "batch_size": 16,
    }
    steps = {"sampler_steps": (2,), "diffusion_sampling_steps": 4}
    return {
        "median": Median((Modes("modes2d", dimension=2, student_steps=(1, 2), **tiny),)),
        "annealing": Annealing(
            (Problem("annealing", dimension=2, student_steps=(2,), constants=(8,), **tiny),)
        ),
        "teachers": Teachers((Problem("teacher", dimension=2, **tiny, **steps),)),
        "one_student": OneStudent(
            (Problem("one_student", dimension=2, student_steps=(1, 2), **tiny),), ("cd",), variants=()
        ),
    }


def run(out: Path, names: Sequence[str], *, seeds: int = 3, quick: bool = False) -> str:
    """Measures the missing cells of these studies, writes OUT/NAME.md for each, and returns their Markdown.

    Args:
      out: directory of the results.
      names: names from `runner.STUDIES`.
      seeds: number of seeds (0, ..., seeds - 1), at least 2.
      quick: train only briefly, to check that everything runs; the numbers mean little.

    Raises:
      InputError: an argument is invalid, or OUT can't be written or holds other results.
    """
    for name in names:
        if name not in STUDIES:
            raise InputError(f"--studies: {name} is not one of {', '.join(STUDIES)}")
    runner.start(out, seeds)
    chosen = _quick() if quick else _full()
    store = Store(
        out / RESULTS, {problem.name: problem for study in chosen.values() for problem in study.problems}
    )
    texts = []
    for name in names:
        study = chosen[name]
        for bench, wanted in study.plan(range(seeds)):
            print(f"== {bench.problem.name}: {len(wanted)} cells", flush=True)
            cells.run(wanted, store, bench)
        texts.append("\n".join([*summary.quick_note(quick), *study.table(store, range(seeds))]) + "\n")
        write_whole(out / f"{name}.md", texts[-1])
    return "\n".join(texts)
