"""Renders the results as one self-contained HTML page, and the same tables as Markdown."""

import base64
import dataclasses
import hashlib
import html
from collections.abc import Iterable, Sequence

from mcm_jax.records import NEAREST, Origin, caption_score_of, count_of
from mcm_jax.reporting import averages, plots, results, tables
from mcm_jax.reporting.averages import Estimate, Group
from mcm_jax.reporting.results import Collection, RunResult
from mcm_jax.reporting.tables import Bound

TITLE = "Multistep consistency models: measured distances"
MEASURED_HERE = (
    "All numbers were measured on the runs listed below. None is taken from a paper, and none can be "
    "compared with a published number."
)
METRIC = (
    "The Frechet distance compares features of the samples with features of the training images, by their "
    "mean and covariance. An ImageNet classifier, named above each table, computes the features. 0 means "
    "equal mean and covariance; lower is better. The distance ranks models of one data set. Distances on "
    "other features, other images or another number of samples can't be compared: fewer samples score "
    "higher, so the number of samples is part of the name."
)
ERRORS = (
    "± is one standard error of the mean over n training seeds; a number without ± comes from a single "
    "training. Student steps are network calls per image."
)
SINGULAR = (
    "The samples or the reference have no more images than features, so their covariance is singular: "
    "compare only distances with equal counts."
)
OPENMOJI = (
    "All emojis designed by OpenMoji (openmoji.org), the open-source emoji and icon project. Licence: CC "
    "BY-SA 4.0 (creativecommons.org/licenses/by-sa/4.0). They were drawn from the colour font and reduced in "
    "size for training; the pictures here are samples of networks trained on them."
)

_STYLE = """
:root { color-scheme: light dark; --line: rgb(128 128 128 / 35%); --soft: rgb(128 128 128 / 12%); }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.6rem; line-height: 1.25; }
h2 { font-size: 1.3rem; margin-top: 2.5rem; border-top: 1px solid var(--line); padding-top: 1rem; }
h3 { font-size: 1.05rem; margin-top: 1.8rem; }
.small { font-size: .85rem; opacity: .8; overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .9rem .35rem 0; text-align: left; border-bottom: 1px solid var(--line); }
thead th { font-size: .85rem; opacity: .8; }
tbody th { font-weight: 500; }
tbody td { white-space: nowrap; }
.runs { font-size: .85rem; }
.runs td:last-child { white-space: normal; min-width: 14rem; }
@media (max-width: 40rem) { tbody td { white-space: normal; } th, td { padding-right: .6rem; } }
figure { margin: 0; }
.plot { background: #fff; border-radius: .5rem; max-width: 40rem; margin: 1rem 0; }
.plot img { display: block; width: 100%; }
.grids { display: grid; grid-template-columns: repeat(auto-fill, minmax(16rem, 1fr)); gap: 1rem; }
.grids img { display: block; width: 100%; image-rendering: pixelated; }
figcaption { font-size: .85rem; margin-bottom: .25rem; }
details { margin: 1rem 0; }
summary { cursor: pointer; }
.missing { background: var(--soft); padding: 2rem 1rem; font-size: .85rem; overflow-wrap: anywhere; }
"""


@dataclasses.dataclass(frozen=True)
class Measured:
    """One metric of a group: its estimates, and the values to compare them with."""

    metric: str
    estimates: tuple[Estimate, ...]
    bounds: tuple[Bound, ...]


@dataclasses.dataclass(frozen=True)
class Section:
    """A group: scores by captions, distances (the one over all samples first), and nearest images."""

    group: Group
    scores: tuple[Measured, ...]
    distances: tuple[Measured, ...]
    nearest: Measured | None


@dataclasses.dataclass(frozen=True)
class Content:
    """Everything that the page shows."""

    collection: Collection
    sections: tuple[Section, ...]
    notes: tuple[str, ...]


def prepare(collection: Collection) -> Content:
    """Groups and averages the results."""
    groups, notes = averages.group(collection)

    def measured(group: Group, metric: str, bounds: Sequence[Bound]) -> Measured:
        estimates, left_out = averages.estimates(group, metric, collection.descriptions)
        notes.extend(left_out)
        return Measured(metric, tuple(estimates), tuple(bounds))

    sections = []
    for group in groups:
        scores = [measured(group, name, tables.score_bounds(group, name)) for name in group.caption_scores]
        distances = [measured(group, name, tables.distance_bounds(group, name)) for name in group.distances]
        estimates, _ = averages.estimates(group, NEAREST, collection.descriptions)
        nearest = Measured(NEAREST, tuple(estimates), tuple(tables.nearest_bounds(group)))
        sections.append(Section(group, tuple(scores), tuple(distances), nearest if estimates else None))
    return Content(collection, tuple(sections), tuple(dict.fromkeys([*collection.notes, *notes])))


def markdown(content: Content) -> str:
    """Renders the tables, with the explanations that a reader needs, as Markdown."""
    lines = [f"# {TITLE}", "", MEASURED_HERE, ERRORS, ""]
    for section in content.sections:
        group = section.group
        lines += [f"## {tables.markdown_text(tables.heading(group.conditions))}", ""]
        lines += [tables.markdown_text(tables.conditions_text(group)), ""]
        for measured in _all_measured(section):
            lines += [tables.metric_text(group, measured.metric), ""]
            lines += [tables.markdown_table(tables.results_table(measured.estimates)), ""]
            lines += [f"- {bound.sentence}" for bound in measured.bounds]
            lines += [""] if measured.bounds else []
        lines += [SINGULAR, ""] if group.rank_deficient else []
    lines += [OPENMOJI, ""] if _shows_openmoji(content.collection) else []
    lines += [f"Note: {tables.markdown_text(note)}" for note in content.notes]
    return "\n".join(lines).rstrip("\n") + "\n"


def page(content: Content) -> str:
    """Renders the HTML page, which is self-contained; its content policy forbids loading anything else."""
    body = [
        f"<h1>{_text(TITLE)}</h1>",
        f"<p>{_text(MEASURED_HERE)}</p>",
        f"<p>{_text(METRIC)}</p>",
        f"<p>{_text(ERRORS)}</p>",
        *(_section(section) for section in content.sections),
        "<h2>How the runs were made</h2>",
        f'<div class="runs">{tables.html_table(tables.runs_table(content.collection))}</div>',
        *_data(content.collection),
        *_versions(content.collection),
        *_notes(content.notes),
    ]
    return document(TITLE, body)


def document(title: str, body: Sequence[str], *, style: str = "", script: str = "") -> str:
    """A self-contained HTML page, whose content policy forbids loading and running anything else."""
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    if script:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        policy += f"; script-src 'sha256-{digest}'"
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            f"<title>{_text(title)}</title>",
            f"<style>{_STYLE}{style}</style></head><body>",
            *body,
            *([f"<script>{script}</script>"] if script else []),
            "</body></html>\n",
        ]
    )


def attributions(datasets: Iterable[str], origins: Iterable[tuple[Origin | None, str]]) -> list[str]:
    """What the licences of the data sets and of published models ask to be said, as HTML.

    Args:
      origins: published files and what they were used for, such as 'Trained from'; None: no such file.
    """
    parts = []
    for origin, verb in dict.fromkeys(origins):
        if origin is not None:
            text = f"{verb} {origin.file} of {origin.source}; licence: {origin.licence}."
            parts.append(f"<p>{_text(text)}</p>")
    return parts + ([f"<p>{_text(OPENMOJI)}</p>"] if "openmoji" in datasets else [])


def _all_measured(section: Section) -> list[Measured]:
    return [*section.scores, *section.distances, *([section.nearest] if section.nearest else [])]


def _section(section: Section) -> str:
    group = section.group
    parts = [
        f"<h2>{_text(tables.heading(group.conditions))}</h2>",
        f'<p class="small">{_text(tables.conditions_text(group))}</p>',
    ]
    parts += [_measured(group, measured) for measured in section.scores]
    for measured in section.distances:
        parts += [_measured(group, measured), _plot(group, measured)]
    if group.rank_deficient:
        parts.append(f'<p class="small">{_text(SINGULAR)}</p>')
    parts.append(_all_grids(group))
    if section.nearest:
        parts += ["<h3>New images, or copies?</h3>", _measured(group, section.nearest, titled=False)]
    return "\n".join(parts)


def _measured(group: Group, measured: Measured, *, titled: bool = True) -> str:
    parts = [f"<h3>{_text(_title(group, measured.metric))}</h3>"] if titled else []
    parts += [
        f'<p class="small">{_text(tables.metric_text(group, measured.metric))}</p>',
        tables.html_table(tables.results_table(measured.estimates)),
    ]
    if measured.bounds:
        items = "".join(f"<li>{_text(bound.sentence)}</li>" for bound in measured.bounds)
        parts.append(f"<p>To compare with:</p><ul>{items}</ul>")
    return "\n".join(parts)


def _title(group: Group, metric: str) -> str:
    if caption_score_of(metric) is not None:
        return "Samples and their captions"
    count = count_of(metric)
    return "Distance of all samples" if metric == group.distance else f"Distance of the first {count} samples"


def _plot(group: Group, measured: Measured) -> str:
    figure = plots.distance_plot(
        measured.estimates,
        measured.bounds,
        title=f"{_title(group, measured.metric)}, {group.conditions.dataset}",
        distance=measured.metric,
    )
    if figure is None:
        return ""
    description = f"{measured.metric} against student steps; the numbers are in the table above"
    return f'<figure class="plot">{_image(plots.svg(figure), "svg+xml", description)}</figure>'


def _all_grids(group: Group) -> str:
    """The sample grids of the first training seed side by side; those of other seeds are collapsed."""
    by_seed = averages.grids(group)
    parts = [
        "<h3>Samples from the same noise</h3>",
        f"<p>The first samples of sampling seed {group.seeds[0]}: images at the same place have the same "
        "noise and the same class in every picture.</p>",
    ]
    for n, (seed, members) in enumerate(by_seed.items()):
        grids = f'<div class="grids">{"".join(_grid(member) for member in members)}</div>'
        if n == 0:
            parts.append(grids if len(by_seed) == 1 else f"<p>Training seed {seed}:</p>{grids}")
        else:
            parts.append(f"<details><summary>Training seed {seed}</summary>{grids}</details>")
    return "\n".join(parts)


def picture(content: Content) -> bytes | None:
    """A PNG of the first group's samples for its first training seed, side by side; None without samples."""
    members = next(iter(averages.grids(content.sections[0].group).values()), [])
    pictures = [
        (_caption(member), png) for member in members if (png := results.read_grid(member)) is not None
    ]
    return plots.side_by_side(pictures) if pictures else None


def _caption(result: RunResult) -> str:
    sampling = f"{tables.plural(result.sampling.steps, 'step')} of {result.sampling.label}"
    if result.student_steps is None:
        return f"{tables.kind(result.objective)}, {sampling}"
    caption = f"{tables.kind(result.objective)}, {tables.plural(result.student_steps or 0, 'student step')}"
    if result.trained_for:
        caption += f" (one student for {', '.join(map(str, result.trained_for))})"
    if not result.as_trained:
        caption += f", sampled with {sampling}"
    return caption


def _grid(result: RunResult) -> str:
    text = _caption(result)
    caption = f'<figcaption>{_text(text)} <span class="small">{_text(result.run)}</span></figcaption>'
    png = results.read_grid(result)
    if png is None:
        return f'<figure>{caption}<div class="missing">no picture {_text(result.grid)}</div></figure>'
    return f"<figure>{caption}{_image(png, 'png', f'samples of {text}')}</figure>"


def _data(collection: Collection) -> list[str]:
    """The section on data sets: preprocessing, number of images, and attribution."""
    parts = ["<h2>Data</h2>"]
    for dataset, resolution, preprocessing in dict.fromkeys(
        (result.dataset, result.resolution, result.data_preprocessing) for result in collection.results
    ):
        parts.append(f"<p>{_text(dataset)}, {resolution}x{resolution}: {_text(preprocessing)}.</p>")
    counts = [run.dataset.get("num_examples") for run in collection.descriptions.values()]
    for count in [c for n, c in enumerate(counts) if isinstance(c, dict) and c not in counts[:n]]:
        splits = ", ".join(f"{number} in split {split}" for split, number in count.items())
        parts.append(f"<p>Images: {_text(splits)}.</p>")
    origins = [(result.origin, "Trained from") for result in collection.results]
    origins += [(result.guide_origin, "Guided by") for result in collection.results]
    return parts + attributions({result.dataset for result in collection.results}, origins)


def _versions(collection: Collection) -> list[str]:
    versions = sorted({item for result in collection.results for item in result.versions.items()})
    dates = [result.created for result in collection.results]
    text = ", ".join(f"{name} {version}" for name, version in versions)
    return [
        "<h2>Versions</h2>",
        f"<p>{_text(text)}; evaluated from {min(dates):%Y-%m-%d %H:%M} to {max(dates):%Y-%m-%d %H:%M}.</p>",
    ]


def _notes(notes: Sequence[str]) -> list[str]:
    if not notes:
        return []
    items = "".join(f"<li>{_text(note)}</li>" for note in notes)
    return ["<h2>Notes</h2>", f'<ul class="small">{items}</ul>']


def _shows_openmoji(collection: Collection) -> bool:
    return any(result.dataset == "openmoji" for result in collection.results)


def _image(content: bytes, kind: str, description: str) -> str:
    data = base64.b64encode(content).decode()
    return f'<img alt="{_text(description)}" src="data:image/{kind};base64,{data}">'


def _text(text: str) -> str:
    return html.escape(text)
