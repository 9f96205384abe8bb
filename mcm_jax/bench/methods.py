"""Compares methods for students of few steps, each with the best of the same learning rates.

All have the same network, share their noise, and start from the same diffusion model, except that those with
another embedding need another model. Learning rates are chosen on a seed of their own.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter

from mcm_jax.bench import avatars, cells, images, mixture, runner, summary
from mcm_jax.bench.cells import RESULTS, Cell, Overrides, Store, Values
from mcm_jax.bench.costs import CALLS
from mcm_jax.config import rows
from mcm_jax.diffusion.sampling import Sampler
from mcm_jax.reporting.trajectories import png
from mcm_jax.system.errors import InputError
from mcm_jax.system.files import write_whole
from mcm_jax.system.paths import Path

_FACTORS = (1 / 3, 1.0, 3.0)
# Continuous time and flow maps need `smooth`: with `arctan`, training to one step diverges.
_SMOOTH: Overrides = (("model.noise_scale", "smooth"),)
_ARCTAN: Overrides = (("model.noise_scale", "arctan"),)


@dataclasses.dataclass(frozen=True)
class Method:
    """A row of the table: a system with its settings."""

    name: str
    system: str
    overrides: Overrides = ()
    sampler: Sampler = "ddim"
    tuned: bool = True  # False: a model that is there before, whose learning rate is not chosen


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The methods that are compared on a problem.

    Attributes:
      title: of the table, without the number of seeds.
      distance: its name in the plot.
      tuned_steps: number of steps for which learning rates are chosen; None: each number has its own.
    """

    problem: mixture.Problem | avatars.Problem
    bench: Callable[[], Callable[[Cell], Values]]
    methods: tuple[Method, ...]
    pairs: tuple[tuple[str, str], ...]
    title: str
    distance: str
    tuned_steps: int | None = None

    def tuning(self, factors: Sequence[float] = _FACTORS) -> list[Cell]:
        """The cells with seed 0 from which learning rates are chosen."""
        return [
            self._cell(method, steps, factor, seed=0)
            for method in self.methods
            if method.tuned
            # Cells of one training follow each other.
            for factor in factors
            for steps in ((self.tuned_steps,) if self.tuned_steps else self.problem.student_steps)
        ]

    def best(self, store: Store, method: Method, steps: int) -> float:
        """The factor of the learning rate that is best at seed 0."""
        found = [
            (self._cell(method, self.tuned_steps or steps, factor, seed=0), factor) for factor in _FACTORS
        ]
        measured = [(store[cell]["distance"], factor) for cell, factor in found if cell in store]
        return min(measured)[1]

    def cells(self, store: Store, method: Method, steps: int, seeds: Sequence[int]) -> list[Cell]:
        """The cells of these seeds, with the learning rate that is best at seed 0."""
        factor = self.best(store, method, steps) if method.tuned else None
        return [self._cell(method, steps, factor, seed) for seed in seeds]

    def _cell(self, method: Method, steps: int, factor: float | None, seed: int) -> Cell:
        rate = self.problem.learning_rate
        rates = () if factor is None else (("optimizer.learning_rate", rate * factor),)
        return Cell(
            self.problem.name, method.system, steps, seed, (*method.overrides, *rates), method.sampler
        )

    def rows(self, store: Store, seeds: Sequence[int]) -> dict[str, list[list[Cell]]]:
        """The cells of every method, by steps and then by seed."""
        return {
            method.name: [self.cells(store, method, steps, seeds) for steps in self.problem.student_steps]
            for method in self.methods
        }

    def _rates(self, store: Store, method: Method) -> str:
        """The chosen learning rates, in the order of the numbers of steps for which they were chosen."""
        if not method.tuned:
            return ""
        steps = (self.tuned_steps,) if self.tuned_steps else self.problem.student_steps
        return ", ".join(
            f"{self.problem.learning_rate * self.best(store, method, each):.2g}" for each in steps
        )

    def table(self, store: Store, seeds: Sequence[int], *, quick: bool) -> str:
        """Markdown: the distance of every method by steps, then differences of methods, paired by seed."""
        steps = self.problem.student_steps
        heads = [summary.count(each) for each in steps]
        lines = [
            f"{self.title} Mean ± one standard error of {len(seeds)} seeds. Lower is better.",
            "",
            *summary.quick_note(quick),
            *summary.head(["Method", *heads, "network calls per example", "learning rates"]),
        ]
        found = self.rows(store, seeds)
        for method in self.methods:
            distances = [summary.mean(summary.paired(store, cells)) for cells in found[method.name]]
            calls = str(CALLS[method.system]) if method.tuned else ""
            lines.append(summary.row([method.name, *distances, calls, self._rates(store, method)]))
        lines += ["", *summary.head(["Difference (negative: the first is better)", *heads])]
        for first, second in self.pairs:
            pairs = zip(found[first], found[second], strict=True)
            differences = [summary.difference(summary.paired(store, *pair)) for pair in pairs]
            lines.append(summary.row([f"{first} - {second}", *differences]))
        return "\n".join(lines) + "\n"

    @matplotlib.rc_context({"svg.fonttype": "path", "font.size": 9})
    def plot(self, store: Store, seeds: Sequence[int]) -> bytes:
        """A PNG of the distance of every method by steps, with bars of one standard error."""
        figure, markers = (
            Figure(figsize=(6.4, 4.4), layout="constrained", dpi=110),
            itertools.cycle("osvPD<>X^*"),
        )
        axes = figure.subplots()
        for method, (name, columns) in zip(self.methods, self.rows(store, seeds).items(), strict=True):
            found = [summary.paired(store, cells) for cells in columns]
            axes.errorbar(
                self.problem.student_steps,
                [each.mean for each in found],
                [each.standard_error for each in found],
                label=name,
                color=None if method.tuned else "#888888",
                linestyle="-" if method.tuned else ":",
                marker=next(markers),
                markersize=4,
                capsize=2,
            )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.set(xlabel="steps", ylabel=self.distance)
        axes.grid(alpha=0.25)
        figure.legend(loc="outside right upper", frameon=False)
        return png(figure)


def _style(name: str, updates: int) -> Overrides:
    """iCT's or ECT's settings of `ct`, with their eight stages over the whole training."""
    lengths = {"ict": {"anneal_steps": updates}, "ect": {"ect_stage_steps": max(1, updates // 8)}}
    settings = {**rows.CT_STYLES[name], **lengths[name]}
    return tuple((f"consistency.{field}", value) for field, value in settings.items())


def _mixture(*, quick: bool) -> Comparison:
    problem = mixture.MIXTURE_64D
    if quick:
        problem = dataclasses.replace(
            mixture.QUICK, student_steps=(2,), diffusion_updates=20, student_updates=10
        )
    return Comparison(
        problem,
        functools.partial(mixture.Bench, problem),
        methods=(
            Method("start, smooth", "diffusion", _SMOOTH, tuned=False),
            Method("start, arctan", "diffusion", _ARCTAN, tuned=False),
            Method("CD", "cd", _SMOOTH),
            Method("CT", "ct", _SMOOTH),
            Method("sCD", "scd", _SMOOTH),
            Method("sCT", "sct", _SMOOTH),
            Method("AYF", "ayf", _SMOOTH),
            Method("MeanFlow", "meanflow", _SMOOTH),
            Method("shortcut", "shortcut", _SMOOTH),
            Method("moment matching", "moments", _SMOOTH, "ddpm"),
            Method("CT, steps of iCT", "ct", (*_SMOOTH, *_style("ict", problem.student_updates))),
            Method("CT, steps of ECT", "ct", (*_SMOOTH, *_style("ect", problem.student_updates))),
            Method("CD, arctan", "cd", _ARCTAN),
            Method("CT, arctan", "ct", _ARCTAN),
        ),
        pairs=(
            ("sCD", "CD"),
            ("sCD", "CD, arctan"),
            ("sCT", "CT"),
            ("sCT", "CT, arctan"),
            ("sCT", "sCD"),
            ("AYF", "CD"),
            ("MeanFlow", "CT"),
            ("shortcut", "CT"),
            ("CT, steps of iCT", "CT"),
            ("CT, steps of ECT", "CT"),
            ("moment matching", "CD"),
        ),
        title="Squared Wasserstein distance to the 64-dimensional mixture (exact); "
        f"{problem.student_updates} updates of {problem.batch_size} examples.",
        distance="squared Wasserstein distance",
    )


def _avatars(out: Path, *, quick: bool) -> Comparison:
    problem, runs = (avatars.QUICK if quick else avatars.AVATARS), out / "avatars"
    # Those of a quick run are few, so they must not take the place of the others.
    data_dir = runs / "data" if quick else images.DATA_DIR
    students = (
        Method("CD", "cd"),
        Method("CT", "ct"),
        Method("sCD", "scd"),
        Method("sCT", "sct"),
        Method("AYF", "ayf"),
        Method("MeanFlow", "meanflow"),
        Method("shortcut", "shortcut"),
        Method("progressive distillation", "progressive"),
        Method("moment matching", "moments", sampler="ddpm"),
    )
    if quick:
        students = (students[0], students[-1])
    return Comparison(
        problem,
        functools.partial(avatars.Bench, problem, runs, data_dir=data_dir),
        methods=(
            Method("teacher, DDIM", "teacher", tuned=False),
            Method("teacher, aDDIM", "teacher", sampler="addim", tuned=False),
            *students,
        ),
        pairs=tuple((method.name, "CD") for method in students[1:]),
        title=f"fd_effnet_lite0 of {problem.num_samples} samples (a proxy, not FID), divided by that of as "
        f"many test images; avatars of {problem.resolution}x{problem.resolution}, {problem.student_calls} "
        "network calls per example for all numbers of steps together; all seeds share the teacher.",
        distance="fd_effnet_lite0, relative to test images",
        tuned_steps=problem.tuned_steps,
    )


def comparison(name: str, out: Path, *, quick: bool = False) -> Comparison:
    """The comparison on a problem of `runner.METHODS`.

    Args:
      out: directory of the results and runs.
      quick: with trainings of seconds.

    Raises:
      InputError: there is no such problem.
    """
    if name not in runner.METHODS:
        raise InputError(f"--methods: {name} is not one of {', '.join(runner.METHODS)}")
    return _mixture(quick=quick) if name == "mixture" else _avatars(out, quick=quick)


def run(out: Path, names: Sequence[str], *, seeds: int = 3, quick: bool = False) -> str:
    """Measures the missing cells, writes OUT/NAME.md for each problem, and returns their Markdown.

    Args:
      out: directory of the results.
      names: problems from `runner.METHODS`.
      seeds: number of seeds that are reported (1, ..., seeds), at least 2; seed 0 chooses learning rates.
      quick: train only briefly, to check that everything runs; the numbers mean little.

    Raises:
      InputError: a problem is unknown, there are fewer seeds, or OUT can't be written or holds other results.
    """
    chosen = {name: comparison(name, out, quick=quick) for name in names}
    runner.start(out, seeds)
    store = Store(out / RESULTS, {name: one.problem for name, one in chosen.items()})
    texts, reported = [], range(1, 1 + seeds)
    for name, compared in chosen.items():
        bench = compared.bench()
        cells.run(compared.tuning(_FACTORS[:1]) if quick else compared.tuning(), store, bench)
        chosen_cells = compared.rows(store, reported)
        # The bench on the mixture remembers one diffusion model and one student.
        wanted = sorted(
            [cell for row in chosen_cells.values() for column in row for cell in column],
            key=lambda cell: (cell.seed, cell.shared),
        )
        cells.run(wanted, store, bench)
        texts.append(compared.table(store, reported, quick=quick))
        write_whole(out / f"{name}.md", texts[-1])
        write_whole(out / f"{name}_distances.png", compared.plot(store, reported))
        if isinstance(bench, avatars.Bench):
            first = {method: [column[0] for column in row] for method, row in chosen_cells.items()}
            write_whole(out / f"{name}.png", bench.picture(first))
    return "\n".join(texts)
