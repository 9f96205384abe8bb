"""Many plans as one table in Markdown; estimates, models and the paper's numbers told apart."""

import itertools
from collections.abc import Sequence
from typing import Any

_GIB = 2**30
_MARK = "[?]"
_COLUMNS = (
    "plan",
    "slice",
    "estimated step, s",
    "of it kernels, modelled",
    "collectives not overlapped, modelled",
    "modelled in all",
    "estimated steps a second",
    "the paper's, measured",
    "estimate / paper's",
    "attention without kernels: estimated steps a second",
    "estimate / paper's",
    "share of peak, recomputation included",
    "GiB a chip",
)


def table(records: Sequence[dict[str, Any]]) -> str:
    """One section for every set of overrides, the configs as they are first; a row for every record.

    records: what `plan --json` writes.
    """
    ordered = sorted(records, key=lambda one: (one["overrides"], one["params"], one["config"]))
    lines = []
    for overrides, group in itertools.groupby(ordered, key=lambda one: one["overrides"]):
        lines += [f"With `{' '.join(overrides)}`" if overrides else "The configs as they are", ""]
        lines += [_line(_COLUMNS), _line("---" for _ in _COLUMNS), *(_line(_cells(one)) for one in group), ""]
    doubts = [f"{_MARK} {_name(one)}: {doubt}." for one in ordered for doubt in one.get("doubts", ())]
    return "\n".join([*lines, *doubts, *_made(records)]) + "\n"


def _cells(record: dict[str, Any]) -> list[str]:
    if not record["fits"]:
        needed = record["hbm_bytes_per_chip"]
        size = "more than there are" if needed is None else f"{needed / _GIB:.1f}"
        remedy = record["would_fit_with"]
        said = f"does not fit, would with {remedy}" if remedy else "does not fit, nor with what was tried"
        return [_name(record), record["topology"], said, *[""] * (len(_COLUMNS) - 4), size]
    seconds, published = record["estimated_step_seconds"], record["published_steps_per_second"]
    unfused = record["estimated_step_seconds_attention_unfused"]
    return [
        _name(record) + (f" {_MARK}" if record["doubts"] else ""),
        record["topology"],
        f"{seconds:.3f}",
        f"{record['seconds_modelled_kernels']:.3f}",
        f"{record['seconds_modelled_collectives_exposed']:.3f}",
        f"{100 * record['modelled_share']:.0f}%",
        f"{1 / seconds:.2f}",
        "" if published is None else f"{published}",
        _ratio(seconds, published),
        "" if unfused is None else f"{1 / unfused:.2f}",
        _ratio(unfused, published),
        f"{100 * record['estimated_mfu']:.0f}%",
        f"{record['hbm_bytes_per_chip'] / _GIB:.1f}",
    ]


def _name(record: dict[str, Any]) -> str:
    file, _, row = record["config"].rpartition("/")[2].partition(":")
    return f"{file.removesuffix('.py')} {row}".strip()


def _ratio(seconds: float | None, published: float | None) -> str:
    return "" if seconds is None or published is None else f"{1 / seconds / published:.2f}"


def _made(records: Sequence[dict[str, Any]]) -> list[str]:
    """Days and versions, every combination once."""
    made = sorted({(one["date"], *sorted(one["versions"].items())) for one in records})
    return [
        "Compiled on " + date + " with " + ", ".join(f"{name} {version}" for name, version in versions) + "."
        for date, *versions in made
    ]


def _line(cells: Any) -> str:
    return f"| {' | '.join(cells)} |"
