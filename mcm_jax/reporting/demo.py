"""The page of the program `report --demo`: pictures of several runs from the same noise, step by step."""

import base64
import dataclasses
import html
import importlib.resources
import json
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import UInt8

from mcm_jax.records import EXPORTED_FILE, RUN_FILE, JsonObject
from mcm_jax.reporting import page, tables
from mcm_jax.system import files
from mcm_jax.system.errors import InputError
from mcm_jax.system.paths import Path, resolved
from mcm_jax.system.pictures import image_grid, png_bytes

if TYPE_CHECKING:
    from mcm_jax.data.layout import DatasetInfo
    from mcm_jax.runs.run import Run  # Slow to import.
    from mcm_jax.runs.workdirs import RunRecord

_TITLE = "From noise to pictures, step by step"
# For a model that supports any number of steps; the last is the most that the page shows of any model.
_STEPS = (1, 2, 4, 8, 16)
_CLASSES = _NOISES = 4  # At most so many classes, each from so many noises.

_STYLE = """
.controls { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: .5rem 1rem; }
.controls { align-items: center; max-width: 36rem; margin: 1.5rem 0; }
.frame { display: block; position: relative; overflow: hidden; width: 100%; aspect-ratio: 1; }
.frame img { position: absolute; max-width: none; image-rendering: pixelated; }
#picture { width: 16rem; max-width: 100%; }
#trajectory { display: flex; flex-wrap: wrap; gap: .5rem; padding: 0; list-style: none; }
#trajectory li { width: 5rem; text-align: center; font-size: .85rem; }
"""


@dataclasses.dataclass(frozen=True)
class _Found:
    """A run that the page shows: its name, directory and record, and its numbers of steps."""

    name: str
    workdir: Path
    record: "RunRecord"

    @property
    def steps(self) -> tuple[int, ...]:
        return tuple(n for n in sorted(self.record.config.student_steps or _STEPS) if n <= _STEPS[-1])

    @property
    def text(self) -> str:
        return f"{self.name}: {tables.kind(self.record.config.objective)}"


def write_demo(runs: Path, out: Path, *, seed: int = 0) -> str:
    """Samples every run below `runs` and writes the page; returns a line with the seconds for each run.

    A student is sampled with its own numbers of steps up to 16, any other model with 1, 2, 4, 8 and 16. The
    page has up to four classes and four noises. Pictures at the same noise have the same z_1, whatever the
    run, the steps and the class.

    Raises:
      InputError: the page can't be written, or there are no runs, or they are conditioned on captions, or
        their data sets differ, or one has no checkpoint; all but the last before anything is sampled.
    """
    if out.suffix != ".html":
        raise InputError(f"--demo={out} must end in .html")
    found = _find(runs)
    files.require_output(out, "--demo")
    from mcm_jax.runs.run import load_run

    dataset = found[0].record.dataset
    labels = _labels(dataset)
    shown, lines, origins = [], [], []
    for one in found:
        began = time.monotonic()
        run = load_run(one.workdir)
        sheets = [_sheet(run, steps, labels, seed) for steps in one.steps]
        shown.append({"name": one.name, "text": one.text, "sheets": sheets})
        origins += [(run.origin, "Trained from"), (run.guide_origin(run.sampling()), "Guided by")]
        listed = ", ".join([*map(str, one.steps[:-1]), tables.plural(one.steps[-1], "step")])
        lines.append(f"{one.text}, {listed}: {time.monotonic() - began:.0f} s")
    content = {"classes": len(labels), "noises": _NOISES, "runs": shown}
    body = [*_body(content, dataset, labels, seed), *page.attributions([dataset.dataset], origins)]
    script = importlib.resources.files("mcm_jax.reporting").joinpath("demo.js").read_text()
    files.write_output(out, page.document(_TITLE, body, style=_STYLE, script=script))
    return "\n".join(lines)


def _find(runs: Path) -> list[_Found]:
    """The runs below a directory that one page can show; see `write_demo`."""
    from mcm_jax.runs import exported, workdirs

    if not runs.is_dir():
        raise InputError(f"--runs={runs}: there is no such directory; give the one that holds your runs")
    workdirs_below = {path.parent for path in files.find(runs, RUN_FILE)}
    # Other programs also name their files so.
    others = {path.parent for path in files.find(runs, EXPORTED_FILE)} - workdirs_below
    workdirs_below |= {other for other in others if exported.find(other) is not None}
    found = []
    for workdir in sorted(workdirs_below):
        name = resolved(runs).name if workdir == runs else str(workdir.relative_to(runs))
        found.append(_Found(name, workdir, workdirs.read(workdir)))
    found = [one for one in found if one.steps]
    if not found:
        raise InputError(f"--runs={runs}: there are no runs of at most {_STEPS[-1]} steps; train one first")
    for one in found:
        _require_same_data(one, found[0])
    return found


def _require_same_data(one: _Found, first: _Found) -> None:
    ours, its = one.record.dataset, first.record.dataset
    if ours.encoding is not None:
        raise InputError(
            f"{one.workdir} is conditioned on captions; --demo shows classes, use --prompts for captions"
        )
    if (ours.dataset, ours.resolution, ours.class_names) != (its.dataset, its.resolution, its.class_names):
        raise InputError(
            f"{one.workdir} was trained on {ours.dataset} at {ours.resolution}x{ours.resolution}, but "
            f"{first.workdir} on {its.dataset} at {its.resolution}x{its.resolution}, or with other classes; "
            "give a directory of runs on the same data"
        )


def _labels(dataset: "DatasetInfo") -> list[int]:
    """Classes spread evenly over those with training images."""
    trained = np.flatnonzero(dataset.class_counts["train"])
    places = np.linspace(0, len(trained) - 1, min(_CLASSES, len(trained)))
    return [int(trained[place]) for place in places.round().astype(int)]


def _sheet(run: "Run", steps: int, labels: Sequence[int], seed: int) -> JsonObject:
    """One picture of all x_hat: a row for each class and noise, a column for each step."""
    per_device = -(-_NOISES // run.mesh.size)
    rows = [
        run.trajectories(
            np.full(_NOISES, label, np.int32), seed=seed, steps=steps, batch_per_device=per_device
        )
        for label in labels
    ]
    settings = run.sampling(steps=steps)
    guidance = f", guidance {settings.guidance:g}" if settings.guidance else ""
    calls = tables.plural(settings.network_calls, "network call")
    parameters = f"{run.parameters} parameters after {tables.plural(run.checkpoint_step, 'update')}"
    return {
        "steps": steps,
        "about": f"{tables.plural(steps, 'step')} of {settings.label}, {calls}{guidance}, {parameters}",
        "png": f"data:image/png;base64,{base64.b64encode(png_bytes(_grid(rows))).decode()}",
    }


def _grid(rows: Sequence[UInt8[np.ndarray, "N steps r r 3"]]) -> UInt8[np.ndarray, "height width 3"]:
    pictures = np.concatenate(rows)
    return image_grid(pictures.reshape(-1, *pictures.shape[2:]), columns=pictures.shape[1], gap=0)


def _body(content: JsonObject, dataset: "DatasetInfo", labels: Sequence[int], seed: int) -> list[str]:
    side = dataset.resolution
    options = {
        "run": [run["text"] for run in content["runs"]],
        "class": [dataset.class_names[label] for label in labels],
        "noise": [f"noise {n}" for n in range(_NOISES)],
    }
    # A name may contain </script>.
    data = json.dumps(content).replace("<", "\\u003c")
    return [
        f"<h1>{html.escape(_TITLE)}</h1>",
        "<p>Each picture is a sample of one of the runs below, drawn before this page was written. The runs "
        f"were trained on {html.escape(dataset.dataset)} at {side}x{side}. None of the pictures comes from a "
        "paper.</p>",
        f"<p>All runs, numbers of steps and classes start from the same {_NOISES} noises (sampling seed "
        f"{seed}), so you can compare what they make of them.</p>",
        "<noscript><p>This page needs JavaScript to show the pictures.</p></noscript>",
        '<form class="controls">',
        _select("run", "Method (run)", options["run"]),
        '<label for="steps">Number of steps</label><input type="range" id="steps" min="0" max="0" step="1">',
        _select("class", "Class", options["class"]),
        _select("noise", "Noise", options["noise"]),
        "</form>",
        '<p><output id="counted" for="steps run"></output></p>',
        '<h2>The picture</h2><figure><div id="picture"></div>',
        '<figcaption id="about" aria-live="polite"></figcaption></figure>',
        "<h2>The trajectory</h2>",
        "<p>In each step, the network predicts the clean picture from a noisy one. These are its predictions "
        "from the first step to the last. The last one is the picture above.</p>",
        '<ol id="trajectory"></ol>',
        f'<script type="application/json" id="content">{data}</script>',
    ]


def _select(name: str, text: str, options: Sequence[str]) -> str:
    items = "".join(f"<option>{html.escape(option)}</option>" for option in options)
    return f'<label for="{name}">{text}</label><select id="{name}">{items}</select>'
