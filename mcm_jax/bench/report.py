"""What the bench found, as Markdown and as a picture; made from the stored results alone."""

import io
from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter

from mcm_jax.bench.cells import Store
from mcm_jax.bench.choices import STUDENT_STEPS, Choice, measured
from mcm_jax.bench.findings import DDIM_TEACHER, Contrast, Finding, Measured, Term, measure, verdict


@runtime_checkable
class Setting(Protocol):
    """What is measured on one problem."""

    def findings(self) -> Sequence[Finding]:
        """The findings that can be had there."""

    def choices(self) -> Sequence[Choice]:
        """The open choices that can be compared there."""


Settings = Mapping[str, Setting]

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
# Okabe and Ito's colours, told apart by everyone; markers say the same.
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


def markdown(store: Store, settings: Settings, seeds: Sequence[int], *, quick: bool) -> str:
    """Verdicts, then every difference with the paper's own, then the open choices where measured."""
    lines = [
        f"Seeds: {len(seeds)}. Numbers are measurements, mean ± one standard error over the seeds, of "
        "differences that are positive if the paper is right; 'paper' is the same difference of its FIDs, "
        "on a scale of its own. Rule: more than two standard errors above 0 holds, as far below 0 does not "
        "hold, else undecided.",
        "",
    ]
    if quick:
        lines += [
            "**Quick: trainings of seconds. These numbers say that everything runs and nothing else.**",
            "",
        ]
    lines += _summary(store, settings, seeds)
    for number in sorted({f.number for setting in settings.values() for f in setting.findings()}):
        lines += ["", *_details(store, settings, seeds, number)]
    for name, setting in settings.items():
        lines += _choices(store, setting.choices(), name, seeds)
    return "\n".join(lines) + "\n"


def _summary(store: Store, settings: Settings, seeds: Sequence[int]) -> list[str]:
    rows = {f.number: f.statement for setting in settings.values() for f in setting.findings()}
    lines = [_row(["Finding", *(_NAMES[name] for name in settings)]), _row(["---"] * (1 + len(settings)))]
    for number, statement in sorted(rows.items()):
        cells = []
        for name, setting in settings.items():
            (finding,) = [f for f in setting.findings() if f.number == number] or [None]
            cells.append("" if finding is None else _verdict(store, finding, name, seeds))
        lines.append(_row([f"{number}. {statement}", *cells]))
    return lines


def _details(store: Store, settings: Settings, seeds: Sequence[int], number: int) -> list[str]:
    """A row for every contrast that any setting has."""
    contrasts: dict[str, dict[str, Contrast]] = {}
    for name, setting in settings.items():
        for finding in setting.findings():
            if finding.number == number:
                for contrast in finding.contrasts:
                    contrasts.setdefault(contrast.name, {})[name] = contrast
    lines = [
        _row([f"Finding {number}", "paper", *(_NAMES[name] for name in settings)]),
        _row(["---"] * (2 + len(settings))),
    ]
    for label, by_setting in contrasts.items():
        published = next(iter(by_setting.values())).published
        cells = [
            _told(_measure(store, by_setting[name], name, seeds)) if name in by_setting else ""
            for name in settings
        ]
        lines.append(_row([label, "" if published is None else f"{published:+.2f}", *cells]))
    return lines


def _choices(store: Store, choices: Sequence[Choice], name: str, seeds: Sequence[int]) -> list[str]:
    """The alternatives' differences from the default; positive is worse than the default."""
    rows = []
    for choice in choices:
        values = [measured(choice, store, name, steps, seeds) for steps in STUDENT_STEPS]
        if None in values:
            continue
        rows.append(_row([choice.name, *(f"{m.mean:+.4g} ± {m.standard_error:.2g}" for m in values)]))
    if not rows:
        return []
    title = f"Open choices, {_NAMES[name]}: distance less the default's (positive: the default is better)"
    heads = [f"CD, {steps} steps" if steps > 1 else "CD, 1 step" for steps in STUDENT_STEPS]
    return ["", _row([title, *heads]), _row(["---"] * (1 + len(heads))), *rows]


def _measure(store: Store, contrast: Contrast, setting: str, seeds: Sequence[int]) -> Measured | None:
    if any(term.cell(setting, seed) not in store for term in contrast.terms for seed in seeds):
        return None
    return measure(contrast.values(store, setting, seeds))


def _verdict(store: Store, finding: Finding, setting: str, seeds: Sequence[int]) -> str:
    measured = [_measure(store, contrast, setting, seeds) for contrast in finding.contrasts]
    if None in measured:
        return "not measured"
    held = sum(m.verdict == "holds" for m in measured)
    return f"{verdict([m.verdict for m in measured])} ({held} of {len(measured)})"


def _told(measured: Measured | None) -> str:
    if measured is None:
        return "not measured"
    text = f"{measured.mean:+.3g} ± {measured.standard_error:.2g}, {measured.verdict}"
    if measured.verdict == "undecided":
        text += f" (needs {measured.detectable:.2g})"
    return text


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


@matplotlib.rc_context({"svg.fonttype": "path", "font.size": 9})
def plot(store: Store, settings: Settings, seeds: Sequence[int]) -> bytes:
    """PNG: for every setting the distance against student steps, and against the teacher's sampling steps."""
    figure = Figure(figsize=(4.2 * len(settings), 6.4), layout="constrained", dpi=110)
    grid = figure.subplots(2, len(settings), squeeze=False)
    for column, name in enumerate(settings):
        top, bottom = grid[0][column], grid[1][column]
        for label, term, colour, marker in _SYSTEMS:
            _curve(top, store, name, seeds, term, label, colour, marker)
        for label, term, colour, marker in _SAMPLERS:
            _curve(bottom, store, name, seeds, term, label, colour, marker)
        top.set_title(_NAMES[name])
        for axes, what in ((top, "student steps"), (bottom, "steps of the teacher's sampler")):
            axes.set_xlabel(what)
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
    setting: str,
    seeds: Sequence[int],
    term: Term,
    label: str,
    colour: str,
    marker: str,
) -> None:
    """Mean and standard error at every step count that all seeds have."""
    points = []
    for steps in (1, 2, 4, 8, 16, 32, 64, 128, 512):
        cells = [
            Term(1.0, term.system, steps, term.overrides, term.sampler).cell(setting, seed) for seed in seeds
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
