"""The paper's tables beside our measurements; cells that were not run stay empty."""

import dataclasses
from collections.abc import Iterable, Iterator

from mcm_jax.records import DISTANCES, INCEPTION, count_of, with_count
from mcm_jax.reporting import paper, text_to_image_table
from mcm_jax.reporting.results import Collection, Conditions, RunDescription, RunResult

# Resolution, widths and blocks of the paper's networks, as in configs/imagenet64.py and imagenet128.py.
_NETWORKS = {
    (64, (256, 512, 1024), (3, 3, 16)): "small",
    (64, (512, 1024, 2048), (3, 3, 16)): "large",
    (128, (128, 256, 512, 1024), (3, 3, 3, 16)): "small",
    (128, (256, 512, 1024, 2048), (3, 3, 3, 16)): "large",
}
_ANNEALED = "64->1280"
_TEACHER_STEPS = 512
_HEAD = ("steps", "paper's FID", "ours", "ours - paper's", "samples of ours", "reference of ours")


@dataclasses.dataclass(frozen=True)
class Cell:
    """The network, data, method and settings with which one number of the paper was measured."""

    size: str
    resolution: int
    system: str  # teacher, ct, cd, pd
    steps: int
    teacher_step: str = "addim"  # for cd and pd
    teacher_steps: str = _ANNEALED  # for ct and cd


@dataclasses.dataclass(frozen=True)
class Row:
    """One number of the paper; `cell` is None if none of our runs can be compared with it."""

    label: str
    steps: int
    fid: float
    cell: Cell | None


def rows() -> dict[str, list[Row]]:
    """The rows of each table, in the paper's order."""
    tables = paper.tables()
    found = {name: list(_columns(name)) for name in ("table1", "table2", "table3", "table4")}
    for name, value in tables["table1"]["diffusion_addim_512"].items():
        size, data = name.split("/")
        cell = Cell(size, int(data.removeprefix("imagenet")), "teacher", _TEACHER_STEPS)
        found["table1"].append(Row(f"{size} {data}, diffusion model, aDDIM", _TEACHER_STEPS, value, cell))
    found["table5"] = [
        Row(f"{data}: {method}", steps, value, _of_literature(data, method, steps))
        for data in ("imagenet64", "imagenet128")
        for method, steps, value, _ in tables["table5"][data]
    ]
    return found


def _columns(name: str) -> Iterator[Row]:
    table = paper.tables()[name]
    for index, column in enumerate(table["columns"][1:], start=1):
        for row in table["rows"]:
            if row[index] is not None:
                cell = _cell(name, column, row[0])
                yield Row(f"{cell.size} imagenet{cell.resolution}, {_system(cell)}", row[0], row[index], cell)


def _cell(table: str, column: str, steps: int) -> Cell:
    if table == "table1":
        size, data, system = column.split("/")
        return Cell(size, int(data.removeprefix("imagenet")), system, steps)
    if table == "table2":
        return Cell("large", 128, "cd", steps, teacher_steps=column)
    if table == "table3":
        return Cell("small", 64, column, steps)
    return Cell("small", 64, "cd", steps, teacher_step=column)


def _of_literature(data: str, method: str, steps: int) -> Cell | None:
    """The cell of an authors' row of table 5 (their large networks and the small PD network), else None."""
    systems = {"MultiStep-CT": "ct", "MultiStep-CD": "cd", "CT baseline": None}
    if systems.get(method):
        return Cell("large", int(data.removeprefix("imagenet")), systems[method], steps)
    if (data, method) == ("imagenet64", "PD (reimpl. with aDDIM)"):
        return Cell("small", 64, "pd", steps)
    return None


def _system(cell: Cell) -> str:
    words = [cell.system.upper()]
    if cell.system == "cd" and cell.teacher_step != "addim":
        words.append(f"with {cell.teacher_step} as the teacher's step")
    if cell.teacher_steps != _ANNEALED:
        words.append(f"with {cell.teacher_steps} teacher steps")
    return " ".join(words)


def cell_of(result: RunResult, run: RunDescription) -> Cell | None:
    """The cell of one of our results; None if the paper has no such network, method or sampling."""
    c, config = result.conditions, run.config
    steps, sampler = result.sampling.steps, result.sampling.label
    model, consistency = config.get("model", {}), config.get("consistency", {})
    size = _NETWORKS.get((c.resolution, _whole(model.get("widths")), _whole(model.get("blocks"))))
    if size is None or (c.features.network, c.parameters, c.dataset) != (INCEPTION, "ema", "imagenet"):
        return None
    # In the paper, the small network on ImageNet128 uses guidance with an unstated weight.
    own = config.get("sampling", {}).get("guidance", 0.0) if result.objective == "diffusion" else 0.0
    if c.guidance != own:
        return None
    if result.objective == "diffusion":
        as_in_paper = (steps, sampler) == (_TEACHER_STEPS, "addim")
        return Cell(size, c.resolution, "teacher", _TEACHER_STEPS) if as_in_paper else None
    system = {"ct": "ct", "cd": "cd", "progressive": "pd"}.get(result.objective)
    # The paper trains a student for each number of steps.
    if system is None or result.trained_for or not result.as_trained:
        return None
    if system != "pd" and consistency.get("teacher_grid", "annealed") != "annealed":
        return None
    teacher_step = "addim" if system == "ct" else consistency.get("teacher_step", "addim")
    first, last = consistency.get("teacher_steps_first", 64), consistency.get("teacher_steps_last", 1280)
    teacher_steps = f"{first:g}" if first == last else f"{first:g}->{last:g}"
    if system == "pd":
        teacher_steps = _ANNEALED  # The setting has no effect on PD.
    return Cell(size, c.resolution, system, steps, teacher_step, teacher_steps)


def _whole(values: object) -> tuple[int, ...]:
    return tuple(values) if isinstance(values, list | tuple) else ()


def measured(collection: Collection) -> dict[Cell, RunResult]:
    """Our result for each cell: the one with the most samples, and among equals the newest."""
    found: dict[Cell, RunResult] = {}
    for result in sorted(collection.results, key=lambda result: (result.num_samples, result.created)):
        run = collection.descriptions.get(result.run)
        cell = None if run is None else cell_of(result, run)
        if cell is not None and _fid(result) is not None:
            found[cell] = result
    return found


def _fid(result: RunResult) -> float | None:
    """The result's FID over all samples; None if there is none."""
    return result.metrics.get(with_count(DISTANCES[INCEPTION], result.num_samples))


def markdown(collection: Collection) -> str:
    """Renders all six tables, with an explanation of their columns, as Markdown."""
    ours = measured(collection)
    lines = [
        "# The paper's tables",
        "",
        "The paper's FIDs are from 50,000 samples (Heek, Hoogeboom, Salimans 2024, arXiv:2403.06807v3). Ours "
        "were measured with `mcm_jax.evaluate --features=inception`; empty cells were not run. An FID from "
        "fewer samples or against another reference can't be compared with the paper's.",
        "",
    ]
    for name, table in rows().items():
        lines += [f"## Table {name.removeprefix('table')}: {paper.tables()[name]['what']}", ""]
        lines += [_line(("", *_HEAD)), _line(["---"] * (1 + len(_HEAD)))]
        lines += [_line(_cells(row, ours)) for row in table]
        remark = paper.tables()[name].get("remark")
        lines += ["", *([f"The paper: {remark}.", ""] if remark else [])]
    lines += text_to_image_table.markdown(collection)
    return "\n".join(lines)


def _cells(row: Row, ours: dict[Cell, RunResult]) -> list[str]:
    result = None if row.cell is None else ours.get(row.cell)
    cells = [row.label, f"{row.steps}", f"{row.fid:g}"]
    value = None if result is None else _fid(result)
    if result is None or value is None:
        return [*cells, "", "", "", ""]
    reference = result.reference
    return [
        *cells,
        f"{value:.2f}",
        f"{value - row.fid:+.2f}",
        f"{result.num_samples}",
        f"{reference.name} ({reference.sha256[:8]})",
    ]


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


@dataclasses.dataclass(frozen=True)
class Samplers:
    """One diffusion model sampled in several ways: (network calls, distance) for each sampler."""

    run: str
    distance: str
    lines: dict[str, list[tuple[int, float]]]


def samplers(collection: Collection) -> Samplers | None:
    """The diffusion model sampled in the most ways under equal conditions; None without two such ways."""
    groups: dict[tuple[str, int, int, Conditions, str], dict[tuple[str, int], tuple[int, float]]] = {}
    for result in sorted(collection.results, key=lambda result: result.created):
        names = [name for name in result.metrics if count_of(name) == result.num_samples]
        if result.student_steps is None and names:
            key = (result.run, result.checkpoint_step, result.seed, result.conditions, names[0])
            point = (result.sampling.network_calls, result.metrics[names[0]])
            groups.setdefault(key, {})[result.sampling.label, result.sampling.steps] = point
    if not groups or max(map(len, groups.values())) < 2:
        return None
    (run, *_, distance), points = max(groups.items(), key=lambda item: len(item[1]))
    lines: dict[str, list[tuple[int, float]]] = {}
    for (sampler, _), point in sorted(points.items()):
        lines.setdefault(sampler, []).append(point)
    return Samplers(run, distance, lines)
