"""The contrasts say what the paper says, and the rule decides as it was stated."""

import numpy as np
import pytest

from mcm_jax.bench import choices, findings, mixture, openmoji, summary
from mcm_jax.bench.cells import Cell, Store
from mcm_jax.bench.findings import Term
from mcm_jax.reporting import paper

PROBLEMS = {"mixture": mixture.MIXTURE_64D, "mixture2d": mixture.MIXTURE_2D, "openmoji": openmoji.OPENMOJI}
SEEDS = range(3)


def published(cell):
    """The paper's own FID in place of a measurement."""
    steps = cell.steps
    overrides = dict(cell.overrides)
    if overrides.get("consistency.teacher_step") == "ddim":
        # Table 4's aDDIM column is table 1's CD, to more digits.
        return paper.fid("table4", "ddim", steps) - paper.fid("table4", "addim", steps) + cd(steps)
    if "consistency.teacher_steps_first" in overrides:
        column = str(int(overrides["consistency.teacher_steps_first"]))
        return paper.fid("table2", column, steps) - paper.fid("table2", "64->1280", steps) + cd(steps)
    if cell.system == "progressive":
        return paper.fid("table3", "pd", steps)
    if cell.system in ("teacher", "diffusion"):
        return 1.5 if steps == 512 else 10.0 / steps + (cell.sampler == "ddim")
    return paper.fid("table1", f"small/imagenet64/{cell.system}", steps)


def cd(steps):
    return paper.fid("table1", "small/imagenet64/cd", steps)


def filled(tmp_path, problem, *, noise=0.0, without=()):
    """A store with the paper's numbers for every cell of a problem."""
    store = Store(tmp_path / f"{problem}.jsonl", PROBLEMS)
    rng = np.random.default_rng(0)
    for cell in findings.cells_of(PROBLEMS[problem].findings(), problem, SEEDS):
        if cell in without:
            continue
        values = {"distance": published(cell) + noise * rng.normal()}
        if cell.system == "ct":
            values["from_diffusion"] = 1 / cell.steps
        store.add(cell, values, seconds=0.0)
    return store


@pytest.mark.parametrize("problem", PROBLEMS)
def test_the_papers_own_numbers_agree_with_the_paper(problem, tmp_path):
    """Each contrast of the paper's tables is its own published value, and has the sign that 'holds' means."""
    store = filled(tmp_path, problem)
    for finding in PROBLEMS[problem].findings():
        for contrast in finding.contrasts:
            values = contrast.values(store, problem, SEEDS)
            assert values == pytest.approx([values[0]] * 3)
            if contrast.published is not None:
                assert values[0] == pytest.approx(contrast.published, abs=1e-9), contrast.name
            # Rounded to equal numbers in the paper: 8 and 16 steps, CT and CD at 8.
            assert values[0] > -1e-9, contrast.name


def test_the_rule():
    """Two standard errors of the mean, with the sample's own standard deviation."""
    assert findings.measure([1.0, 1.1, 0.9]).verdict == "holds"
    assert findings.measure([-1.0, -1.1, -0.9]).verdict == "does not hold"
    values = [1.0, 0.0, 0.5]
    measured = findings.measure(values)
    error = np.std(values, ddof=1) / np.sqrt(3)
    assert measured.mean == 0.5 and measured.standard_error == pytest.approx(error)
    # 0.5 against 2 x 0.289.
    assert measured.verdict == "undecided" and measured.detectable == pytest.approx(2 * error)
    assert findings.measure([0.0, 0.0]).verdict == "undecided"


def test_the_verdict_of_several():
    assert findings.verdict(["holds", "holds"]) == "holds"
    assert findings.verdict(["holds", "undecided"]) == "undecided"
    assert findings.verdict(["holds", "undecided", "does not hold"]) == "does not hold"


def test_cells_are_measured_once_and_stages_go_down():
    cells = findings.cells_of(mixture.MIXTURE_64D.findings(), "mixture", SEEDS)
    assert len(cells) == len(set(cells)) == 3 * 36
    steps = [cell.steps for cell in cells if cell.system == "progressive" and cell.seed == 1]
    assert steps == [8, 4, 2, 1]
    assert [cell.seed for cell in cells] == sorted(cell.seed for cell in cells)


def test_the_report_says_what_is_there_and_what_is_not(tmp_path):
    missing = Cell("mixture", "progressive", 8, 1)
    store = filled(tmp_path, "mixture", without=(missing,))
    chosen = {"mixture": mixture.MIXTURE_64D}
    text = summary.markdown(store, chosen, SEEDS, quick=False)
    rows = {row.split("|")[1].strip(): row for row in text.splitlines() if row.startswith("|")}
    (seventh,) = [row for name, row in rows.items() if name.startswith("7. ")]
    assert seventh.endswith("| not measured |")
    assert rows["PD - CD, 8 steps"] == "| PD - CD, 8 steps | +0.20 | not measured |"
    assert rows["CT - CD, 1 steps"] == "| CT - CD, 1 steps | +2.90 | +2.9 ± 0, holds |"
    assert "Quick" not in text and "Open choices" not in text
    assert "Quick" in summary.markdown(store, chosen, SEEDS, quick=True)


def test_an_undecided_contrast_says_what_would_decide(tmp_path):
    store = filled(tmp_path, "mixture", noise=5.0)
    text = summary.markdown(store, {"mixture": mixture.MIXTURE_64D}, SEEDS, quick=False)
    assert "undecided (needs " in text


def test_the_plot_is_a_picture(tmp_path):
    png = summary.plot(filled(tmp_path, "mixture"), {"mixture": mixture.MIXTURE_64D}, SEEDS)
    assert png.startswith(b"\x89PNG") and len(png) > 10_000


def test_choices_are_compared_with_the_default(tmp_path):
    store = Store(tmp_path / "results.jsonl", PROBLEMS)
    chosen = openmoji.OPENMOJI.choices()
    cells = choices.cells_of(chosen, "openmoji", SEEDS)
    assert len(set(cells)) == len(cells) == 3 * 2 * 13
    for cell in cells:
        worse = cell.overrides == (("consistency.huber_epsilon", 1.0),)
        store.add(cell, {"distance": 10.0 * cell.seed + worse}, seconds=0.0)
    measured = {c.name: choices.measured(c, store, "openmoji", 4, SEEDS) for c in chosen}
    assert measured["Huber epsilon 1"].mean == 1 and measured["dropout 0.1"].mean == 0
    text = summary.markdown(store, {"openmoji": openmoji.OPENMOJI}, SEEDS, quick=False)
    assert "| Huber epsilon 1 | +1 ± 0 | +1 ± 0 |" in text
    missing = Store(tmp_path / "empty.jsonl", PROBLEMS)
    assert choices.measured(chosen[0], missing, "openmoji", 4, SEEDS) is None


def test_the_papers_tables():
    assert paper.fid("table1", "large/imagenet128/ct", 4) == 2.7
    with pytest.raises(KeyError, match="table3 has no pd at 3 steps"):
        paper.fid("table3", "pd", 3)


def test_terms_are_cells():
    term = Term(-1.0, "cd", 4, findings.constant(128), "addim")
    assert term.cell("openmoji", 2) == Cell("openmoji", "cd", 4, 2, findings.constant(128), "addim")
