"""The paper's eight findings (SPEC 9) as contrasts (weighted sums of cells), and the rule that decides them.

The rule was fixed before any measurement. A contrast 'holds' if its mean over seeds has the paper's sign and
exceeds two standard errors, 'does not hold' if it has the opposite sign and exceeds two standard errors, and
is 'undecided' otherwise. A finding holds if all of its contrasts hold, does not hold if any of them does not
hold, and is undecided otherwise. Every contrast is defined so that the paper's sign is positive, and is
paired: cells of one seed share their noise, and students share their teacher.

With few seeds the rule is loose. Without any true difference, the mean exceeds two standard errors on a given
side in 9% of all cases with three seeds and in 6% with five; each contrast of a finding adds such a chance.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from mcm_jax.bench.cells import Cell, Overrides, Store
from mcm_jax.diffusion.sampling import Sampler
from mcm_jax.reporting import paper

Verdict = Literal["holds", "does not hold", "undecided"]

DDIM_TEACHER: Overrides = (("consistency.teacher_step", "ddim"),)


def annealed(first: int, last: int) -> Overrides:
    """Overrides for N_teacher annealed from first to last."""
    return (
        ("consistency.teacher_steps_first", float(first)),
        ("consistency.teacher_steps_last", float(last)),
    )


def constant(teacher_steps: int) -> Overrides:
    """Overrides for a constant N_teacher instead of an annealed one."""
    return annealed(teacher_steps, teacher_steps)


@dataclasses.dataclass(frozen=True)
class Term:
    """The product weight * values[quantity] of a cell, for any seed."""

    weight: float
    system: str
    steps: int
    overrides: Overrides = ()
    sampler: Sampler = "ddim"
    quantity: str = "distance"

    def cell(self, problem: str, seed: int) -> Cell:
        """The term's cell for one problem and seed."""
        return Cell(problem, self.system, self.steps, seed, self.overrides, self.sampler)


@dataclasses.dataclass(frozen=True)
class Contrast:
    """A sum of terms that is positive if the paper is right; `published` is the sum of the paper's FIDs."""

    name: str
    terms: tuple[Term, ...]
    published: float | None = None

    def values(self, store: Store, problem: str, seeds: Sequence[int]) -> list[float]:
        """The sum for each seed."""
        return [
            sum(term.weight * store[term.cell(problem, seed)][term.quantity] for term in self.terms)
            for seed in seeds
        ]


@dataclasses.dataclass(frozen=True)
class Finding:
    """One of the eight findings, in words and as contrasts."""

    number: int
    statement: str
    contrasts: tuple[Contrast, ...]


@dataclasses.dataclass(frozen=True)
class Measured:
    """A contrast's mean over seeds, its standard error, and the verdict."""

    mean: float
    standard_error: float
    verdict: Verdict

    @property
    def detectable(self) -> float:
        """The smallest mean difference that would have been decided with this standard error."""
        return 2 * self.standard_error


def measure(values: Sequence[float]) -> Measured:
    """Applies the rule to a contrast's values, one per seed, for at least two seeds."""
    mean, error = float(np.mean(values)), float(np.std(values, ddof=1) / math.sqrt(len(values)))
    if abs(mean) <= 2 * error:
        return Measured(mean, error, "undecided")
    return Measured(mean, error, "holds" if mean > 0 else "does not hold")


def verdict(verdicts: Sequence[Verdict]) -> Verdict:
    """A finding's verdict from the verdicts of its contrasts."""
    if "does not hold" in verdicts:
        return "does not hold"
    return "undecided" if "undecided" in verdicts else "holds"


def findings(
    *,
    student_steps: Sequence[int],
    constants: Sequence[int],
    constant_student_steps: Sequence[int],
    sampler_steps: Sequence[int],
    best_teacher: Term,
) -> tuple[Finding, ...]:
    """All eight findings, at the step counts that a problem can afford.

    Args:
      student_steps: values of S, ascending, for the first, second, fifth and seventh finding; in the paper 1,
        2, 4, 8.
      constants: the constant values of N_teacher in the sixth finding.
      constant_student_steps: the values of S at which these are compared.
      sampler_steps: the numbers of steps at which aDDIM and DDIM are compared as samplers.
      best_teacher: the teacher of the third finding; in the paper, 512 steps of aDDIM.
    """
    return (
        _steps_help(student_steps),
        _distillation_helps(student_steps),
        _matches_the_teacher(best_teacher, max(student_steps)),
        _addim_samples_better(sampler_steps),
        _addim_teaches_better(student_steps),
        _annealing_helps(constants, constant_student_steps),
        _beats_progressive(student_steps),
        _approaches_diffusion(student_steps),
    )


def _small(system: str) -> Callable[[int], float]:
    return lambda steps: paper.fid("table1", f"small/imagenet64/{system}", steps)


def _steps_help(student_steps: Sequence[int]) -> Finding:
    contrasts = []
    for system in ("ct", "cd"):
        for few, more in zip(student_steps, student_steps[1:], strict=False):
            terms = (Term(1.0, system, few), Term(-1.0, system, more))
            published = _small(system)(few) - _small(system)(more)
            contrasts.append(Contrast(f"{system.upper()}, {few} - {more} steps", terms, published))
    return Finding(1, "The distance falls as student steps grow, for CT and CD", tuple(contrasts))


def _distillation_helps(student_steps: Sequence[int]) -> Finding:
    def gap(steps: int) -> tuple[tuple[Term, ...], float]:
        return (Term(1.0, "ct", steps), Term(-1.0, "cd", steps)), _small("ct")(steps) - _small("cd")(steps)

    contrasts = [Contrast(f"CT - CD, {steps} steps", *gap(steps)) for steps in (1, 2)]
    last = max(student_steps)
    (few, published_few), (many, published_many) = gap(1), gap(last)
    minus = tuple(dataclasses.replace(term, weight=-term.weight) for term in many)
    closing = Contrast(f"(CT - CD), 1 - {last} steps", few + minus, published_few - published_many)
    return Finding(2, f"CD beats CT at 1 and 2 steps; the gap closes by {last}", (*contrasts, closing))


def _matches_the_teacher(teacher: Term, steps: int) -> Finding:
    """By our definition, 'matches' means at most 10% above the teacher's distance."""
    published = 1.1 * paper.tables()["table1"]["diffusion_addim_512"]["small/imagenet64"] - _small("cd")(8)
    terms = (dataclasses.replace(teacher, weight=1.1), Term(-1.0, "cd", steps))
    contrast = Contrast(f"1.1 x diffusion model - CD, {steps} steps", terms, published)
    name = (
        f"{steps}-step CD is within 10% of a diffusion model of its size in {teacher.steps} steps of "
        f"{teacher.sampler}"
    )
    return Finding(3, name, (contrast,))


def _addim_samples_better(sampler_steps: Sequence[int]) -> Finding:
    contrasts = [_against_ddim_sampling(steps) for steps in sampler_steps]
    return Finding(4, "aDDIM beats DDIM as a sampler at moderate step counts", tuple(contrasts))


def _against_ddim_sampling(steps: int) -> Contrast:
    system = "teacher"
    terms = (Term(1.0, system, steps), Term(-1.0, system, steps, sampler="addim"))
    return Contrast(f"DDIM - aDDIM, {steps} steps", terms)


def _addim_teaches_better(student_steps: Sequence[int]) -> Finding:
    contrasts = []
    for steps in student_steps:
        sign = 1.0 if steps >= 4 else -1.0
        terms = (Term(sign, "cd", steps, DDIM_TEACHER), Term(-sign, "cd", steps))
        published = sign * (paper.fid("table4", "ddim", steps) - paper.fid("table4", "addim", steps))
        name = "DDIM - aDDIM" if sign > 0 else "aDDIM - DDIM"
        contrasts.append(Contrast(f"{name}, {steps} steps", terms, published))
    return Finding(
        5, "As the teacher's step aDDIM wins from 4 student steps on, DDIM at 1 and 2", tuple(contrasts)
    )


def _annealing_helps(constants: Sequence[int], student_steps: Sequence[int]) -> Finding:
    contrasts = []
    for steps in student_steps:
        for teacher_steps in constants:
            terms = (Term(1.0, "cd", steps, constant(teacher_steps)), Term(-1.0, "cd", steps))
            annealed = paper.fid("table2", "64->1280", steps)
            published = paper.fid("table2", str(teacher_steps), steps) - annealed
            contrasts.append(Contrast(f"{teacher_steps} - annealed, {steps} steps", terms, published))
    return Finding(6, "Annealing 64 -> 1280 beats every constant N_teacher", tuple(contrasts))


def _beats_progressive(student_steps: Sequence[int]) -> Finding:
    contrasts = []
    for steps in student_steps:
        terms = (Term(1.0, "progressive", steps), Term(-1.0, "cd", steps))
        published = paper.fid("table3", "pd", steps) - paper.fid("table3", "cd", steps)
        contrasts.append(Contrast(f"PD - CD, {steps} steps", terms, published))
    # At that point PD has run the updates of all its stages, but CD only those of one training.
    return Finding(7, "CD beats progressive distillation", tuple(contrasts))


def _approaches_diffusion(student_steps: Sequence[int]) -> Finding:
    few, many, most = min(student_steps), 4, 16
    contrasts = [
        Contrast(
            f"CT from diffusion, {a} - {b} steps",
            (Term(1.0, "ct", a, quantity="from_diffusion"), Term(-1.0, "ct", b, quantity="from_diffusion")),
        )
        for a, b in ((few, many), (many, most))
    ]
    return Finding(8, "Many-step CT approaches the diffusion model, as a function", tuple(contrasts))


def cells_of(chosen: Sequence[Finding], problem: str, seeds: Sequence[int]) -> list[Cell]:
    """Every cell that the findings need, once each, sorted by seed, system and steps."""
    terms = [term for finding in chosen for contrast in finding.contrasts for term in contrast.terms]
    cells = dict.fromkeys(term.cell(problem, seed) for seed in seeds for term in terms)
    # Steps ascend, except in progressive distillation: each stage starts from the one with twice its steps.
    down = {"progressive": -1}
    return sorted(cells, key=lambda c: (c.seed, c.system, down.get(c.system, 1) * c.steps, str(c.overrides)))
