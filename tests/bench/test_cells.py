"""Results are stored as they end, and what is stored is not measured again."""

import dataclasses
import json

import pytest

from mcm_jax.bench import cells
from mcm_jax.bench.cells import Cell, Store
from mcm_jax.system.errors import InputError

A = Cell("mixture", "cd", 4, 0)
B = Cell("mixture", "cd", 4, 1, (("consistency.xvar_frac", 0.0), ("model.dropouts", (0.1, 0.1))), "addim")


@dataclasses.dataclass(frozen=True)
class Problem:
    updates: tuple[int, ...] = (10,)


PROBLEMS = {"mixture": Problem()}


def test_a_bench_goes_on_where_it_stopped(tmp_path, capsys):
    measured = []

    def measure(cell):
        if cell == B and len(measured) == 1:
            measured.append("died")
            raise KeyboardInterrupt
        measured.append(cell)
        return {"distance": cell.seed + 0.1}

    path = tmp_path / "new" / "results.jsonl"
    with pytest.raises(KeyboardInterrupt):
        cells.run([A, B, A], Store(path, PROBLEMS), measure)
    cells.run([A, B], Store(path, PROBLEMS), measure)
    assert measured == [A, "died", B]
    store = Store(path, PROBLEMS)
    assert store[A] == {"distance": 0.1} and store[B] == {"distance": 1.1}
    assert store.seconds[B] >= 0
    assert "1 of 2 cells are already done" in capsys.readouterr().out


def test_a_line_that_was_cut_off_is_measured_again(tmp_path):
    path = tmp_path / "results.jsonl"
    store = Store(path, PROBLEMS)
    store.add(A, {"distance": 1.0}, seconds=1.0)
    store.add(B, {"distance": 2.0}, seconds=1.0)
    path.write_text(path.read_text()[:-30])
    assert A in Store(path, PROBLEMS) and B not in Store(path, PROBLEMS)


def test_a_file_of_something_else(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text(json.dumps({"metrics": 1}) + "\n")
    with pytest.raises(InputError, match=r"results.jsonl:1 is not a result of the bench .* remove it"):
        Store(path, PROBLEMS)
    (tmp_path / "directory" / "directory").mkdir(parents=True)
    with pytest.raises(InputError, match="can't be read"):
        Store(tmp_path / "directory", PROBLEMS)


def test_labels_tell_cells_apart():
    assert A.label == "mixture cd 4 seed 0"
    assert B.label == "mixture cd 4 addim xvar_frac=0.0 dropouts=(0.1, 0.1) seed 1"


def test_results_of_another_setting_are_not_mixed_in(tmp_path):
    path = tmp_path / "results.jsonl"
    Store(path, PROBLEMS).add(A, {"distance": 1.0}, seconds=1.0)
    with pytest.raises(
        InputError, match=r"measured with .*\[10\].* the problem is now .*\[20\].* another --out"
    ):
        Store(path, {"mixture": Problem((20,))})
    assert A in Store(path, {"openmoji": Problem((20,))})
