"""The comparison of methods: its cells, the choice of learning rates, and its table."""

from pathlib import Path
from typing import ClassVar

import pytest

from mcm_jax.bench import avatars, methods, mixture
from mcm_jax.bench.cells import Store
from mcm_jax.system.paths import as_path

PROBLEM = methods.comparison("mixture", as_path("out"), quick=True).problem
RATE = PROBLEM.learning_rate
# The best factor of each system at seed 0.
BEST = {
    "cd": 3.0,
    "ct": 1.0,
    "scd": 1 / 3,
    "sct": 1.0,
    "ayf": 1.0,
    "meanflow": 3.0,
    "shortcut": 1.0,
    "moments": 1 / 3,
}
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
    monkeypatch.setattr(mixture, "MIXTURE_64D", PROBLEM)
    return methods.run(tmp_path, ["mixture"], seeds=3)


def test_each_method_has_its_best_learning_rate(markdown):
    tuned = [cell for cell in Bench.measured if cell.seed == 0]
    assert len(tuned) == len(set(tuned)) == 12 * 3
    reported = [cell for cell in Bench.measured if cell.seed > 0 and cell.system != "diffusion"]
    assert len(reported) == 12 * 3 and {cell.seed for cell in reported} == {1, 2, 3}
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


def test_one_number_of_steps_chooses_for_all(monkeypatch, tmp_path):
    """On avatars: the rate that is best at tuned_steps, though the smallest one is better elsewhere."""
    problem = avatars.AVATARS

    class MadeUp:
        def __init__(self, *_, **__):
            pass

        def __call__(self, cell):
            if cell.system == "teacher":
                return {"distance": 5.0}
            factor = dict(cell.overrides)["optimizer.learning_rate"] / problem.learning_rate
            return {"distance": 1 / factor if cell.steps == problem.tuned_steps else factor}

        def picture(self, rows):
            return "\n".join(f"{name} {[cell.steps for cell in row]}" for name, row in rows.items()).encode()

    monkeypatch.setattr(avatars, "Bench", MadeUp)
    markdown = methods.run(tmp_path, ["avatars"], seeds=2)
    assert (tmp_path / "avatars.md").read_text() == markdown
    assert "shortcut [1, 2, 4, 8, 16]" in (tmp_path / "avatars.png").read_text()
    rows = {line.split(" | ")[0].strip("| "): line for line in markdown.splitlines() if line.startswith("|")}
    assert rows["teacher, aDDIM"].startswith("| teacher, aDDIM | 5.000 ± 0 | 5.000 ± 0 |")
    columns = ["3.000 ± 0", "3.000 ± 0", "0.333 ± 0", "3.000 ± 0", "3.000 ± 0"]
    assert rows["CD"] == f"| CD | {' | '.join(columns)} | 5 | 0.003 |"
    assert "CD - CD" not in rows and "moment matching - CD" in rows


def test_a_quick_comparison_has_data_of_its_own(monkeypatch, tmp_path):
    """Its few drawings must not be in the place of those that a real one needs."""
    places = []
    monkeypatch.setattr(avatars, "Bench", lambda problem, runs, *, data_dir: places.append(data_dir))
    for quick in (True, False):
        methods.comparison("avatars", tmp_path, quick=quick).bench()
    assert places == [tmp_path / "avatars" / "data", as_path("data")]


def test_the_recorded_table_is_made_from_the_results():
    recorded = as_path(Path(__file__).parents[2] / "results" / "methods")
    compared = methods.comparison("mixture", recorded)
    store = Store(recorded / "results.jsonl", {"mixture": compared.problem})
    made = compared.table(store, (1, 2, 3), quick=False)
    assert made == (recorded / "mixture.md").read_text()
    root = recorded.parent.parent
    assert made in (root / "docs" / "findings.md").read_text()
    lines = made.splitlines()
    readme = (root / "README.md").read_text().partition("## Methods side by side")[2].partition("## ")[0]
    rows = [line.removesuffix(" |") for line in readme.splitlines() if line.startswith("| ") and "±" in line]
    assert len(rows) == 6 and all(any(line.startswith(row) for line in lines) for row in rows)


def test_finished_cells_are_not_measured_again(markdown, tmp_path, monkeypatch):
    assert methods.run(tmp_path, ["mixture"], seeds=3) == markdown
    assert Bench.measured == []
    assert len(Store(tmp_path / "results.jsonl", {PROBLEM.name: PROBLEM})._values) == 12 * 3 + 12 * 3 + 2 * 3
