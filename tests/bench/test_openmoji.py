from pathlib import Path

import pytest

from mcm_jax.bench import openmoji
from mcm_jax.bench.cells import Cell
from mcm_jax.config import validation
from mcm_jax.config.settings import stage_configs


@pytest.mark.parametrize("problem", [openmoji.OPENMOJI, openmoji.QUICK], ids=["whole", "quick"])
def test_students_of_progressive_distillation_share_their_stages(problem):
    """A student goes on from another's stages: none may be a run where others have theirs."""
    bench = openmoji.Bench.__new__(openmoji.Bench)  # No data are needed.
    bench.problem, bench.directory, bench.data_dir = problem, Path("bench"), Path("data")
    roots = set()
    for steps in problem.student_steps:
        cell = Cell("openmoji", "progressive", steps, seed=0)
        stages = stage_configs(validation.validate(bench._config(cell)), bench._root(cell))
        roots.add(bench._root(cell))
        assert all(workdir.parent == bench._root(cell) for workdir, _ in stages)
        assert stages[-1][0].name == f"steps_{steps}"
    assert len(roots) == 1
