"""Plots paths from noise to data in one dimension, with one panel per sampler (after MCM's first figure)."""

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import matplotlib
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from PIL import Image

if TYPE_CHECKING:  # Matplotlib 3.10 has no such type.
    from matplotlib.typing import RcKeyType

# Blue and vermilion from Okabe and Ito's colour-blind-safe palette.
_LEFT, _RIGHT = "#0072b2", "#d55e00"
_INK, _GREY, _FILL = "#333333", "#8c8c8c", "#c4c4c4"
_HEAT = LinearSegmentedColormap.from_list("heat", ["#ffffff", "#b4b4b4"])
_BINS = 100
_STYLE: "dict[RcKeyType, object]" = {"text.parse_math": False, "font.size": 12}


class Panel(NamedTuple):
    """The paths and samples of one sampler."""

    title: str
    subtitle: str
    t: Float[np.ndarray, " P"]
    z: Float[np.ndarray, "P N"]  # each column is a path
    boundaries: Float[np.ndarray, " C"]  # the values in t that are marked with dots
    samples: Float[np.ndarray, " M"]  # x, for the histogram


class Marginals(NamedTuple):
    """The exact densities of z_t."""

    t: Float[np.ndarray, " T"]  # uniform, descending from 1 to 0
    z: Float[np.ndarray, " Z"]  # uniform, ascending; the picture's width
    density: Float[np.ndarray, "T Z"]


@matplotlib.rc_context(_STYLE)
def trajectories_plot(panels: Sequence[Panel], marginals: Marginals, *, caption: str) -> Figure:
    """Plots panels in a row, with data at the top (t = 0), noise at the bottom (t = 1) and paths in between.

    A path is coloured by the sign of its noise.
    """
    figure = Figure(figsize=(2.75 * len(panels), 6.2), dpi=130)
    rows = figure.subplots(
        3,
        len(panels),
        sharex=True,
        sharey="row",
        squeeze=False,
        height_ratios=(1.35, 5, 0.8),
        gridspec_kw={"left": 0.06, "right": 0.99, "top": 0.9, "bottom": 0.1, "wspace": 0.06, "hspace": 0},
    )
    edges = np.linspace(marginals.z[0], marginals.z[-1], _BINS + 1)
    histograms = [_density(panel.samples, edges) for panel in panels]
    highest = max(np.max(heights) for heights in [*histograms, marginals.density[-1]])
    for panel, heights, (above, middle, below) in zip(panels, histograms, rows.T, strict=True):
        _draw_density(above, marginals.z, marginals.density[-1])
        above.stairs(heights, edges, color=_INK, linewidth=1.1)
        above.set_ylim(0, 1.05 * highest)
        _draw_paths(middle, panel, marginals)
        # Draw this axes above its neighbours, which would otherwise hide the dots at t = 0 and t = 1.
        middle.set_zorder(1)
        _draw_density(below, marginals.z, marginals.density[0])
        below.set_ylim(1.05 * np.max(marginals.density[0]), 0)
        above.set_title(panel.title, fontsize=15, fontweight="bold", color=_INK, pad=24)
        above.text(
            0.5,
            1.06,
            panel.subtitle,
            transform=above.transAxes,
            ha="center",
            va="bottom",
            fontsize=11.5,
            color=_INK,
        )
    rows[0, 0].set_ylabel("data")
    rows[1, 0].set_ylabel("time t")
    rows[1, 0].set_yticks([0, 0.25, 0.5, 0.75, 1], labels=["0", "¼", "½", "¾", "1"])
    rows[2, 0].set_ylabel("noise")
    figure.align_ylabels(rows[:, 0])
    figure.text(0.525, 0.015, caption, ha="center", va="bottom", fontsize=11, color=_INK)
    return figure


@matplotlib.rc_context(_STYLE)
def png(figure: Figure) -> bytes:
    """The figure as a PNG of at most 256 colours, a third of the usual size."""
    content, small = io.BytesIO(), io.BytesIO()
    figure.savefig(content, format="png")
    Image.open(content).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(
        small, "PNG", optimize=True
    )
    return small.getvalue()


def _draw_paths(axes: Axes, panel: Panel, marginals: Marginals) -> None:
    extent = (marginals.z[0], marginals.z[-1], marginals.t[0], marginals.t[-1])
    # The square root makes wide densities visible beside narrow ones.
    axes.imshow(
        np.sqrt(marginals.density), extent=extent, cmap=_HEAT, aspect="auto", origin="lower", zorder=0
    )
    for path in panel.z.T:
        colour = _LEFT if path[0] < 0 else _RIGHT
        axes.plot(path, panel.t, color=colour, linewidth=1.0, alpha=0.85, zorder=2)
        dots = np.isin(panel.t, panel.boundaries)
        axes.plot(
            path[dots],
            panel.t[dots],
            "o",
            color=colour,
            markersize=3.6,
            markeredgewidth=0,
            clip_on=False,
            zorder=3,
        )
    for t in panel.boundaries:
        if 0 < t < 1:
            axes.axhline(t, color=_GREY, linewidth=0.8, linestyle=(0, (2, 3)), zorder=1)
    axes.set_xlim(extent[:2])
    axes.set_ylim(1, 0)
    for side in axes.spines.values():
        side.set_color(_GREY)
    axes.tick_params(length=0, labelbottom=False)


def _draw_density(axes: Axes, z: np.ndarray, density: np.ndarray) -> None:
    axes.fill_between(z, density, color=_FILL, linewidth=0)
    axes.set_yticks([])
    axes.tick_params(length=0, labelbottom=False)
    for side in axes.spines.values():
        side.set_visible(False)


def _density(samples: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """A histogram normalised by the number of all samples, including those outside the edges."""
    heights, _ = np.histogram(samples, edges)
    return heights / (len(samples) * np.diff(edges))
