"""The comparison of methods: its cells, the choice of learning rates, and its table."""

from pathlib import Path
from typing import ClassVar

import pytest

from mcm_jax.bench import methods, mixture
from mcm_jax.bench.cells import Store
from mcm_jax.system.paths import as_path

PROBLEM = methods._QUICK
RATE = PROBLEM.learning_rate
# The best factor of each system at seed 0, and what it is measured as.
BEST = {"cd": 3.0, "ct": 1.0, "scd": 1 / 3, "sct": 1.0}
SYSTEMS = list(BEST)


class Bench:
    """Distances that are lowest at the best factor, and otherwise known."""

    measured: ClassVar = []

    def __init__(self, problem):
        self.measured.clear()

    def __call__(self, cell):
        self.measured.append(cell)
        if cell.system == "diffusion":
            return {"distance": 5.0}
        rate = dict(cell.overrides)["optimizer.learning_rate"]
        far = 10.0 if rate != pytest.approx(RATE * BEST[cell.system]) else 0.0
        number = SYSTEMS.index(cell.system)
        return {"distance": far + 1 + number + 0.1 * cell.seed * (1 + number)}


@pytest.fixture
def markdown(monkeypatch, tmp_path):
    monkeypatch.setattr(mixture, "Bench", Bench)
    monkeypatch.setattr(methods.mixture, "MIXTURE_64D", PROBLEM)
    return methods.run(tmp_path, seeds=3)


def test_each_method_has_its_best_learning_rate(markdown):
    tuned = [cell for cell in Bench.measured if cell.seed == 0]
    assert len(tuned) == len(set(tuned)) == 6 * 3
    reported = [cell for cell in Bench.measured if cell.seed > 0 and cell.system != "diffusion"]
    assert len(reported) == 6 * 3 and {cell.seed for cell in reported} == {1, 2, 3}
    for cell in reported:
        rate = dict(cell.overrides)["optimizer.learning_rate"]
        assert rate == pytest.approx(RATE * BEST[cell.system])
    # Seed by seed and start by start.
    starts = [(cell.seed, cell.shared) for cell in Bench.measured if cell.seed > 0]
    assert (
        len(dict.fromkeys(starts))
        == sum(a != b for a, b in zip([None, *starts], starts, strict=False))
        == 3 * 2
    )


def test_the_table_has_means_and_paired_differences(markdown):
    rows = {line.split(" | ")[0].strip("| "): line for line in markdown.splitlines() if line.startswith("|")}
    assert rows["start, smooth"] == "| start, smooth | 5.000 ± 0 |  |  |"
    # 1.1, 1.2, 1.3: deviation 0.1 over three seeds.
    assert rows["CD"] == "| CD | 1.200 ± 0.058 | 5 | 0.0015 |"
    assert rows["sCD"] == f"| sCD | 3.600 ± 0.17 | 6 | {RATE / 3:.2g} |"
    # 2.2, 2.4, 2.6 apart.
    assert rows["sCD - CD"] == "| sCD - CD | +2.400 ± 0.12 (+20.8 standard errors) |"
    assert "Quick" not in markdown


def test_the_recorded_table_is_made_from_the_results():
    problem = mixture.MIXTURE_64D
    recorded = Path(__file__).parents[2] / "results" / "methods"
    store = Store(as_path(recorded) / "results.jsonl", {problem.name: problem})
    made = methods.table(problem, store, (1, 2, 3), quick=False)
    assert made == (recorded / "methods.md").read_text()
    assert made in (recorded.parents[1] / "docs" / "findings.md").read_text()


def test_finished_cells_are_not_measured_again(markdown, tmp_path, monkeypatch):
    assert methods.run(tmp_path, seeds=3) == markdown
    assert Bench.measured == []
    assert len(Store(tmp_path / "results.jsonl", {PROBLEM.name: PROBLEM})._values) == 6 * 3 + 6 * 3 + 2 * 3
