"""The study of one student for several numbers of steps, against a student for each.

Two comparisons are fair in different ways: with as many updates as one dedicated student, the student of all
numbers of steps costs a fraction of theirs; with as many as all of them together, it costs the same.
"""

import dataclasses
from collections.abc import Sequence

from mcm_jax.bench import summary
from mcm_jax.bench.cells import Cell, Overrides, Store
from mcm_jax.bench.mixture import Bench, Problem

# How S is drawn and weighted: see `objectives.multistep`.
VARIANTS: tuple[tuple[str, Overrides], ...] = (
    ("S drawn in proportion to S", (("consistency.steps_power", 1.0),)),
    ("S drawn in proportion to 1 / S", (("consistency.steps_power", -1.0),)),
    ("loss weighted by S", (("consistency.steps_weight_power", 1.0),)),
    ("loss weighted by 1 / S", (("consistency.steps_weight_power", -1.0),)),
)


@dataclasses.dataclass(frozen=True)
class OneStudent:
    """One student for all numbers of steps, by CD and CT; for CD also how S is drawn and weighted."""

    problems: tuple[Problem, ...]
    systems: tuple[str, ...] = ("cd", "ct")
    variants: tuple[tuple[str, Overrides], ...] = VARIANTS  # of CD

    @property
    def problem(self) -> Problem:
        """The only one."""
        (problem,) = self.problems
        return problem

    def plan(self, seeds: Sequence[int]) -> list[tuple[Bench, list[Cell]]]:
        """The cells of each system, seed by seed, and the bench that measures them."""
        return [
            (
                Bench(self.problem),
                [cell for seed in seeds for row in self._rows(system).values() for cell in row(seed)],
            )
            for system in self.systems
        ]

    def table(self, store: Store, seeds: Sequence[int]) -> list[str]:
        """Lines of Markdown."""
        problem = self.problem
        heads = [summary.count(steps) for steps in problem.student_steps]
        lines = [
            "Squared Wasserstein distance to the 64-dimensional mixture, mean ± one standard error of "
            f"{len(seeds)} seeds; batches of {problem.batch_size}.",
        ]
        for system in self.systems:
            rows = self._rows(system)
            found = {
                name: [[cells[n] for cells in map(row, seeds)] for n in range(len(problem.student_steps))]
                for name, row in rows.items()
            }
            lines += ["", *summary.head([system.upper(), *heads])]
            for name, columns in found.items():
                distances = [summary.mean(summary.paired(store, cells)) for cells in columns]
                lines.append(summary.row([name, *distances]))
            dedicated, short, *_ = found
            lines += ["", *summary.head([f"{system.upper()}, difference (negative: better)", *heads])]
            for name, columns in found.items():
                if name == dedicated:
                    continue
                other = short if name in dict(self.variants) else dedicated
                pairs = zip(columns, found[other], strict=True)
                differences = [summary.difference(summary.paired(store, *pair)) for pair in pairs]
                lines.append(summary.row([f"{name} - {other}", *differences]))
        return lines

    def _rows(self, system: str) -> dict[str, "_Row"]:
        """The cells of each row: of the dedicated students first, then of one student in as many updates."""
        problem = self.problem
        steps, updates = problem.student_steps, problem.student_updates
        together = (("consistency.student_steps", steps),)
        longer = (
            ("training.num_steps", len(steps) * updates),
            ("consistency.anneal_steps", len(steps) * updates // 2),
        )
        rows = {
            f"a student for each, {updates} updates": _Row(problem, system, ()),
            f"one student, {updates} updates": _Row(problem, system, together),
            f"one student, {len(steps) * updates} updates": _Row(problem, system, (*together, *longer)),
        }
        if system == "cd":
            rows |= {name: _Row(problem, system, (*together, *changed)) for name, changed in self.variants}
        return rows


@dataclasses.dataclass(frozen=True)
class _Row:
    """The cells of a row by seed, one for each number of steps."""

    problem: Problem
    system: str
    overrides: Overrides

    def __call__(self, seed: int) -> list[Cell]:
        return [
            Cell(self.problem.name, self.system, steps, seed, self.overrides)
            for steps in self.problem.student_steps
        ]
