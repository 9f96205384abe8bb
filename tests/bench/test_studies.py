"""The studies on mixtures: their data, their cells, the rule of the annealing, and their tables."""

from pathlib import Path

import numpy as np
import pytest

from mcm_jax.bench import mixture, studies
from mcm_jax.bench.cells import Cell, Store
from mcm_jax.bench.runner import STUDIES
from mcm_jax.diffusion import mixtures
from mcm_jax.system.errors import InputError
from mcm_jax.system.paths import as_path

ROOT = Path(__file__).parents[2]
SEEDS = (0, 1, 2)
UNSQUARED = 0.3


def made_up(bench, cell):
    """Larger by 0.1 with each seed; the unsquared distance adds more with each seed."""
    if cell.system == "data":
        return {"distance": 0.5}
    changed = dict(cell.overrides)
    far = UNSQUARED * (1 + cell.seed) if cell.system == "ct" and not changed else 0.0
    far += changed.get("consistency.teacher_steps_last", 0.0) == 1024
    far += cell.system == "diffusion" and cell.sampler == "ddim"
    far -= 0.5 * ("training.num_steps" in changed) - 0.25 * (changed.get("consistency.steps_power") == 1)
    value = 1 + far + 0.1 * cell.seed
    return {"distance": value, "largest_share": value / 2}


@pytest.fixture
def measured(monkeypatch, tmp_path):
    monkeypatch.setattr(mixture.Bench, "__call__", made_up)
    text = studies.run(tmp_path, STUDIES)
    return {name: (tmp_path / f"{name}.md").read_text() for name in STUDIES}, text, tmp_path


def rows(markdown):
    """First cell -> the others, for the first row of that name."""
    lines = [line.strip("| ").split(" | ") for line in markdown.splitlines() if line.startswith("|")]
    return {line[0]: line[1:] for line in reversed(lines)}


def test_the_tables_have_means_and_paired_differences(measured):
    tables, text, _ = measured
    assert text == "\n".join(tables.values()) and "Quick" not in text
    # 0.65, 0.85, 1.05 and 0.5, 0.55, 0.6: standard deviations 0.2 and 0.05 over three seeds.
    median = rows(tables["median"])
    assert median["8-D, all undecided, unsquared"] == ["0.8500 ± 0.12"] * 4
    assert median["8-D, all undecided, squared"] == ["0.5500 ± 0.029"] * 4
    assert median["8-D, all undecided, difference"] == ["+0.3000 ± 0.087 (+3.5 standard errors)"] * 4
    assert median["128-D, 1 undecided, squared"] == ["", "", "", "0.5500 ± 0.029"]
    annealing = rows(tables["annealing"])
    assert annealing["the rule"] == ["6 → 111", "1.100 ± 0.058"]
    assert annealing["constant 1024"][:2] == ["1024", "2.100 ± 0.058"]
    assert annealing["constant 1024"][2].startswith("+1.000 ± ")
    teachers = rows(tables["teachers"])
    # 2.0, 2.1, 2.2 over 0.5.
    assert teachers["250 updates"][0] == "4.2 ± 0.12"
    assert teachers["250 updates"][1].startswith("+1.0000 ± ")
    assert teachers["exact denoiser"][0] == "2.2 ± 0.12"
    assert teachers["exact denoiser"][1].startswith("+0.0000 ± 0")


def test_one_student_is_compared_with_each_and_its_variants_with_itself(measured):
    lines = rows(measured[0]["one_student"])
    assert lines["one student, 1500 updates"] == ["1.100 ± 0.058"] * 4
    assert lines["one student, 6000 updates"] == ["0.600 ± 0.058"] * 4
    longer = lines["one student, 6000 updates - a student for each, 1500 updates"]
    assert len(longer) == 4 and longer[0].startswith("-0.500 ± ")
    variant = lines["S drawn in proportion to S - one student, 1500 updates"]
    assert len(variant) == 4 and variant[0].startswith("+0.250 ± ")


def test_one_student_is_trained_once(monkeypatch):
    problem = studies._quick()["one_student"].problems[0]
    bench, trained, original = mixture.Bench(problem), [], mixture.vectors.train

    def counted(config, *arguments, **named):
        trained.append(config.student_steps)
        return original(config, *arguments, **named)

    monkeypatch.setattr(mixture, "NUM_SAMPLES", 200)
    monkeypatch.setattr(mixture.vectors, "train", counted)
    together = (("consistency.student_steps", (1, 2)),)
    one, two = (bench(Cell(problem.name, "cd", steps, 0, together))["distance"] for steps in (1, 2))
    assert trained.count((1, 2)) == 1 and one != two


def test_finished_cells_are_not_measured_again(measured, monkeypatch):
    _, text, out = measured
    monkeypatch.setattr(mixture.Bench, "__call__", None)
    assert studies.run(out, STUDIES) == text


def test_an_unknown_study_is_refused(tmp_path):
    with pytest.raises(
        InputError, match="--studies: mean is not one of median, annealing, teachers, one_student"
    ):
        studies.run(tmp_path, ["median", "mean"])


@pytest.mark.parametrize("undecided", [None, 1])
def test_the_mixture_of_the_median(undecided):
    problem = studies.Modes("modes", dimension=4, undecided=undecided)
    exact = problem.mixture()
    mean, covariance = mixtures.mean_and_covariance(exact)
    np.testing.assert_allclose(mean, 0, atol=1e-15)
    assert np.trace(covariance) / 4 == pytest.approx(0.1)
    # One coordinate at each of the modes, at most half the distance between neighbours away from it.
    modes = exact.means[0]
    u = np.zeros((4, 4))
    u[:, 0] = np.array([modes[0] - 1, modes[0] + 0.45 * (modes[1] - modes[0]), modes[1], modes[2]])
    share = problem.largest_share(exact, u @ exact.basis.T)
    # Where all coordinates have modes, the other twelve are at 0, nearest to the largest mode.
    assert share == (0.5 if undecided else 14 / 16)


def test_the_rule_of_the_annealing():
    """The paper's range for its own updates, half of it for a quarter of them."""
    assert studies.fitted_range(200_000, power=0.5) == (64, 1280)
    assert studies.fitted_range(50_000, power=0.5) == (32, 640)
    assert studies.fitted_range(50_000, power=1.0) == (16, 320)
    assert studies.fitted_range(1, power=1.0) == (1, 1)


@pytest.mark.parametrize("system", ["data", "ct"])
def test_a_bench_measures_other_quantities_of_another_mixture(system, monkeypatch):
    monkeypatch.setattr(mixture, "NUM_SAMPLES", 200)
    problem = studies._quick()["median"].problems[0]
    ((bench, _),) = studies.Median((problem,)).plan([0])
    values = bench(Cell(problem.name, system, 1, 0))
    assert 0 <= values["largest_share"] <= 1
    if system == "data":
        # Of 400 coordinates 70%: five standard deviations.
        assert values["largest_share"] == pytest.approx(0.7, abs=5 * np.sqrt(0.21 / 400))
        assert values["distance"] < 0.05


@pytest.mark.parametrize("name", STUDIES)
def test_the_recorded_table_is_made_from_the_results(name):
    study = studies._full()[name]
    recorded = ROOT / "results" / "studies"
    store = Store(as_path(recorded) / "results.jsonl", {p.name: p for p in study.problems})
    made = "\n".join(study.table(store, SEEDS)) + "\n"
    assert made == (recorded / f"{name}.md").read_text()
    assert made in (ROOT / "docs" / "findings.md").read_text()
