"""The comparison on avatars: the config of every cell, what shares a training, and the relative distance."""

import io
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from mcm_jax.bench import avatars, images
from mcm_jax.bench.cells import Cell
from mcm_jax.bench.costs import CALLS
from mcm_jax.config import validation
from mcm_jax.config.settings import stage_configs

PROBLEMS = [avatars.AVATARS, avatars.QUICK]


def bench_of(problem):
    bench = avatars.Bench.__new__(avatars.Bench)  # No data are needed.
    bench.problem, bench.directory, bench.data_dir = problem, Path("bench"), Path("data")
    return bench


@pytest.mark.parametrize("problem", PROBLEMS, ids=["whole", "quick"])
@pytest.mark.parametrize("system", CALLS)
def test_every_system_spends_the_same_number_of_network_calls(problem, system):
    bench = bench_of(problem)
    trainings = {}
    for steps in problem.student_steps:
        cell = Cell("avatars", system, steps, seed=3)
        config = validation.validate(bench.config(cell))
        assert config.seed == 3
        assert config.teacher_checkpoint == str(bench.root(Cell("avatars", "teacher", 1, seed=0)))
        stages = stage_configs(config, bench.root(cell))
        trainings.update(stages)
        assert bench.workdir(cell) in dict(stages)
        trained_for = dict(stages)[bench.workdir(cell)]
        assert steps in (trained_for.student_steps or problem.student_steps)
    spent = CALLS[system] * sum(config.training.num_steps for config in trainings.values())
    # Whole updates of each of at most five trainings.
    assert problem.student_calls - 5 * CALLS[system] < spent <= problem.student_calls


@pytest.mark.parametrize("problem", PROBLEMS, ids=["whole", "quick"])
def test_all_start_from_one_teacher_with_their_network(problem):
    bench = bench_of(problem)
    cells = [Cell("avatars", "teacher", steps, seed) for steps in (1, 64) for seed in (0, 1)]
    assert len({bench.root(cell) for cell in cells}) == 1
    teachers = {validation.validate(bench.config(cell)) for cell in cells}
    (teacher,) = teachers
    for system in CALLS:
        config = validation.validate(bench.config(Cell("avatars", system, 2, seed=1)))
        assert config.model == teacher.model and config.data == teacher.data
        assert config.schedule == teacher.schedule


def test_a_distance_is_that_of_the_test_images_times_a_factor(monkeypatch, tmp_path):
    monkeypatch.setattr(images.preparation, "prepare", lambda plan, *, data_dir: None)
    asked = []

    def evaluate(options, load_run):
        asked.append(options)
        metric = f"fd_effnet_lite0_{options.num}"
        return [SimpleNamespace(metrics={metric: 60.0}, bounds={f"test_images_{metric}": 40.0})]

    trained = []
    monkeypatch.setattr(images.scoring, "evaluate", evaluate)
    monkeypatch.setattr(
        images.trainer, "train", lambda config, workdir: trained.append((config.objective, workdir)) or True
    )
    bench = avatars.Bench(avatars.QUICK, tmp_path)
    values = bench(Cell("avatars", "moments", 2, seed=1, sampler="ddpm"))
    assert values["distance"] == 1.5 and values["test_images_fd_effnet_lite0_32"] == 40.0
    assert trained == [
        ("diffusion", tmp_path / "teacher"),
        ("moments", tmp_path / "seed1" / "moments_2"),
    ]
    (options,) = asked
    assert options.workdirs == (tmp_path / "seed1" / "moments_2",)
    assert (options.steps, options.sampler, options.seed, options.num) == ((2,), "ddpm", 1, 32)


def test_the_picture_has_every_cell_from_the_same_noise(monkeypatch):
    drawn = []

    def load_run(workdir):
        def sample(num, *, labels, steps, sampler):
            drawn.append((workdir, labels.tolist(), steps, sampler))
            return np.full((num, 8, 8, 3), 40 * len(drawn), np.uint8), labels

        return SimpleNamespace(dataset=SimpleNamespace(num_classes=6), sample=sample)

    monkeypatch.setattr(avatars, "load_run", load_run)
    bench = bench_of(avatars.QUICK)
    rows = {
        "CD": [Cell("avatars", "cd", steps, seed=1) for steps in (1, 2)],
        "moment matching": [Cell("avatars", "moments", steps, seed=1, sampler="ddpm") for steps in (1, 2)],
    }
    picture = np.asarray(Image.open(io.BytesIO(bench.picture(rows))).convert("RGB"))
    classes = list(range(6))
    assert drawn == [
        (Path("bench/seed1/cd"), classes, 1, "ddim"),
        (Path("bench/seed1/cd"), classes, 2, "ddim"),
        (Path("bench/seed1/moments_1"), classes, 1, "ddpm"),
        (Path("bench/seed1/moments_2"), classes, 2, "ddpm"),
    ]
    greys = set(map(tuple, picture.reshape(-1, 3)))
    assert {(40 * n,) * 3 for n in range(1, 5)} <= greys
