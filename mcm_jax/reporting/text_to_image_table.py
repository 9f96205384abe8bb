"""The paper's table 6, text to image, beside our measurements; cells that were not run stay empty."""

import dataclasses
from collections.abc import Sequence
from pathlib import PurePosixPath

from mcm_jax.records import CLIP_SCORE, DISTANCES, INCEPTION, with_count
from mcm_jax.reporting import paper
from mcm_jax.reporting.results import Collection, RunDescription, RunResult

# Number of samples of each FID.
_COUNTS = {"FID-30k": 30_000, "FID-5k": 5_000}
_METRICS = (*_COUNTS, "CLIP score")
_WIDTHS = [128, 256, 1024, 2048, 4096]
_HEAD = (
    *("method", "calls of the network"),
    *(f"{who} {name}" for name in _METRICS for who in ("paper's", "our")),
    "reference of ours",
)


@dataclasses.dataclass(frozen=True)
class Cell:
    """A method of the table's lower half; `guidance` is the weight g."""

    method: str  # teacher, guidance or cd
    guidance: float
    steps: int


# Beginnings of the table's labels.
_METHODS = {"teacher": "teacher", "guidance distilled": "guidance", "multistep CD": "cd"}


def markdown(collection: Collection) -> list[str]:
    """The lines of the table, with an explanation."""
    table, ours = paper.tables()["table6"], _measured(collection)
    lines = [
        f"## Table 6: {table['what']}",
        "",
        "g is the weight of guidance. The paper's captions and reference are from MS-COCO's validation set; "
        "it does not state which of them, nor which CLIP. Ours draw captions of a test split; a CLIP score "
        "names its CLIP.",
        "",
        _line(_HEAD),
        _line(["---"] * len(_HEAD)),
    ]
    for label, calls, *published in table["rows"]:
        cell = _cell(label, calls)
        cells = [label, f"{calls}"]
        for name, value in zip(_METRICS, published, strict=True):
            cells += ["" if value is None else f"{value:g}", ours.get((cell, name), "")]
        lines.append(_line([*cells, ours.get((cell, "reference"), "")]))
    return [*lines, ""]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(label: str, calls: int) -> Cell | None:
    """The cell of one of the paper's own rows, such as 'teacher g=0.5 (ddpm)'; None for other works."""
    for start, method in _METHODS.items():
        if label.startswith(start):
            return Cell(method, float(label.partition("g=")[2].split()[0]), calls)
    return None


def _measured(collection: Collection) -> dict[tuple[Cell | None, str], str]:
    """Our newest number of each metric for each cell, and the reference of the FIDs."""
    found: dict[tuple[Cell | None, str], str] = {}
    for result in sorted(collection.results, key=lambda result: result.created):
        cell = _cell_of(result, collection)
        if cell is None:
            continue
        for name, count in _COUNTS.items():
            value = result.metrics.get(with_count(DISTANCES[INCEPTION], count))
            if value is not None and result.num_samples == count:
                found[cell, name] = f"{value:.2f}"
                found[cell, "reference"] = f"{result.reference.name} ({result.reference.sha256[:8]})"
        for metric, value in result.metrics.items():
            if metric.startswith(CLIP_SCORE):
                clip = metric.removeprefix(f"{CLIP_SCORE}_").rpartition("_")[0]
                found[cell, "CLIP score"] = f"{value:.3f} ({clip})"
    return found


def _cell_of(result: RunResult, collection: Collection) -> Cell | None:
    """The cell of one of our results; None if the paper has no such network, method or sampling."""
    run = collection.descriptions.get(result.run)
    if run is None or run.config.get("model", {}).get("widths") != _WIDTHS or result.resolution != 512:
        return None
    # Otherwise the captions or the reference are not those of a validation set.
    comparable = result.label_rule == "test_captions" and result.reference.split in ("test", None)
    if not comparable or (result.features.network, result.parameters) != (INCEPTION, "ema"):
        return None
    sampling, objective = result.sampling, result.objective
    if objective == "diffusion" and sampling.label == "ddpm":
        return Cell("teacher", sampling.guidance, sampling.steps)
    if objective == "guidance" and sampling.label == "ddim":
        weight = _weight(run)
    elif objective == "cd" and result.as_trained and not result.trained_for:
        weight = _teachers_weight(run, collection)
    else:
        return None
    return None if weight is None else Cell(objective, weight, sampling.steps)


def _weight(run: RunDescription) -> float | None:
    """The weight of guidance that a run has distilled."""
    return run.config.get("guidance", {}).get("teacher_guidance")


def _teachers_weight(run: RunDescription, collection: Collection) -> float | None:
    """The weight of the model that a student distilled, known by its directory's name if that is unique."""
    teacher = PurePosixPath(run.config.get("teacher_checkpoint") or "").name
    named = [other for name, other in collection.descriptions.items() if PurePosixPath(name).name == teacher]
    if len(named) == 1 and named[0].config.get("objective") == "guidance":
        return _weight(named[0])
    return None
