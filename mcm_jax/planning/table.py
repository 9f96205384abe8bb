"""Formats plans as Markdown tables, with separate estimates, models and published numbers."""

import itertools
from collections.abc import Iterable, Sequence

from mcm_jax.planning.report import FID_SAMPLES
from mcm_jax.records import JsonObject

_GIB = 2**30
_MARK = "[?]"
_COLUMNS = (
    "plan",
    "slice",
    "estimated step, s",
    "kernels (modelled), s",
    "collectives not overlapped (modelled), s",
    "modelled share",
    "estimated steps per second",
    "paper's steps per second (measured)",
    "estimate / paper",
    "without attention kernels: estimated steps per second",
    "estimate / paper",
    "share of peak (including recomputation)",
    "GiB per chip",
)


_SAMPLING_COLUMNS = (
    "plan",
    "slice",
    "program",
    "images per batch",
    "estimated, s",
    "modelled share",
    "estimated images per second",
    f"{FID_SAMPLES:,} images, s",
    "share of peak",
    "GiB per chip",
)
_SCALING_COLUMNS = (
    "slice",
    "chips",
    "images per update",
    "images per chip",
    "parts",
    "estimated step, s",
    "modelled share",
    "estimated images per second",
)


def table(records: Sequence[JsonObject]) -> str:
    """One section per set of overrides, starting with no overrides; one row per record.

    Train steps come first, then sampling and features.

    Args:
      records: records written by `plan --json`.
    """
    ordered = sorted(records, key=_order)
    lines = []
    for (others, overrides), group in itertools.groupby(ordered, key=lambda one: _order(one)[:2]):
        title = f"With `{' '.join(overrides)}`" if overrides else "Configs without overrides"
        columns, cells = _COLUMNS, _cells
        if others:
            title, columns, cells = f"Evaluation. {title}", _SAMPLING_COLUMNS, _sampling_cells
        lines += [title, "", *_rows(columns, (cells(one) for one in group))]
    return _text(lines, ordered)


def scaling(records: Sequence[JsonObject]) -> str:
    """Train steps of a config on several slices: with equal images per chip, then per update.

    Each row is compared with the smallest slice of its table.
    """
    train = sorted((one for one in records if one["program"] == "train"), key=lambda one: one["chips"])
    lines = []
    for title, size, compared in (
        ("images per chip", lambda one: one["images_per_step"] / one["chips"], _slower),
        ("images per update", lambda one: one["images_per_step"], _faster),
    ):
        groups: dict[tuple[str, str, float], list[JsonObject]] = {}
        for one in train:
            if one["fits"]:
                groups.setdefault((_config(one), _other_overrides(one), size(one)), []).append(one)
                _scaling_cells(one)  # Raises an error if it is not a record.
        for (config, others, value), ones in sorted(groups.items()):
            if len(ones) > 1:
                columns = (*_SCALING_COLUMNS, compared(ones[0], ones[0])[0])
                cells = ([*_scaling_cells(one), compared(ones[0], one)[1]] for one in ones)
                lines += [f"{config}, {value:g} {title}{others}", "", *_rows(columns, cells)]
    for one in train:
        if not one["fits"]:
            lines += [
                f"{_config(one)}, {one['images_per_step']} images on {one['topology']}: {_unfit(one)}.",
                "",
            ]
    return _text(lines, train)


def _other_overrides(record: JsonObject) -> str:
    """The overrides except those that a row shows."""
    shown = ("mesh.fsdp", "training.batch_size", "training.accumulation_steps")
    starts = tuple(f"--config.{name}=" for name in shown)
    overrides = [flag for flag in record["overrides"] if not flag.startswith(starts)]
    return f", with `{' '.join(overrides)}`" if overrides else ""


def _order(record: JsonObject) -> tuple[bool, list[str], int, str, int]:
    programs = ("train", "sample", "features")
    rank = programs.index(record["program"])
    return rank > 0, record["overrides"], record["params"] if rank == 0 else 0, record["config"], rank


def _slower(first: JsonObject, one: JsonObject) -> tuple[str, str]:
    ratio = one["estimated_step_seconds"] / first["estimated_step_seconds"]
    return "step relative to smallest slice", f"{ratio:.3f}"


def _faster(first: JsonObject, one: JsonObject) -> tuple[str, str]:
    speed = first["estimated_step_seconds"] / one["estimated_step_seconds"]
    return "speedup on N times the chips", f"{speed:.2f} on {one['chips'] / first['chips']:g}"


def _scaling_cells(record: JsonObject) -> list[str]:
    seconds, images = record["estimated_step_seconds"], record["images_per_step"]
    return [
        record["topology"],
        f"{record['chips']}",
        f"{images}",
        f"{images / record['chips']:g}",
        f"{record['accumulation_steps']}",
        f"{seconds:.4f}",
        f"{100 * record['modelled_share']:.0f}%",
        f"{images / seconds:.0f}",
    ]


def _sampling_cells(record: JsonObject) -> list[str]:
    name = [_name(record), record["topology"], record["program"], f"{record['images_per_step']}"]
    if not record["fits"]:
        return [*name, _unfit(record), *[""] * (len(_SAMPLING_COLUMNS) - 6), _size(record)]
    rate = record["estimated_images_per_second"]
    return [
        *name,
        f"{record['estimated_step_seconds']:.3f}",
        f"{100 * record['modelled_share']:.0f}%",
        f"{rate:.0f}",
        f"{FID_SAMPLES / rate:.1f}",
        f"{100 * record['estimated_mfu']:.0f}%",
        _size(record),
    ]


def _text(lines: list[str], records: Sequence[JsonObject]) -> str:
    """The tables, then what is unknown about their rows, then the dates and versions of the plans."""
    doubts = [f"{_MARK} {_config(one)}: {doubt}." for one in records for doubt in one.get("doubts", ())]
    return "\n".join([*lines, *doubts, *_provenance(records)]) + "\n"


def _cells(record: JsonObject) -> list[str]:
    if not record["fits"]:
        return [_name(record), record["topology"], _unfit(record), *[""] * (len(_COLUMNS) - 4), _size(record)]
    seconds, published = record["estimated_step_seconds"], record["published_steps_per_second"]
    unfused = record["estimated_step_seconds_attention_unfused"]
    return [
        _name(record),
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
        _size(record),
    ]


def _unfit(record: JsonObject) -> str:
    remedy = record["would_fit_with"]
    return f"does not fit; fits with {remedy}" if remedy else "does not fit with any change tried"


def _size(record: JsonObject) -> str:
    needed = record["hbm_bytes_per_chip"]
    return "more than available" if needed is None else f"{needed / _GIB:.1f}"


def _name(record: JsonObject) -> str:
    return f"{_config(record)} {_MARK}" if record.get("doubts") else _config(record)


def _config(record: JsonObject) -> str:
    file, _, row = record["config"].rpartition("/")[2].partition(":")
    return f"{file.removesuffix('.py')} {row}".strip()


def _ratio(seconds: float | None, published: float | None) -> str:
    return "" if seconds is None or published is None else f"{1 / seconds / published:.2f}"


def _provenance(records: Sequence[JsonObject]) -> list[str]:
    """Dates and versions, each combination once."""
    made = sorted({(one["date"], *sorted(one["versions"].items())) for one in records})
    return [
        "Compiled on " + date + " with " + ", ".join(f"{name} {version}" for name, version in versions) + "."
        for date, *versions in made
    ]


def _rows(columns: Sequence[str], cells: Iterable[Sequence[str]]) -> list[str]:
    return [_line(columns), _line("---" for _ in columns), *(_line(one) for one in cells), ""]


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
