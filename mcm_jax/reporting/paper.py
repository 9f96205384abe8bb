"""The paper's numbers, from the tables of arXiv:2403.06807v3; none of them is ours."""

import functools
import importlib.resources
import json
from typing import Any


@functools.cache
def tables() -> dict[str, Any]:
    """Everything in paper.json: what each table shows, its columns, rows, and remarks on contradictions."""
    return json.loads(importlib.resources.files(__package__).joinpath("paper.json").read_text())


def fid(table: str, column: str, steps: int) -> float:
    """The FID in tables()[table], of the named column and the row of `steps`.

    Raises:
      KeyError: there is no such row or column.
    """
    content = tables()[table]
    index = content["columns"].index(column) if column in content["columns"] else None
    for row in content["rows"]:
        if index is not None and row[0] == steps:
            return float(row[index])
    raise KeyError(f"{table} has no {column} at {steps} steps")
