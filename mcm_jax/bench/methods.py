"""Compares methods for students of few steps on the mixture, each with the best of the same learning rates.

All have the same network, batch and number of updates, and share their noise. Those with the same embedding
start from the same diffusion model. The learning rate of each method and number of steps is chosen on a seed
of its own.
"""

import dataclasses
from collections.abc import Sequence

from mcm_jax.bench import cells, mixture, runner, summary
from mcm_jax.bench.cells import RESULTS, Cell, Store
from mcm_jax.bench.mixture import Problem
from mcm_jax.models.embeddings import NoiseScale
from mcm_jax.system.files import write_whole
from mcm_jax.system.paths import Path


@dataclasses.dataclass(frozen=True)
class Method:
    """An objective with an embedding of the noise level, which the diffusion model at its start shares.

    Attributes:
      calls: network calls per example and update: the student with its gradient counts as three calls, and a
        forward derivative as two.
    """

    name: str
    system: str
    calls: int
    noise_scale: NoiseScale = "smooth"


# In continuous time, one-step training diverges with arctan, so `validation` refuses it.
METHODS = (
    Method("CD", "cd", 5),
    Method("CT", "ct", 4),
    Method("sCD", "scd", 6),
    Method("sCT", "sct", 5),
    Method("CD, arctan", "cd", 5, "arctan"),
    Method("CT, arctan", "ct", 4, "arctan"),
)
_PAIRS = (("sCD", "CD"), ("sCD", "CD, arctan"), ("sCT", "CT"), ("sCT", "CT, arctan"), ("sCT", "sCD"))
_NOISE_SCALES: tuple[NoiseScale, ...] = ("smooth", "arctan")
_FACTORS = (1 / 3, 1.0, 3.0)
_QUICK = dataclasses.replace(mixture.QUICK, student_steps=(2,), diffusion_updates=20, student_updates=10)


def run(out: Path, *, seeds: int = 3, quick: bool = False) -> str:
    """Measures the missing cells, writes OUT/methods.md, and returns its Markdown.

    Args:
      out: directory of the results.
      seeds: number of seeds that are reported (1, ..., seeds), at least 2; seed 0 chooses learning rates.
      quick: train only briefly, to check that everything runs; the numbers mean little.

    Raises:
      InputError: there are fewer seeds, or OUT can't be written or holds other results.
    """
    runner.start(out, seeds)
    problem = _QUICK if quick else mixture.MIXTURE_64D
    store = Store(out / RESULTS, {problem.name: problem})
    bench = mixture.Bench(problem)
    reported = range(1, 1 + seeds)
    cells.run(tuning(problem)[:: len(_FACTORS)] if quick else tuning(problem), store, bench)
    students = [
        cell
        for method in METHODS
        for steps in problem.student_steps
        for cell in _chosen(problem, store, method, steps, reported)
    ]
    starts = [
        _start(problem, noise_scale, steps, seed)
        for noise_scale in _NOISE_SCALES
        for steps in problem.student_steps
        for seed in reported
    ]
    # The bench remembers one diffusion model.
    cells.run(sorted([*starts, *students], key=lambda cell: (cell.seed, cell.shared)), store, bench)
    markdown = table(problem, store, reported, quick=quick)
    write_whole(out / "methods.md", markdown)
    return markdown


def tuning(problem: Problem) -> list[Cell]:
    """Every method, number of steps and learning rate, with seed 0."""
    return [
        _cell(problem, method, steps, factor, seed=0)
        for method in METHODS
        for steps in problem.student_steps
        for factor in _FACTORS
    ]


def table(problem: Problem, store: Store, seeds: Sequence[int], *, quick: bool) -> str:
    """Markdown: the distance of every method by steps, then differences of methods, paired by seed."""
    heads = [summary.count(steps) for steps in problem.student_steps]
    lines = [
        "Squared Wasserstein distance to the 64-dimensional mixture (exact), mean ± one standard error of "
        f"{len(seeds)} seeds; {problem.student_updates} updates of {problem.batch_size} examples. Lower is "
        "better.",
        "",
    ]
    lines += summary.quick_note(quick)
    lines += summary.head(["Method", *heads, "network calls per example", "learning rates"])
    for noise_scale in _NOISE_SCALES:
        found = [
            [_start(problem, noise_scale, steps, seed) for seed in seeds] for steps in problem.student_steps
        ]
        lines += [
            summary.row(
                [
                    f"start, {noise_scale}",
                    *(summary.mean(summary.paired(store, cells)) for cells in found),
                    "",
                    "",
                ]
            )
        ]
    chosen = {
        method.name: [_chosen(problem, store, method, steps, seeds) for steps in problem.student_steps]
        for method in METHODS
    }
    for method in METHODS:
        best = [_best(problem, store, method, steps) for steps in problem.student_steps]
        rates = ", ".join(f"{problem.learning_rate * factor:.2g}" for factor in best)
        distances = [summary.mean(summary.paired(store, cells)) for cells in chosen[method.name]]
        lines.append(summary.row([method.name, *distances, str(method.calls), rates]))
    lines += ["", *summary.head(["Difference (negative: the first is better)", *heads])]
    for first, second in _PAIRS:
        pairs = zip(chosen[first], chosen[second], strict=True)
        differences = [summary.difference(summary.paired(store, *pair)) for pair in pairs]
        lines.append(summary.row([f"{first} - {second}", *differences]))
    return "\n".join(lines) + "\n"


def _start(problem: Problem, noise_scale: NoiseScale, steps: int, seed: int) -> Cell:
    return Cell(problem.name, "diffusion", steps, seed, (("model.noise_scale", noise_scale),))


def _cell(problem: Problem, method: Method, steps: int, factor: float, seed: int) -> Cell:
    rate = (("optimizer.learning_rate", problem.learning_rate * factor),)
    scale = (("model.noise_scale", method.noise_scale),)
    return Cell(problem.name, method.system, steps, seed, (*scale, *rate))


def _best(problem: Problem, store: Store, method: Method, steps: int) -> float:
    measured = [factor for factor in _FACTORS if _cell(problem, method, steps, factor, seed=0) in store]
    return min(measured, key=lambda factor: store[_cell(problem, method, steps, factor, seed=0)]["distance"])


def _chosen(problem: Problem, store: Store, method: Method, steps: int, seeds: Sequence[int]) -> list[Cell]:
    """The cells of these seeds, with the learning rate that is best at seed 0."""
    factor = _best(problem, store, method, steps)
    return [_cell(problem, method, steps, factor, seed) for seed in seeds]
