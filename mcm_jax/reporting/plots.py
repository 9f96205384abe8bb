"""Plots of distances against student steps and network calls, and pictures side by side."""

import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import matplotlib
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator
from PIL import Image

from mcm_jax.reporting.averages import Estimate
from mcm_jax.reporting.tables import Bound, plural

if TYPE_CHECKING:  # Matplotlib 3.10 has no such type.
    from matplotlib.typing import RcKeyType

_STUDENTS = {
    "cd": ("CD", "#0072b2", "o"),
    "ct": ("CT", "#d55e00", "s"),
    "scd": ("sCD", "#56b4e9", "v"),
    "sct": ("sCT", "#e69f00", "P"),
    "moments": ("MM", "#f0e442", "X"),
    "ayf": ("AYF", "#8c6d31", "<"),
    "meanflow": ("MeanFlow", "#7b4173", ">"),
    "shortcut": ("Shortcut", "#637939", "*"),
    "progressive": ("PD", "#009e73", "D"),
    "tract": ("TRACT", "#cc79a7", "^"),
}
_TEACHER, _FLOOR, _CEILING = "#333333", "#009e73", "#999999"
_DASHES = ("--", "-.", ":")
# Names are not parsed as formulas. Text drawn as outlines looks the same on every machine, and the fixed salt
# makes equal figures give equal files.
_STYLE: "dict[RcKeyType, object]" = {
    "text.parse_math": False,
    "svg.fonttype": "path",
    "svg.hashsalt": "mcm_jax",
}


@matplotlib.rc_context(_STYLE)
def samplers_plot(lines: Mapping[str, Sequence[tuple[int, float]]], *, title: str, distance: str) -> Figure:
    """Plots distance against network calls per image, with one line per sampler."""
    figure = Figure(figsize=(6.4, 4.6), layout="constrained")
    axes = figure.add_subplot()
    for label, points in lines.items():
        calls, values = zip(*sorted(points), strict=True)
        axes.plot(calls, values, marker="o", markersize=4, linewidth=1.2, label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_title(title, fontsize=11)
    axes.set_xlabel("network calls per image")
    axes.set_ylabel(f"{distance}\n(lower is better)")
    axes.grid(alpha=0.25, which="both")
    axes.legend(fontsize=8, frameon=False)
    return figure


@matplotlib.rc_context(_STYLE)
def distance_plot(
    estimates: Sequence[Estimate], bounds: Sequence[Bound], *, title: str, distance: str
) -> Figure | None:
    """Plots CD, CT, PD and TRACT with error bars of one standard error; teacher and bounds are lines.

    Only students sampled as trained (`Estimate.as_trained`) are drawn. Returns None if there are none.
    """
    students = [e for e in estimates if e.as_trained and e.objective in _STUDENTS]
    if not students:
        return None
    figure = Figure(figsize=(6.4, 4.6), layout="constrained")
    axes = figure.add_subplot()
    handles = _draw_students(axes, students)
    for n, teacher in enumerate(e for e in estimates if e.objective == "diffusion"):
        label = f"teacher, {plural(teacher.steps, 'step')} of {teacher.sampler}"
        handles.append(_line(axes, teacher.mean, teacher.standard_error, _TEACHER, _DASHES[n % 3], label))
    for bound in bounds:
        colour = _FLOOR if bound.label.startswith("floor") else _CEILING
        style = "--" if "mean image" in bound.label else "-"
        middle, half = (bound.low + bound.high) / 2, (bound.high - bound.low) / 2
        handles.append(_line(axes, middle, half or None, colour, style, f"{bound.label}: {bound.value}"))
    values = [e.mean for e in estimates] + [bound.low for bound in bounds]
    _scale(axes, sorted({e.student_steps for e in students if e.student_steps}), min(values), max(values))
    axes.set_title(title, fontsize=11)
    axes.set_xlabel("student steps (network calls per image)")
    axes.set_ylabel(f"{distance}\n(lower is better)")
    axes.grid(alpha=0.25)
    figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    return figure


@matplotlib.rc_context(_STYLE)
def svg(figure: Figure) -> bytes:
    """The figure as an SVG file; equal figures give equal files."""
    content = io.BytesIO()
    figure.savefig(content, format="svg", metadata={"Date": None})
    return content.getvalue()


@matplotlib.rc_context(_STYLE)
def side_by_side(pictures: Sequence[tuple[str, bytes]]) -> bytes:
    """Returns one PNG with a column for each (caption, PNG), which shows the top half of that PNG."""
    images = [(caption, Image.open(io.BytesIO(png)).convert("RGB")) for caption, png in pictures]
    figure = Figure(figsize=(2.6 * len(images), 1.7), layout="constrained", dpi=130)
    for axes, (caption, image) in zip(figure.subplots(1, len(images), squeeze=False)[0], images, strict=True):
        axes.imshow(image.crop((0, 0, image.width, image.height // 2)), interpolation="nearest")
        axes.set_title(caption, fontsize=9)
        axes.set_axis_off()
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()


def _draw_students(axes: Axes, students: list[Estimate]) -> list[Artist | ErrorbarContainer]:
    handles: list[Artist | ErrorbarContainer] = []
    for objective, (label, colour, marker) in _STUDENTS.items():
        points = sorted((e for e in students if e.objective == objective), key=lambda e: e.student_steps or 0)
        if not points:
            continue
        x = [e.steps for e in points]
        # Several recipes with equal steps are drawn as points, as a line would connect unrelated trainings.
        line = "-" if len(set(x)) == len(x) else "none"
        bars = axes.errorbar(
            x,
            [e.mean for e in points],
            yerr=[math.nan if e.standard_error is None else e.standard_error for e in points],
            color=colour,
            marker=marker,
            linestyle=line,
            capsize=4,
            label=label,
            zorder=3,
        )
        handles.append(bars)
    return handles


def _line(axes: Axes, value: float, half_width: float | None, colour: str, style: str, label: str) -> Artist:
    line = axes.axhline(value, color=colour, linestyle=style, linewidth=1.2, label=label)
    if half_width is not None:
        axes.axhspan(value - half_width, value + half_width, color=colour, alpha=0.15, linewidth=0)
    return line


def _scale(axes: Axes, steps: list[int], low: float, high: float) -> None:
    """Sets logarithmic axes with plain numbers; the distance axis stays linear if a value is not positive."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(steps, labels=[str(step) for step in steps])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(steps[0] / 1.3, steps[-1] * 1.3)
    if low <= 0:
        return
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    # A narrow range may contain no power of ten, so label minor ticks too.
    minor = FuncFormatter(lambda value, _: f"{value:g}") if high < 20 * low else NullFormatter()
    axes.yaxis.set_minor_formatter(minor)
