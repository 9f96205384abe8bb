"""The paper's numbers, copied from the tables of arXiv:2403.06807v3; none was measured here."""

import functools
import importlib.resources
import json

from mcm_jax.records import JsonObject

# Number of parameters of configs/text_to_image.py.
_TEXT_TO_IMAGE = 4.97e9


@functools.cache
def tables() -> JsonObject:
    """The content of paper.json: each table's description, columns, rows, and remarks on contradictions."""
    return json.loads(importlib.resources.files("mcm_jax.reporting").joinpath("paper.json").read_text())


def fid(table: str, column: str, steps: int) -> float:
    """The FID in tables()[table] in the given column, in the row for `steps`.

    Raises:
      KeyError: there is no such row or column.
    """
    content = tables()[table]
    index = content["columns"].index(column) if column in content["columns"] else None
    for row in content["rows"]:
        if index is not None and row[0] == steps:
            return float(row[index])
    raise KeyError(f"{table} has no {column} at {steps} steps")


def imagenet_fids(resolution: int) -> dict[str, float]:
    """The FIDs in tables 1 to 4 by row of configs/imagenet{resolution}.py, such as "small,cd,steps=8".

    If two tables have a value, table 1 counts.

    Args:
      resolution: 64 or 128.
    """
    columns = {
        f"{size},{system}": ("table1", f"{size}/imagenet{resolution}/{system}")
        for size in ("small", "large")
        for system in ("ct", "cd")
    }
    if resolution == 64:
        columns |= {"small,pd": ("table3", "pd"), "small,cd,ddim": ("table4", "ddim")}
    else:
        columns |= {f"large,cd,teacher_steps={n}": ("table2", str(n)) for n in (128, 256, 1024)}
    fids = {
        f"{row},steps={steps}": fid(table, column, steps)
        for row, (table, column) in columns.items()
        for steps, *_ in tables()[table]["rows"]
    }
    teachers = tables()["table1"]["diffusion_addim_512"]
    return fids | {f"{size},teacher": teachers[f"{size}/imagenet{resolution}"] for size in ("small", "large")}


def steps_per_second(*, num_params: int, resolution: int, objective: str, num_chips: int) -> float | None:
    """The paper's train steps per second at batch 2048 on TPU v5e (appendix A.2); None if not stated.

    Args:
      num_params: identifies the network; may differ by 5% from the paper's rounded count, or from ours for
        text to image, whose count the paper does not state.
    """
    for row in tables()["throughput"]["rows"]:
        if row["data"] not in (f"imagenet{resolution}", f"{resolution}x{resolution}"):
            continue
        count = tables()["parameters"].get(f"{row['model']}/{row['data']}")
        published = _TEXT_TO_IMAGE
        if count is not None:
            published = float(count[:-1]) * {"M": 1e6, "B": 1e9}[count[-1]]
        if abs(num_params / published - 1) < 0.05 and row["chips"] == f"{num_chips} x TPU v5e":
            return row.get(objective)
    return None
