"""Reading of made-up results: what evaluate writes, what a crash leaves, and damage."""

import dataclasses
import json
import math
import os

import pytest

from mcm_jax.reporting import averages, results, tables
from mcm_jax.system.errors import InputError
from tests.limits import refusal
from tests.reporting.made_up import CONFIG, RECORD, record, write

METRIC = "fd_effnet_lite0_1024"


def test_features_of_several_resolutions_must_state_theirs(tmp_path):
    features = {"network": "efficientnet-lite0", "sha256": "f" * 64}
    write(tmp_path / "cd4", record(features=features))
    with pytest.raises(InputError, match=r"features\.input_resolution is missing"):
        results.collect(tmp_path)


def test_a_fid_against_a_published_file(tmp_path):
    of = {
        "metrics": {"fid_50k": 1.5, "sfid_50k": 4.0, "inception_score_50k": 60.0},
        "bounds": {},
        "num_samples": 50_000,
        "features": {"network": "inception-2015-12-05", "sha256": "f" * 64},
        "reference": {"file": "imagenet64.npz", "sha256": "a" * 64, "count": None},
    }
    write(tmp_path / "cd4", record(**of))
    (group,), _ = averages.group(results.collect(tmp_path))
    assert group.distance == "fid_50k" and group.distances == ("fid_50k",)
    assert "against the statistics in imagenet64.npz" in tables.conditions_text(group)
    ((estimate,), _) = averages.estimates(group, "fid_50k", {})
    assert estimate.mean == 1.5


@pytest.mark.parametrize(
    "grid",
    [
        *("../secret.png", "missing.png", "evaluation/results.jsonl", "evaluation", "link.png", "pipe.png"),
        *("damaged.png", "a\0b.png", "a/" * 5000, "x" * 300, "circle/a.png", ""),
    ],
)
def test_a_picture_is_a_png_inside_its_run(tmp_path, grid):
    run = tmp_path / "cd4"
    write(run, record(grid=grid))
    picture = (run / RECORD["grid"]).read_bytes()
    (tmp_path / "secret.png").write_bytes(picture)
    (run / "link.png").symlink_to(tmp_path / "secret.png")
    (run / "circle").symlink_to("circle")
    (run / "damaged.png").write_bytes(picture[:50])
    os.mkfifo(run / "pipe.png")
    (result,) = results.collect(tmp_path).results
    assert results.read_grid(result) is None
    assert results.read_grid(dataclasses.replace(result, grid=RECORD["grid"])) is not None


def test_a_directory_that_is_itself_a_run(tmp_path):
    write(tmp_path / "cd4", record())
    assert results.collect(tmp_path / "cd4").results[0].run == "cd4"


@pytest.mark.parametrize("at", [1, 40, -30, -1])
def test_a_line_that_was_cut_off_is_skipped_with_a_note(tmp_path, at):
    path = write(tmp_path / "cd4", record(10.0))
    with open(path, "a") as file:
        file.write(json.dumps(record(99.0))[:at])
    collection = results.collect(tmp_path)
    assert [result.metrics[METRIC] for result in collection.results] == [10.0]
    assert f"{path}:2 is truncated and was skipped; evaluate that run again" in collection.notes
    # Evaluating again leaves it in place, see files.append_line.
    with open(path, "a") as file:
        file.write("\n")
    write(tmp_path / "cd4", record(11.0))
    collection = results.collect(tmp_path)
    assert [result.metrics[METRIC] for result in collection.results] == [10.0, 11.0]
    assert any(f"{path}:2" in note for note in collection.notes)


def test_a_brace_within_text_does_not_close_a_cut_off_line(tmp_path):
    path = write(tmp_path / "cd4", record(10.0))
    with open(path, "a") as file:
        file.write('{"workdir": "a\\"}}')
    assert any("truncated" in note for note in results.collect(tmp_path).notes)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("what is this", "is damaged"),
        ('{"workdir": }', "is damaged"),
        ("[1, 2]", "the line is not a JSON object"),
        (json.dumps(record(metrics={"x": math.nan})), "NaN is not a number"),
        (json.dumps(record(metrics={"x": 1.5})).replace("1.5", "1e999"), "metrics.x is not finite"),
        (
            json.dumps(record(objective="gan")),
            "objective is 'gan', not one of diffusion, guidance, cd, ct, scd, sct, moments, ayf, meanflow, "
            "shortcut, progressive, tract",
        ),
        (json.dumps(record(steps="4")), "steps is '4', not a whole number"),
        (json.dumps(record(seed=True)), "seed is True, not a whole number"),
        (json.dumps(record(seed=-1)), "seed is -1, below zero"),
        (json.dumps(record(student_steps=None)), "student_steps is None, not a whole number"),
        (json.dumps(record(reference={"count": 3})), "reference.sha256 is missing"),
        (json.dumps(record(features=[])), "features is [], not an object"),
        (json.dumps(record(created="yesterday")), "created is 'yesterday', not a date"),
        (
            json.dumps(record(x_var="measured")),
            "x_var is 'measured', but x_var_eta or x_var_images",
        ),
    ],
)
def test_other_damage_is_named_with_file_and_line(tmp_path, line, message):
    path = write(tmp_path / "cd4", record(10.0))
    with open(path, "a") as file:
        file.write(line + "\n")
    with pytest.raises(InputError) as error:
        results.collect(tmp_path)
    assert f"{path}:2" in str(error.value) and message in str(error.value)
    assert "\n" not in str(error.value)


def test_an_exported_model_says_how_it_was_trained(tmp_path):
    write(tmp_path / "cd4", record(10.0), config=CONFIG)
    trained = results.collect(tmp_path)
    (tmp_path / "cd4" / "run.json").rename(tmp_path / "cd4" / "config.json")
    assert results.collect(tmp_path) == trained and "cd4" in trained.descriptions


@pytest.mark.parametrize(
    "content", ["", "{", '{"config": {}}', '{"config": {"data": 3}, "dataset": {}}', "[]"]
)
def test_a_damaged_run_file_is_named(tmp_path, content):
    write(tmp_path / "cd4", record(10.0))
    (tmp_path / "cd4" / "run.json").write_text(content)
    with pytest.raises(InputError, match=r"cd4/run\.json is damaged"):
        results.collect(tmp_path)


def test_nothing_to_report(tmp_path):
    with pytest.raises(InputError, match="no such directory"):
        results.collect(tmp_path / "missing")
    with pytest.raises(InputError, match="evaluate a run first"):
        results.collect(tmp_path)


@pytest.mark.parametrize(
    ("changes", "sampler"),
    [
        ({}, "ddim"),
        ({"sampler": "addim", "x_var": "analytic", "noise_grid": "schedule", "clip": "last"}, "addim"),
        (
            {"sampler": "addim", "x_var": "measured", "x_var_eta": 0.75, "x_var_images": 1024},
            "addim (measured variance with eta 0.75 over 1024 images)",
        ),
        ({"sampler": "heun", "noise_grid": "karras"}, "heun (karras grid)"),
        ({"rounding": "floor"}, "ddim (floor rounding)"),
        ({"clip": "every", "noise_grid": "karras"}, "ddim (karras grid, clipped in every step)"),
    ],
)
def test_samplers_that_differ_have_different_labels(changes, sampler, tmp_path):
    write(tmp_path / "run", record(**changes))
    (result,) = results.collect(tmp_path).results
    assert result.sampling.label == sampler


@pytest.mark.parametrize(("objective", "steps"), [("progressive", 4), ("tract", 4), ("guidance", None)])
def test_every_objective_is_read(objective, steps, tmp_path):
    write(tmp_path / "run", record(objective=objective, student_steps=steps))
    (result,) = results.collect(tmp_path).results
    assert (result.objective, result.student_steps) == (objective, steps)


@pytest.mark.parametrize("name", ["run.json", "evaluation/results.jsonl"])
@pytest.mark.parametrize(
    "text", ["[" * 10**5, "1" * 10**5, "[" * 60 + "]" * 60, '{"config": "text", "dataset": {}}']
)
def test_odd_json_is_one_line(tmp_path, name, text):
    write(tmp_path / "a\nb", record(), config={})
    (tmp_path / "a\nb" / name).write_text(text)
    found = refusal(lambda: results.collect(tmp_path))
    assert found is not None and r"a\nb" in found and name in found


def test_a_name_of_two_lines_in_a_record_is_one_line(tmp_path):
    write(tmp_path / "cd4", record(metrics={"a\nb": "text"}))
    found = refusal(lambda: results.collect(tmp_path))
    assert found is not None and r"metrics.a" in found


def test_a_count_of_many_digits_is_no_count(tmp_path):
    write(tmp_path / "cd4", record(metrics={METRIC: 1.0, "fid_" + "9" * 5000: 2.0}))
    (group,), _ = averages.group(results.collect(tmp_path))
    assert METRIC in group.distances and len(group.distances) == 1
