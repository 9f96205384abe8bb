"""The paper's table 6, text to image, beside our measurements; cells that were not run stay empty."""

import dataclasses
from pathlib import PurePosixPath

from mcm_jax.records import DISTANCES, INCEPTION, with_count
from mcm_jax.reporting import paper
from mcm_jax.reporting.results import Collection, RunResult

# Number of samples of each FID.
_COUNTS = {"FID-30k": 30_000, "FID-5k": 5_000}
_WIDTHS = [128, 256, 1024, 2048, 4096]
_HEAD = (
    "method",
    "calls of the network",
    *(f"{name}{of}" for name in _COUNTS for of in (" (paper)", " (ours)")),
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
        "it does not state which of them. Its CLIP scores are in configs/text_to_image.py.",
        "",
        _line(_HEAD),
        _line(["---"] * len(_HEAD)),
    ]
    for label, calls, *published in table["rows"]:
        cells = [label, f"{calls}"]
        for value, count in zip(published, _COUNTS.values(), strict=False):
            result = ours.get((_cell(label, calls), count))
            cells += ["" if value is None else f"{value:g}", "" if result is None else f"{result:.2f}"]
        lines.append(_line(cells))
    return [*lines, ""]


def _line(cells: tuple[str, ...] | list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(label: str, calls: int) -> Cell | None:
    """The cell of one of the paper's own rows, such as 'teacher g=0.5 (ddpm)'; None for other works."""
    for start, method in _METHODS.items():
        if label.startswith(start):
            return Cell(method, float(label.partition("g=")[2].split()[0]), calls)
    return None


def _measured(collection: Collection) -> dict[tuple[Cell | None, int], float]:
    """Our newest FID for each cell and number of samples."""
    found: dict[tuple[Cell | None, int], float] = {}
    for result in sorted(collection.results, key=lambda result: result.created):
        cell, count = _cell_of(result, collection), result.num_samples
        value = result.metrics.get(with_count(DISTANCES[INCEPTION], count))
        if cell is not None and value is not None:
            found[cell, count] = value
    return found


def _cell_of(result: RunResult, collection: Collection) -> Cell | None:
    """The cell of one of our results; None if the paper has no such network, method or sampling."""
    run = collection.descriptions.get(result.run)
    if run is None or run.config.get("model", {}).get("widths") != _WIDTHS or result.resolution != 512:
        return None
    if (result.features.network, result.parameters) != (INCEPTION, "ema"):
        return None
    sampling, objective = result.sampling, result.objective
    if objective == "diffusion" and sampling.label == "ddpm":
        return Cell("teacher", sampling.guidance, sampling.steps)
    if objective == "guidance" and sampling.label == "ddim":
        return Cell("guidance", run.config["guidance"]["teacher_guidance"], sampling.steps)
    if objective == "cd" and (sampling.label, sampling.steps) == ("ddim", result.student_steps):
        # Its weight of guidance is that of the model it distilled, which is known by its directory's name.
        teacher = PurePosixPath(run.config.get("teacher_checkpoint") or "").name
        for name, other in collection.descriptions.items():
            if PurePosixPath(name).name == teacher and other.config.get("objective") == "guidance":
                return Cell("cd", other.config["guidance"]["teacher_guidance"], sampling.steps)
    return None
