"""Tables of results as Markdown and HTML, and the sentences that explain their numbers."""

import dataclasses
import html
import re
from collections.abc import Sequence

from mcm_jax.records import (
    ATTRIBUTES,
    CLIP_SCORE,
    FLOW_MAPS,
    HELD_OUT_IMAGES,
    MEAN_IMAGE,
    NEAREST,
    NEAREST_OF_TEN,
    OTHER_CAPTIONS,
    TEST_IMAGES,
    UNTRAINED_NETWORK,
    JsonObject,
    Reference,
    caption_score_of,
    count_of,
)
from mcm_jax.reporting.averages import Estimate, Group, bounds
from mcm_jax.reporting.results import Collection, Conditions, RunDescription

_COLUMNS = {
    "diffusion": "Teacher",
    "guidance": "Guidance distilled",
    "cd": "CD",
    "ct": "CT",
    "scd": "sCD",
    "sct": "sCT",
    "moments": "MM",
    "ayf": "AYF",
    "meanflow": "MeanFlow",
    "shortcut": "Shortcut",
    "progressive": "PD",
    "tract": "TRACT",
}
_PARAMETERS = {"ema": "averaged (EMA) parameters", "raw": "parameters of the last update (raw)"}
_SCORES = {
    ATTRIBUTES: (
        "the share of the captions' attributes that a classifier finds in the samples; higher is better"
    ),
    CLIP_SCORE: "the mean cosine of CLIP's embeddings of sample and caption; higher is better",
    NEAREST_OF_TEN: (
        "the share of samples that are nearer to their caption's picture than to nine others of the same "
        "design; higher is better"
    ),
}
_LABELS = {
    "uniform": "classes drawn uniformly",
    "train_frequency": "classes drawn as often as in the training set",
    "test_captions": "captions drawn from the test split",
    "heldout_captions": "captions drawn from the held-out split, whose combinations do not occur in training",
}


@dataclasses.dataclass(frozen=True)
class Table:
    """Column headings and rows of cells; a cell is a tuple of lines, and the first cell labels the row."""

    head: tuple[str, ...]
    rows: tuple[tuple[tuple[str, ...], ...], ...]


@dataclasses.dataclass(frozen=True)
class Bound:
    """A floor, a ceiling or another value to compare samples with, and its meaning."""

    label: str
    low: float
    high: float
    meaning: str

    @property
    def value(self) -> str:
        """The value as text: '1464' or '1464 to 1470'."""
        low, high = number(self.low), number(self.high)
        return low if low == high else f"{low} to {high}"

    @property
    def sentence(self) -> str:
        """The bound as a sentence: 'Floor (test images), 386.2: ...'."""
        return f"{self.label[0].upper()}{self.label[1:]}, {self.value}: {self.meaning}"


def kind(objective: str) -> str:
    """The objective's heading in tables: 'Teacher', 'CD', 'PD'."""
    return _COLUMNS[objective]


def number(value: float) -> str:
    """Formats a value with about four significant digits: 476.4, 25.60, 3.142."""
    return f"{value:.{_decimals(value)}f}"


def estimate_text(estimate: Estimate) -> str:
    """Formats an estimate: '476.4', or '476.4 ± 3.1 (n = 3)' for several training seeds."""
    if estimate.standard_error is None:
        return number(estimate.mean)
    error = f"{estimate.standard_error:.{_decimals(estimate.mean)}f}"
    return f"{number(estimate.mean)} ± {error} (n = {estimate.count})"


def results_table(estimates: Sequence[Estimate]) -> Table:
    """A table with a row for each number of student steps or way to sample a teacher, a column per objective.

    Runs that differ in more than their seed get separate lines, with their names, in the same cell.
    """
    objectives = [name for name in _COLUMNS if any(e.objective == name for e in estimates)]
    students = [e for e in estimates if e.student_steps is not None]
    teachers = [e for e in estimates if e.student_steps is None]
    students.sort(key=lambda e: (e.student_steps, not e.as_trained, e.steps, e.sampler))
    teachers.sort(key=lambda e: (e.steps, e.sampler))
    rows = []
    for label in dict.fromkeys(row_label(e) for e in [*students, *teachers]):
        in_row = [e for e in estimates if row_label(e) == label]
        cells = [_cell([e for e in in_row if e.objective == objective]) for objective in objectives]
        rows.append(((label,), *cells))
    return Table(("Student steps", *(_COLUMNS[name] for name in objectives)), tuple(rows))


def row_label(estimate: Estimate) -> str:
    """The row's label: '4', '4, sampled with 8 steps of ddim', or 'teacher, 64 steps of addim'."""
    sampling = f"{plural(estimate.steps, 'step')} of {estimate.sampler}"
    if estimate.student_steps is None:
        return f"{'teacher' if estimate.objective == 'diffusion' else 'guidance distilled'}, {sampling}"
    student_steps = str(estimate.student_steps)
    return student_steps if estimate.as_trained else f"{student_steps}, sampled with {sampling}"


def heading(conditions: Conditions) -> str:
    """A heading with data set, number of samples and kind of parameters."""
    c = conditions
    return (
        f"{c.dataset} {c.resolution}x{c.resolution}, {plural(c.num_samples, 'sample')}, "
        f"{c.parameters} parameters"
    )


def conditions_text(group: Group) -> str:
    """States what all results of the group share; results that differ in any of it are in another table."""
    c, side = group.conditions, group.conditions.features.input_resolution
    parts = [
        f"{plural(c.num_samples, 'sample')} each, with the {_PARAMETERS.get(c.parameters, c.parameters)}",
        f"sampling {'seed' if len(group.seeds) == 1 else 'seeds'} {', '.join(map(str, group.seeds))}",
        _LABELS.get(c.label_rule, c.label_rule),
        *([f"guidance {c.guidance:g}"] if c.guidance else []),
        f"against {_reference_text(c.reference)} (reference {c.reference.sha256[:12]})",
        f"{c.features.network} features ({c.features.sha256[:12]})"
        + ("" if side is None else f" at {side}x{side} pixels"),
    ]
    return "; ".join(parts) + "."


def _reference_text(reference: Reference) -> str:
    if reference.file is not None:
        return f"the statistics in {reference.file}"
    return f"the {reference.count} images of split {reference.split}"


def distance_bounds(group: Group, metric: str) -> list[Bound]:
    """The floors and ceilings to show with a distance.

    A floor is included only if it has as many images as the distance: fewer images score higher, so a value
    from fewer images would not be a floor.
    """
    found, distance = [], group.conditions.distance
    for name, (low, high) in bounds(group).items():
        count = count_of(name)
        if name == f"{MEAN_IMAGE}_{distance}":
            label = "ceiling (mean image)"
            meaning = "the mean training image, repeated. A model must score better than this."
        elif name.startswith(f"{UNTRAINED_NETWORK}_{distance}_"):
            label = "ceiling (untrained network)"
            meaning = f"{count} samples of the same networks before their first update."
        elif name.startswith(f"{TEST_IMAGES}_{distance}_") and count == count_of(metric):
            label = "floor (test images)"
            meaning = (
                f"{count} test images instead of samples. They are real, and no network was trained on "
                f"them: about the best possible value for {count} images."
            )
        else:
            continue
        found.append(Bound(label, low, high, meaning))
    return sorted(found, key=lambda bound: bound.low)


def score_bounds(group: Group, metric: str) -> list[Bound]:
    """The scores of real images with these captions and with others, as bounds."""
    score, found = caption_score_of(metric), []
    for name, (low, high) in bounds(group).items():
        if name.startswith((f"{TEST_IMAGES}_{score}_", f"{HELD_OUT_IMAGES}_{score}_")):
            found.append(
                Bound("the captions' own images", low, high, "real images, so about the best possible score.")
            )
        elif name.startswith(f"{OTHER_CAPTIONS}_{score}_"):
            found.append(Bound("other captions", low, high, "real images of other captions, so chance."))
    return sorted(found, key=lambda bound: -bound.high)


def nearest_bounds(group: Group) -> list[Bound]:
    """The distance from test images to their nearest training image, as a bound."""
    meaning = (
        "the mean for images that no network was trained on. Samples near this value are as far from the "
        "training images as new images are; samples far below it are copies of training images."
    )
    return [
        Bound("test images", low, high, meaning)
        for name, (low, high) in bounds(group).items()
        if name == f"{TEST_IMAGES}_{NEAREST}"
    ]


def runs_table(collection: Collection) -> Table:
    """A table of how each evaluated run was trained, from its run.json, with dashes for unknown values."""
    rows = []
    for name in dict.fromkeys(result.run for result in collection.results):
        results = [result for result in collection.results if result.run == name]
        first, run = results[0], collection.descriptions.get(name, RunDescription({}, {}))
        name_of_kind = kind(first.objective)
        if first.objective in FLOW_MAPS:
            name_of_kind += ", any steps"
        elif first.trained_for:
            name_of_kind += f", {', '.join(map(str, first.trained_for))} steps"
        elif first.student_steps is not None:
            name_of_kind += f", {plural(first.student_steps, 'step')}"
        checkpoint_step = max(result.checkpoint_step for result in results)
        cells = (name, name_of_kind, str(first.training_seed), *_training(run, checkpoint_step))
        rows.append(tuple((cell,) for cell in cells))
    head = ("Run", "Kind", "Seed", "Updates", "Batch", "Learning rate", "EMA decay", "Started from", "Notes")
    return Table(head, tuple(rows))


def _training(run: RunDescription, checkpoint_step: int) -> tuple[str, ...]:
    """Updates, batch size, learning rate, EMA decay, teacher, and settings specific to the kind of run."""
    training, optimizer = _settings(run, "training"), _settings(run, "optimizer")
    rate = str(optimizer.get("learning_rate", "–"))
    if optimizer.get("warmup_steps"):
        rate += f", warm-up {optimizer['warmup_steps']}"
    if optimizer.get("decay") not in (None, "constant"):
        rate += f", {optimizer['decay']} decay"
    return (
        f"{checkpoint_step} of {training.get('num_steps', '–')}",
        str(training.get("batch_size", "–")),
        rate,
        str(optimizer.get("ema_decay", "–")),
        str(run.config.get("teacher_checkpoint") or "–"),
        _particulars(run),
    )


def _particulars(run: RunDescription) -> str:
    consistency, widths = _settings(run, "consistency"), _settings(run, "model").get("widths")
    parts = [f"widths {'-'.join(map(str, widths))}"] if isinstance(widths, list) else []
    if run.config.get("objective") in ("cd", "ct") and consistency:
        parts.append(_teacher_grid(consistency))
    continuous = _settings(run, "continuous")
    if run.config.get("objective") in ("scd", "sct") and continuous:
        parts.append(
            f"t {continuous.get('proposal')}, warm-up of {_plain(continuous.get('warmup_steps'))} updates"
        )
    flow_map = _settings(run, "flow_map")
    if run.config.get("objective") in ("ayf", "meanflow") and flow_map:
        parts.append(
            f"times {flow_map.get('proposal')}, equal in {_plain(flow_map.get('equal_share'))}; derivative "
            f"along {flow_map.get('along')}; {flow_map.get('normalised')} normalised; warm-up of "
            f"{_plain(flow_map.get('warmup_steps'))} updates"
        )
    shortcut = _settings(run, "shortcut")
    if run.config.get("objective") == "shortcut" and shortcut:
        parts.append(
            f"one in {_plain(shortcut.get('every'))} learns from two steps of an average with decay "
            f"{_plain(shortcut.get('target_decay'))}"
        )
    if consistency.get("stages"):
        parts.append(f"stages {' to '.join(map(str, consistency['stages']))} steps")
    if run.config.get("objective") in ("cd", "progressive") and "teacher_step" in consistency:
        parts.append(f"teacher's step {consistency['teacher_step']}")
    return "; ".join(parts) or "–"


def _teacher_grid(consistency: JsonObject) -> str:
    """How the teacher's steps of cd or ct become shorter; runs of older versions have only one way."""
    kind = consistency.get("teacher_grid", "annealed")
    if kind == "ect":
        return (
            f"teacher steps of ECT, q {_plain(consistency.get('ect_q'))}, "
            f"{_plain(consistency.get('ect_stages'))} stages of "
            f"{_plain(consistency.get('ect_stage_steps'))} updates, t {consistency.get('proposal')}, weight "
            f"{consistency.get('loss_weight')}"
        )
    names = ("teacher_steps_first", "teacher_steps_last", "anneal_steps")
    first, last, updates = (_plain(consistency.get(name)) for name in names)
    grown = f"teacher grid {first} to {last} steps over {updates} updates"
    return f"{grown}, doubling, weight {consistency.get('loss_weight')}" if kind == "doubling" else grown


def _settings(run: RunDescription, section: str) -> JsonObject:
    content = run.config.get(section)
    return content if isinstance(content, dict) else {}


def _plain(value: object) -> str:
    """Formats 64.0 as '64'."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def metric_text(group: Group, metric: str) -> str:
    """One sentence that explains a table's numbers."""
    if metric == NEAREST:
        return "The feature distance from each sample to its nearest training image, averaged over samples."
    if (score := caption_score_of(metric)) is not None:
        return f"The score {metric}: {_SCORES[next(name for name in _SCORES if score.startswith(name))]}."
    count = count_of(metric)
    which = (
        "all samples"
        if metric == group.distance
        else f"the first {count} samples, as many as there are test images"
    )
    return f"The Frechet distance {metric} of {which}; lower is better."


def markdown_table(table: Table) -> str:
    """Renders the table as Markdown, padded to be readable as plain text."""
    lines = [[_markdown_cell((text,)) for text in table.head]]
    lines += [[_markdown_cell(cell) for cell in row] for row in table.rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(table.head))]
    text = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
        for line in lines
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([text[0], rule, *text[1:]])


def html_table(table: Table) -> str:
    """Renders the table as HTML, in a box that scrolls on narrow screens."""
    head = "".join(f'<th scope="col">{html.escape(text)}</th>' for text in table.head)
    rows = []
    for label, *cells in table.rows:
        values = "".join(f"<td>{_html_cell(cell)}</td>" for cell in cells)
        rows.append(f'<tr><th scope="row">{_html_cell(label)}</th>{values}</tr>')
    body = "\n".join(rows)
    return (
        f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'
    )


def markdown_text(text: str) -> str:
    """Puts text on one line and escapes special characters of Markdown and HTML."""
    text = html.escape(" ".join(text.split()), quote=False)
    return re.sub(r"([\\`*|\[\]])", r"\\\1", text)


def plural(count: int, noun: str) -> str:
    """Formats a count with its noun: '1 step', '2 steps'."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _decimals(value: float) -> int:
    return 1 if abs(value) >= 100 else 2 if abs(value) >= 10 else 3


def _cell(estimates: list[Estimate]) -> tuple[str, ...]:
    if len(estimates) == 1:
        return (_estimate_cell(estimates[0]),)
    return tuple(f"{_estimate_cell(e)} [{', '.join(e.runs)}]" for e in estimates)


def _estimate_cell(estimate: Estimate) -> str:
    text, steps = estimate_text(estimate), ", ".join(map(str, estimate.trained_for))
    return f"{text} (one student for {steps})" if steps else text


def _markdown_cell(lines: tuple[str, ...]) -> str:
    return "<br>".join(markdown_text(line) for line in lines)


def _html_cell(lines: tuple[str, ...]) -> str:
    return "<br>".join(html.escape(line) for line in lines)
