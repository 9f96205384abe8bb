"""Grouping and averaging of made-up results, against sums done by hand."""

import math

import pytest

from mcm_jax import fields
from mcm_jax.config import settings
from mcm_jax.reporting import averages, results
from tests.reporting.made_up import TEACHER, config, record, write

METRIC = "fd_effnet_lite0_1024"


def groups(runs):
    return averages.group(results.collect(runs))[0]


def estimates(runs, metric=METRIC):
    collection = results.collect(runs)
    (group,), _ = averages.group(collection)
    return averages.estimates(group, metric, collection.descriptions)[0]


def test_mean_and_standard_error_over_training_seeds(tmp_path):
    for seed, distance in enumerate((10.0, 14.0, 18.0)):
        write(tmp_path / f"cd4_{seed}", record(distance, training_seed=seed))
    (estimate,) = estimates(tmp_path)
    # Deviations -4, 0, 4: variance 32 / 2 = 16, standard deviation 4.
    assert estimate.mean == 14.0
    assert estimate.standard_error == pytest.approx(4 / math.sqrt(3))
    assert estimate.count == 3


def test_one_training_has_no_standard_error(tmp_path):
    write(tmp_path / "cd4", record(10.0))
    (estimate,) = estimates(tmp_path)
    assert (estimate.mean, estimate.standard_error, estimate.count) == (10.0, None, 1)


def test_sampling_seeds_of_one_training_are_averaged_and_not_counted(tmp_path):
    write(tmp_path / "a", record(10.0, seed=0), record(14.0, seed=1))
    write(tmp_path / "b", record(20.0, seed=0, training_seed=1), record(22.0, seed=1, training_seed=1))
    (estimate,) = estimates(tmp_path)
    # 12 and 21: mean 16.5, standard deviation 9 / sqrt(2), standard error 9 / 2.
    assert (estimate.mean, estimate.count) == (16.5, 2)
    assert estimate.standard_error == pytest.approx(4.5)


@pytest.mark.parametrize("dates", [("2026-01-01", "2026-01-02"), ("2026-01-02", "2026-01-01")])
def test_the_newest_of_two_evaluations_counts(tmp_path, dates):
    days = [record(float(date[-1]), created=f"{date}T00:00:00+00:00") for date in dates]
    write(tmp_path / "cd4", *days)
    (estimate,) = estimates(tmp_path)
    assert (estimate.mean, estimate.count) == (2.0, 1)


def test_the_last_checkpoint_counts_whenever_it_was_evaluated(tmp_path):
    early = record(1.0, checkpoint_step=100, created="2026-02-02T00:00:00+00:00")
    write(tmp_path / "cd4", record(2.0, checkpoint_step=500), early)
    collection = results.collect(tmp_path)
    (group,), notes = averages.group(collection)
    assert [result.checkpoint_step for result in group.results] == [500]
    assert notes == ["cd4 was evaluated at several checkpoints; only the last one is shown"]


@pytest.mark.parametrize(
    "change",
    [
        {"reference__sha256": "b" * 64},
        {"features__sha256": "b" * 64},
        {"features__input_resolution": 224},
        {"num_samples": 2048},
        {"parameters": "raw"},
        {"label_rule": "uniform"},
        {"guidance": 1.5},
        {"seed": 1},
        {"resolution": 32},
        {"dataset": "folder/pets"},
        {"data_preprocessing": "otherwise"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_cannot_be_compared_is_never_in_one_group(tmp_path, change):
    write(tmp_path / "a", record(10.0))
    write(tmp_path / "b", record(30.0, training_seed=1, **change))
    assert [[result.run for result in group.results] for group in groups(tmp_path)] in (
        [["a"], ["b"]],
        [["b"], ["a"]],
    )


def test_a_run_sampled_with_more_seeds_is_not_beside_one_with_fewer(tmp_path):
    write(tmp_path / "a", record(10.0, seed=0), record(11.0, seed=1))
    write(tmp_path / "b", record(12.0, seed=0, training_seed=1))
    assert [(group.seeds, len(group.results)) for group in groups(tmp_path)] == [((0, 1), 2), ((0,), 1)]


def test_the_group_with_most_results_is_first(tmp_path):
    write(tmp_path / "a", record(10.0, parameters="ema"))
    write(tmp_path / "b", record(10.0, parameters="raw"), record(10.0, parameters="raw", steps=2))
    assert [group.conditions.parameters for group in groups(tmp_path)] == ["raw", "ema"]


def test_runs_that_differ_in_more_than_their_seed_are_not_averaged(tmp_path):
    write(tmp_path / "a", record(10.0), config=config())
    write(tmp_path / "b", record(30.0, training_seed=1), config=config(seed=1, training__log_every_steps=7))
    write(
        tmp_path / "c",
        record(50.0, training_seed=2),
        config=config(seed=2, optimizer__learning_rate=0.001),
    )
    found = {estimate.runs: estimate.mean for estimate in estimates(tmp_path)}
    assert found == {("a", "b"): 20.0, ("c",): 50.0}


def test_students_of_unlike_teachers_are_not_averaged(tmp_path):
    for teacher, steps in (("long0", 900), ("long1", 900), ("short", 100)):
        settings = config(objective="diffusion", training__num_steps=steps)
        write(tmp_path / teacher, record(5.0, **TEACHER), config=settings)
    for seed, teacher in enumerate(("long0", "long1", "short")):
        settings = config(seed=seed, teacher_checkpoint=f"elsewhere/{teacher}")
        write(tmp_path / f"cd{seed}", record(float(seed), training_seed=seed), config=settings)
    students = [estimate.runs for estimate in estimates(tmp_path) if estimate.objective == "cd"]
    assert sorted(students) == [("cd0", "cd1"), ("cd2",)]


def test_the_same_training_twice_counts_once(tmp_path):
    write(tmp_path / "old", record(10.0))
    write(tmp_path / "new", record(30.0, created="2026-05-05T00:00:00+00:00"))
    collection = results.collect(tmp_path)
    (group,), _ = averages.group(collection)
    (estimate,), notes = averages.estimates(group, METRIC, collection.descriptions)
    assert (estimate.mean, estimate.count, estimate.runs) == (30.0, 1, ("new",))
    assert notes == ["old is omitted: new is the same training with the same seed"]


def test_bounds_span_the_group(tmp_path):
    write(tmp_path / "a", record(10.0, bounds={"x": 1.0, "y": 5.0}))
    write(tmp_path / "b", record(10.0, training_seed=1, bounds={"x": 3.0}))
    (group,) = groups(tmp_path)
    assert averages.bounds(group) == {"x": (1.0, 3.0), "y": (5.0, 5.0)}


def test_pictures_of_one_noise_by_training_seed_teacher_first(tmp_path):
    write(tmp_path / "ct1", record(objective="ct", student_steps=1, steps=1), record(seed=3))
    write(tmp_path / "teacher", record(**TEACHER), record(**TEACHER, seed=3))
    write(tmp_path / "cd8", record(student_steps=8, steps=8), record(seed=3))
    write(tmp_path / "cd2", record(student_steps=2, steps=2), record(seed=3))
    write(tmp_path / "other", record(training_seed=1), record(training_seed=1, seed=3))
    collection = results.collect(tmp_path)
    group = averages.Group(collection.results[0].conditions, (0, 3), collection.results)
    found = {seed: [result.run for result in members] for seed, members in averages.grids(group).items()}
    assert found == {0: ["teacher", "cd2", "cd8", "ct1"], 1: ["other"]}


def test_numbers_that_were_asked_for_apart_are_one_result(tmp_path):
    """Of each the newest counts."""
    fields = [
        {
            "metrics": {"fd_effnet_lite0_1024": 5.0},
            "bounds": {"a": 1.0},
            "created": "2026-01-01T00:00:00+00:00",
        },
        {
            "metrics": {"nearest_neighbour_distance": 7.0},
            "bounds": {},
            "created": "2026-01-03T00:00:00+00:00",
        },
        {"metrics": {"fd_effnet_lite0_1024": 6.0}, "bounds": {}, "created": "2026-01-02T00:00:00+00:00"},
    ]
    write(tmp_path / "cd4", *(record(**each) for each in fields))
    (found,), _ = averages.group(results.collect(tmp_path))
    (result,) = found.results
    assert result.metrics == {"fd_effnet_lite0_1024": 6.0, "nearest_neighbour_distance": 7.0}
    assert result.bounds == {"a": 1.0}


def test_what_is_not_learned_is_what_the_settings_say():
    """The report, which does without JAX, has its own list: a new setting must enter it."""
    everything = fields.flat(settings.Config())
    learned = fields.flat(settings.Config(), fields.Affects.TRAINING | fields.Affects.NETWORK)
    listed = {
        name
        for name in everything
        for section, names in averages._NOT_LEARNED.items()
        if any(f"{name}.".startswith(f"{section}.{left_out}.".lstrip(".")) for left_out in names)
    }
    # They change what a run ends with: the runs of a group differ in both.
    assert listed == (everything.keys() - learned.keys()) | {"seed", "teacher_checkpoint"}
