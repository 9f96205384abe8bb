from pathlib import Path
from types import SimpleNamespace

import pytest

from mcm_jax.bench import images, openmoji
from mcm_jax.bench.cells import Cell
from mcm_jax.config import validation
from mcm_jax.config.settings import stage_configs
from tests import tiny


@pytest.mark.parametrize("problem", [openmoji.OPENMOJI, openmoji.QUICK], ids=["whole", "quick"])
def test_students_of_progressive_distillation_share_their_stages(problem):
    """A student goes on from another's stages: none may be a run where others have theirs."""
    bench = openmoji.Bench.__new__(openmoji.Bench)  # No data are needed.
    bench.problem, bench.directory, bench.data_dir = problem, Path("bench"), Path("data")
    roots = set()
    for steps in problem.student_steps:
        cell = Cell("openmoji", "progressive", steps, seed=0)
        stages = stage_configs(validation.validate(bench.config(cell)), bench.root(cell))
        roots.add(bench.root(cell))
        assert all(workdir.parent == bench.root(cell) for workdir, _ in stages)
        assert stages[-1][0].name == f"steps_{steps}"
    assert len(roots) == 1


@pytest.mark.parametrize("problem", [openmoji.OPENMOJI, openmoji.QUICK], ids=["whole", "quick"])
@pytest.mark.parametrize("system", ["teacher", "cd", "ct", "progressive"])
def test_the_config_of_every_cell_is_valid(problem, system):
    bench = openmoji.Bench.__new__(openmoji.Bench)
    bench.problem, bench.directory, bench.data_dir = problem, Path("bench"), Path("data")
    config = validation.validate(bench.config(Cell("openmoji", system, 1, seed=0)))
    assert config.optimizer.warmup_steps == (config.training.num_steps // 10 if system == "teacher" else 0)


@pytest.fixture
def small_bench(tiny_data, tmp_path, monkeypatch):
    """A bench of the tests' tiny system, whose samples nobody scores."""

    def tiny_config(row, *, dataset, resolution):
        system = row.partition(",")[0]
        if system == "teacher":
            return tiny.two_stage_config(tiny_data)
        return tiny.two_stage_config(tiny_data, system, "the teacher's workdir")

    monkeypatch.setattr(openmoji.rows, "tiny", tiny_config)
    monkeypatch.setattr(images.preparation, "prepare", lambda plan, *, data_dir: None)
    monkeypatch.setattr(openmoji, "NUM_SAMPLES", 8)
    scored = []

    def evaluate(options, load_run):
        scored.append(options.workdirs)
        return [SimpleNamespace(metrics={openmoji.METRIC: 0.5})]

    monkeypatch.setattr(images.scoring, "evaluate", evaluate)
    bench = openmoji.Bench(
        openmoji.Problem("openmoji", teacher_updates=4, student_updates=1), tmp_path, data_dir=tiny_data
    )
    # Trained already.
    tiny.made_up_teacher(tiny_data, tmp_path / "seed0" / "teacher")
    return bench, scored


def test_a_ct_cell_runs_to_its_end(small_bench):
    """Teacher, student, score, and how far the student is from its teacher."""
    bench, scored = small_bench
    values = bench(Cell("openmoji", "ct", 2, seed=0))
    student = bench.directory / "seed0" / "ct_2"
    assert scored == [(student,)]
    assert values["distance"] == 0.5
    assert 0 < values["from_diffusion"] < 1
