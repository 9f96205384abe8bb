"""Summarises the stored results of the bench as Markdown and as a figure."""

import io
from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter

from mcm_jax.bench.cells import Cell, Store
from mcm_jax.bench.choices import STUDENT_STEPS, Choice, measured
from mcm_jax.bench.findings import DDIM_TEACHER, Contrast, Finding, Measured, Term, measure, verdict


@runtime_checkable
class Problem(Protocol):
    """The findings and choices of a problem."""

    def findings(self) -> Sequence[Finding]:
        """The findings that can be measured on this problem."""
        ...

    def choices(self) -> Sequence[Choice]:
        """The open choices that can be compared on this problem."""
        ...


Problems = Mapping[str, Problem]

_NAMES = {
    "mixture": "mixture, 64-D",
    "mixture2d": "mixture, 2-D",
    "openmoji": "OpenMoji 16x16",
}
_DISTANCES = {
    "mixture": "squared Wasserstein distance, exact",
    "mixture2d": "squared Wasserstein distance, exact",
    "openmoji": "fd_effnet_lite0_1024 (a proxy, not FID)",
}
# Colours from Okabe and Ito's colour-blind-safe palette; the markers differ too.
_SYSTEMS = (
    ("CD", Term(1.0, "cd", 1), "#0072b2", "o"),
    ("CD, DDIM teacher", Term(1.0, "cd", 1, DDIM_TEACHER), "#56b4e9", "v"),
    ("CT", Term(1.0, "ct", 1), "#d55e00", "s"),
    ("PD", Term(1.0, "progressive", 1), "#009e73", "D"),
)
_SAMPLERS = (
    ("teacher, DDIM", Term(1.0, "teacher", 1), "#999999", "v"),
    ("teacher, aDDIM", Term(1.0, "teacher", 1, sampler="addim"), "#000000", "o"),
)


def markdown(store: Store, problems: Problems, seeds: Sequence[int], *, quick: bool) -> str:
    """The verdicts, then every difference beside the paper's, then the measured open choices."""
    lines = [
        f"Seeds: {len(seeds)}. Each number is a measured difference that is positive if the paper is right, "
        "as mean ± one standard error over the seeds; 'paper' is the same difference between the paper's "
        "FIDs, on another scale. Rule: a difference holds if it is more than two standard errors above 0, "
        "does not hold if it is more than two standard errors below 0, and is undecided otherwise.",
        "",
    ]
    lines += quick_note(quick)
    lines += _summary(store, problems, seeds)
    for number in sorted({f.number for problem in problems.values() for f in problem.findings()}):
        lines += ["", *_details(store, problems, seeds, number)]
    for name, problem in problems.items():
        lines += _choices(store, problem.choices(), name, seeds)
    return "\n".join(lines) + "\n"


def _summary(store: Store, problems: Problems, seeds: Sequence[int]) -> list[str]:
    rows = {f.number: f.statement for problem in problems.values() for f in problem.findings()}
    lines = head(["Finding", *(_NAMES[name] for name in problems)])
    for number, statement in sorted(rows.items()):
        cells = []
        for name, problem in problems.items():
            (finding,) = [f for f in problem.findings() if f.number == number] or [None]
            cells.append("" if finding is None else _verdict(store, finding, name, seeds))
        lines.append(row([f"{number}. {statement}", *cells]))
    return lines


def _details(store: Store, problems: Problems, seeds: Sequence[int], number: int) -> list[str]:
    """A table with a row for every contrast that a finding has on any problem."""
    contrasts: dict[str, dict[str, Contrast]] = {}
    for name, problem in problems.items():
        for finding in problem.findings():
            if finding.number == number:
                for contrast in finding.contrasts:
                    contrasts.setdefault(contrast.name, {})[name] = contrast
    lines = head([f"Finding {number}", "paper", *(_NAMES[name] for name in problems)])
    for label, by_problem in contrasts.items():
        published = next(iter(by_problem.values())).published
        cells = [
            _text(_measure(store, by_problem[name], name, seeds)) if name in by_problem else ""
            for name in problems
        ]
        lines.append(row([label, "" if published is None else f"{published:+.2f}", *cells]))
    return lines


def _choices(store: Store, choices: Sequence[Choice], name: str, seeds: Sequence[int]) -> list[str]:
    """A table of each alternative's difference from the default; positive means worse than the default."""
    rows = []
    for choice in choices:
        found = [measured(choice, store, name, steps, seeds) for steps in STUDENT_STEPS]
        values = [one for one in found if one is not None]
        if len(values) < len(found):
            continue
        rows.append(row([choice.name, *(f"{m.mean:+.4g} ± {m.standard_error:.2g}" for m in values)]))
    if not rows:
        return []
    title = (
        f"Open choices (for CD unless stated), {_NAMES[name]}: distance minus the default's (positive: the "
        "default is better)"
    )
    return ["", *head([title, *(count(steps) for steps in STUDENT_STEPS)]), *rows]


def _measure(store: Store, contrast: Contrast, problem: str, seeds: Sequence[int]) -> Measured | None:
    if any(term.cell(problem, seed) not in store for term in contrast.terms for seed in seeds):
        return None
    return measure(contrast.values(store, problem, seeds))


def _verdict(store: Store, finding: Finding, problem: str, seeds: Sequence[int]) -> str:
    found = [_measure(store, contrast, problem, seeds) for contrast in finding.contrasts]
    measured = [one for one in found if one is not None]
    if len(measured) < len(found):
        return "not measured"
    held = sum(m.verdict == "holds" for m in measured)
    return f"{verdict([m.verdict for m in measured])} ({held} of {len(measured)})"


def _text(measured: Measured | None) -> str:
    if measured is None:
        return "not measured"
    text = f"{measured.mean:+.3g} ± {measured.standard_error:.2g}, {measured.verdict}"
    if measured.verdict == "undecided":
        text += f" (needs {measured.detectable:.2g})"
    return text


def quick_note(quick: bool) -> list[str]:
    """Lines that say so if the results are from trainings of seconds."""
    if not quick:
        return []
    return ["**Quick: each training takes seconds. These numbers only show that everything runs.**", ""]


def count(steps: int) -> str:
    """'1 step', '2 steps', and so on."""
    return f"{steps} steps" if steps > 1 else "1 step"


def paired(
    store: Store, first: Sequence[Cell], second: Sequence[Cell] = (), *, quantity: str = "distance"
) -> Measured:
    """The values of the first cells, or their differences from the second ones, one per seed."""
    values = [store[cell][quantity] for cell in first]
    if second:
        values = [a - store[cell][quantity] for a, cell in zip(values, second, strict=True)]
    return measure(values)


def mean(measured: Measured, *, digits: int = 3) -> str:
    """The mean, with this number of decimals, ± one standard error."""
    return f"{measured.mean:.{digits}f} ± {measured.standard_error:.2g}"


def difference(measured: Measured, *, digits: int = 3) -> str:
    """A mean difference ± one standard error, and how many standard errors it is."""
    text = f"{measured.mean:+.{digits}f} ± {measured.standard_error:.2g}"
    if measured.standard_error == 0:
        return text
    return f"{text} ({measured.mean / measured.standard_error:+.1f} standard errors)"


def head(cells: Sequence[str]) -> list[str]:
    """The first two lines of a Markdown table."""
    return [row(cells), row(["---"] * len(cells))]


def row(cells: Sequence[str]) -> str:
    """A line of a Markdown table."""
    return f"| {' | '.join(cells)} |"


@matplotlib.rc_context({"svg.fonttype": "path", "font.size": 9})
def plot(store: Store, problems: Problems, seeds: Sequence[int]) -> bytes:
    """A PNG of each problem's distance against student steps and against the teacher's sampling steps."""
    figure = Figure(figsize=(4.2 * len(problems), 6.4), layout="constrained", dpi=110)
    grid = figure.subplots(2, len(problems), squeeze=False)
    for column, name in enumerate(problems):
        top, bottom = grid[0][column], grid[1][column]
        for label, term, colour, marker in _SYSTEMS:
            _curve(top, store, name, seeds, term, label, colour, marker)
        for label, term, colour, marker in _SAMPLERS:
            _curve(bottom, store, name, seeds, term, label, colour, marker)
        top.set_title(_NAMES[name])
        for axes, label in ((top, "student steps"), (bottom, "steps of the teacher's sampler")):
            axes.set_xlabel(label)
            axes.set_ylabel(_DISTANCES[name])
            axes.grid(alpha=0.25)
            if axes.has_data():
                axes.legend(frameon=False)
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()


def _curve(
    axes: Axes,
    store: Store,
    problem: str,
    seeds: Sequence[int],
    term: Term,
    label: str,
    colour: str,
    marker: str,
) -> None:
    """Plots mean and standard error at every number of steps that was measured with all seeds."""
    points = []
    for steps in (1, 2, 4, 8, 16, 32, 64, 128, 512):
        cells = [
            Term(1.0, term.system, steps, term.overrides, term.sampler).cell(problem, seed) for seed in seeds
        ]
        if all(cell in store for cell in cells):
            measured = measure([store[cell]["distance"] for cell in cells])
            points.append((steps, measured.mean, measured.standard_error))
    if points:
        steps, means, errors = zip(*points, strict=True)
        axes.errorbar(steps, means, errors, label=label, color=colour, marker=marker, capsize=2)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:.0f}"))
