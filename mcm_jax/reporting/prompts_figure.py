"""The figure of the program `report --prompts`: the same prompts and noise through several runs."""

import sys
import textwrap
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure

from mcm_jax.records import OBJECTIVES
from mcm_jax.reporting.tables import plural
from mcm_jax.reporting.trajectories import png
from mcm_jax.system.errors import InputError
from mcm_jax.system.files import require_output, write_output
from mcm_jax.system.paths import Path
from mcm_jax.text import prompts as texts
from mcm_jax.text.encoders import Encoder

if TYPE_CHECKING:
    from mcm_jax.runs.run import Run  # Slow to import.

_MOST_PROMPTS = 16  # More would be too small to see.
_NAMES = dict.fromkeys(OBJECTIVES, "student") | {"diffusion": "teacher", "guidance": "guidance distilled"}
_TITLE_WIDTH = 20  # characters


def prompts_figure(
    workdirs: Sequence[Path], prompts: Path, out: Path, *, seed: int = 0, text_encoder: Path | None = None
) -> str:
    """Draws a row of images for each run and writes the figure; returns the seconds per image of each run.

    Image n of every run has the same prompt and the same noise. The time does not include compiling and
    embedding the prompts.

    Raises:
      InputError: a file can't be read or written, a run is not conditioned on captions, or there are too many
        prompts; raised before anything is sampled.
    """
    if out.suffix != ".png":
        raise InputError(f"--out={out} must end in .png")
    require_output(out, "--out")
    captions = texts.read(prompts)
    if len(captions) > _MOST_PROMPTS:
        raise InputError(
            f"--prompts={prompts} has {len(captions)} lines, and the figure has room for {_MOST_PROMPTS}"
        )
    from mcm_jax.runs.run import load_run

    encoder, rows, lines = text_encoder, [], []
    for workdir in workdirs:
        # Finds errors early, and loads the encoder once; only one run is in memory at a time.
        encoder = load_run(workdir).text_encoder(encoder)
    if isinstance(encoder, Encoder):
        for note in texts.notes(encoder, captions):
            print(note, file=sys.stderr)
    for workdir in workdirs:
        run = load_run(workdir)
        run.text_encoder(encoder)
        images, seconds = _timed(run, captions, seed)
        label, time_of_one = _label(run), f"{seconds / len(captions):.3g} s an image"
        rows.append((f"{label}\n{time_of_one}", images))
        lines.append(f"{workdir.name}: {label.replace(chr(10), ', ')}, {time_of_one}")
    write_output(out, png(_figure(rows, captions)))
    return "\n".join(lines)


def _timed(run: "Run", captions: Sequence[str], seed: int) -> tuple[np.ndarray, float]:
    """The images and the seconds that they take, after a call that compiles and embeds the prompts."""
    per_device = min(-(-len(captions) // run.mesh.size), run.config.sampling.batch_per_device)
    arguments = {"seed": seed, "prompts": captions, "batch_per_device": per_device}
    run.sample(len(captions), **arguments)
    began = time.monotonic()
    images, _ = run.sample(len(captions), **arguments)
    return images, time.monotonic() - began


def _label(run: "Run") -> str:
    """'teacher\\n32 steps of addim, guidance 1'."""
    sampling = run.sampling()
    guidance = f", guidance {sampling.guidance:g}" if sampling.guidance else ""
    return f"{_NAMES[run.objective]}\n{plural(sampling.steps, 'step')} of {sampling.label}{guidance}"


def _figure(rows: Sequence[tuple[str, np.ndarray]], captions: Sequence[str]) -> Figure:
    figure = Figure(
        figsize=(2.2 + 1.25 * len(captions), 1.3 + 1.25 * len(rows)), dpi=130, layout="constrained"
    )
    axes = figure.subplots(len(rows), len(captions), squeeze=False)
    for (label, images), places in zip(rows, axes, strict=True):
        for image, place in zip(images, places, strict=True):
            place.imshow(image, interpolation="nearest")
            place.set(xticks=[], yticks=[])
        places[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8)
    for caption, place in zip(captions, axes[0], strict=True):
        place.set_title("\n".join(textwrap.wrap(caption, _TITLE_WIDTH)) or "(no caption)", fontsize=7)
    return figure
