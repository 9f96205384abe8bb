"""Many plans as one table in Markdown; estimates, models and the paper's numbers told apart."""

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


_SAMPLING_COLUMNS = (
    "plan",
    "slice",
    "program",
    "images at once",
    "estimated, s",
    "of it modelled",
    "estimated images a second",
    f"{FID_SAMPLES:,} images, s",
    "share of peak",
    "GiB a chip",
)
_SCALING_COLUMNS = (
    "slice",
    "chips",
    "images an update",
    "a chip",
    "in parts",
    "estimated step, s",
    "of it modelled",
    "estimated images a second",
)


def table(records: Sequence[JsonObject]) -> str:
    """One section for every set of overrides, the configs as they are first; a row for every record.

    records: what `plan --json` writes. Train steps come first, sampling and features after them.
    """
    ordered = sorted(records, key=_order)
    lines = []
    for (others, overrides), group in itertools.groupby(ordered, key=lambda one: _order(one)[:2]):
        title = f"With `{' '.join(overrides)}`" if overrides else "The configs as they are"
        columns, cells = _COLUMNS, _cells
        if others:
            title, columns, cells = f"Evaluation. {title}", _SAMPLING_COLUMNS, _sampling_cells
        lines += [title, "", *_rows(columns, (cells(one) for one in group))]
    return _text(lines, ordered)


def scaling(records: Sequence[JsonObject]) -> str:
    """Train steps of a config on several slices: with equal batches a chip, then with equal batches.

    Every row is compared with the smallest slice of its table.
    """
    train = sorted((one for one in records if one["program"] == "train"), key=lambda one: one["chips"])
    lines = []
    for title, size, compared in (
        ("images a chip", lambda one: one["images_per_step"] / one["chips"], _slower),
        ("images an update", lambda one: one["images_per_step"], _faster),
    ):
        groups: dict[tuple[str, str, float], list[JsonObject]] = {}
        for one in train:
            if one["fits"]:
                groups.setdefault((_config(one), _others(one), size(one)), []).append(one)
                _scaling_cells(one)  # Fails where it is no record.
        for (config, others, value), ones in sorted(groups.items()):
            if len(ones) > 1:
                columns = (*_SCALING_COLUMNS, compared(ones[0], ones[0])[0])
                cells = ([*_scaling_cells(one), compared(ones[0], one)[1]] for one in ones)
                lines += [f"{config}, {value:g} {title}{others}", "", *_rows(columns, cells)]
    for one in train:
        if not one["fits"]:
            lines += [
                f"{_config(one)}, {one['images_per_step']} images on {one['topology']}: {_said(one)}.",
                "",
            ]
    return _text(lines, train)


def _others(record: JsonObject) -> str:
    """Overrides but for those that a row tells."""
    told = ("mesh.fsdp", "training.batch_size", "training.accumulation_steps")
    starts = tuple(f"--config.{name}=" for name in told)
    overrides = [flag for flag in record["overrides"] if not flag.startswith(starts)]
    return f", with `{' '.join(overrides)}`" if overrides else ""


def _order(record: JsonObject) -> tuple[bool, list[str], int, str, int]:
    programs = ("train", "sample", "features")
    rank = programs.index(record["program"])
    return rank > 0, record["overrides"], record["params"] if rank == 0 else 0, record["config"], rank


def _slower(first: JsonObject, one: JsonObject) -> tuple[str, str]:
    ratio = one["estimated_step_seconds"] / first["estimated_step_seconds"]
    return "step / smallest slice's", f"{ratio:.3f}"


def _faster(first: JsonObject, one: JsonObject) -> tuple[str, str]:
    speed = first["estimated_step_seconds"] / one["estimated_step_seconds"]
    return "times as fast on times the chips", f"{speed:.2f} on {one['chips'] / first['chips']:g}"


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
        return [*name, _said(record), *[""] * (len(_SAMPLING_COLUMNS) - 6), _size(record)]
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
    """The tables, then what is not known of their rows, then when and with what they were made."""
    doubts = [f"{_MARK} {_config(one)}: {doubt}." for one in records for doubt in one.get("doubts", ())]
    return "\n".join([*lines, *doubts, *_made(records)]) + "\n"


def _cells(record: JsonObject) -> list[str]:
    if not record["fits"]:
        return [_name(record), record["topology"], _said(record), *[""] * (len(_COLUMNS) - 4), _size(record)]
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


def _said(record: JsonObject) -> str:
    remedy = record["would_fit_with"]
    return f"does not fit, would with {remedy}" if remedy else "does not fit, nor with what was tried"


def _size(record: JsonObject) -> str:
    needed = record["hbm_bytes_per_chip"]
    return "more than there are" if needed is None else f"{needed / _GIB:.1f}"


def _name(record: JsonObject) -> str:
    return f"{_config(record)} {_MARK}" if record.get("doubts") else _config(record)


def _config(record: JsonObject) -> str:
    file, _, row = record["config"].rpartition("/")[2].partition(":")
    return f"{file.removesuffix('.py')} {row}".strip()


def _ratio(seconds: float | None, published: float | None) -> str:
    return "" if seconds is None or published is None else f"{1 / seconds / published:.2f}"


def _made(records: Sequence[JsonObject]) -> list[str]:
    """Days and versions, every combination once."""
    made = sorted({(one["date"], *sorted(one["versions"].items())) for one in records})
    return [
        "Compiled on " + date + " with " + ", ".join(f"{name} {version}" for name, version in versions) + "."
        for date, *versions in made
    ]


def _rows(columns: Sequence[str], cells: Iterable[Sequence[str]]) -> list[str]:
    return [_line(columns), _line("---" for _ in columns), *(_line(one) for one in cells), ""]


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
