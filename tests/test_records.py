"""The record of a result: written and read back, tolerant of other versions, strict about types."""

import dataclasses
import json

import pytest

from mcm_jax import records
from mcm_jax.records import Measurement, RecordError, Result
from tests.reporting.made_up import RECORD, record

ORIGIN = {"kind": "edm", "file": "a.pkl", "sha256": "f", "source": "s", "licence": "l"}


def read(**changes) -> Result:
    return Result.from_json(record(**changes))


def test_a_record_is_the_same_after_writing_and_reading():
    measured = {"sampler": "addim", "x_var": "measured", "x_var_eta": 0.75, "x_var_images": 1024}
    for changes in ({}, measured, {"origin": ORIGIN}):
        result = read(**changes)
        assert result.to_json() == record(**changes)
        assert Result.from_json(json.loads(json.dumps(result.to_json()))) == result


def test_a_nested_record_leaves_out_what_it_does_not_have():
    result = read(
        features={"network": "inception-2015-12-05", "sha256": "f"},
        reference={"file": "imagenet64.npz", "sha256": "a", "count": None},
    )
    content = result.to_json()
    assert content["features"] == {"network": "inception-2015-12-05", "sha256": "f"}
    assert content["reference"] == {"file": "imagenet64.npz", "sha256": "a"}
    assert Result.from_json(content) == result


def test_fields_of_other_versions():
    """Unknown fields are ignored, and those with a default may be missing: it says what was done then."""
    content = record(unheard_of=1, features__unheard_of=2)
    optional = {
        *(
            "version",
            "workdir",
            "checkpoint",
            "origin",
            "guide_origin",
            "asked",
            "caption_scores",
            "untrained_num",
            "noise_grid",
            "x_var",
            "x_var_eta",
        ),
        *("x_var_images", "clip", "rounding", "sampling_seconds", "features_seconds", "guide"),
        *("guide_checkpoint", "trained_for"),
    }
    for name in optional:
        del content[name]
    for name in ("dataset", "resolution"):
        del content["reference"][name]
    assert Result.from_json(content).sampling == read().sampling
    for name in content.keys() - {"unheard_of"}:
        with pytest.raises(RecordError, match=f"^{name} is "):
            Result.from_json({key: value for key, value in content.items() if key != name})


def test_every_input_identifies_a_measurement_and_no_outcome_does():
    inputs = {
        **{"version": 1, "workdir": "x", "objective": "ct", "dataset": "x", "resolution": 1, "seed": 1},
        **{"data_preprocessing": "x", "training_seed": 1, "student_steps": 1, "checkpoint_step": 1},
        **{"trained_for": [1, 2]},
        **{"checkpoint": "x", "parameters": "raw", "label_rule": "x", "steps": 1, "sampler": "x"},
        **{"noise_grid": "x", "x_var": "analytic", "x_var_eta": 1.0, "x_var_images": 1, "guidance": 1.0},
        **{
            "guide": "x",
            "guide_checkpoint": "x",
            "clip": "x",
            "rounding": "x",
            "network_calls": 1,
            "num_samples": 1,
            "untrained_num": 1,
        },
        **{"asked": [], "caption_scores": ["attributes 0f"], "origin": ORIGIN},
        "guide_origin": ORIGIN,
        **{"features": {"network": "inception-2015-12-05", "sha256": "x"}},
        "reference": {"file": "x", "sha256": "x"},
    }
    outcome = {
        **{"metrics": {}, "bounds": {}, "rank_deficient": False, "features_seconds": 0.0, "grid": "x"},
        **{"sampling_seconds": 0.0, "versions": {}, "created": "2027-01-01T00:00:00+00:00"},
    }
    assert inputs.keys() | outcome.keys() == RECORD.keys()
    for name, value in inputs.items():
        assert not read().same_measurement(read(**{name: value})), name
    assert read().same_measurement(read(**outcome))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": "4"}, "steps is '4', not a whole number"),
        ({"seed": True}, "seed is True, not a whole number"),
        ({"num_samples": 1.5}, "num_samples is 1.5, not a whole number"),
        ({"seed": -1}, "seed is -1, below zero"),
        ({"guidance": None}, "guidance is None, not a number"),
        ({"guidance": float("inf")}, "guidance is not finite"),
        ({"asked": "frechet"}, "asked is 'frechet', not a list"),
        ({"asked": [1]}, "asked is 1, not text"),
        ({"metrics": {"x": float("nan")}}, "metrics.x is not finite"),
        ({"rank_deficient": 1}, "rank_deficient is 1, not true or false"),
        ({"objective": "gan"}, "objective is 'gan', not one of diffusion, guidance"),
        ({"objective": []}, "objective is [], not one of diffusion, guidance"),
        ({"student_steps": None}, "student_steps is None, not a whole number"),
        ({"features": []}, "features is [], not an object"),
        ({"features__network": "vgg"}, "features.network is 'vgg', not one of efficientnet-lite0"),
        ({"features__input_resolution": None}, "features.input_resolution is missing"),
        ({"reference": {"split": "train", "sha256": "a"}}, "reference.count is missing"),
        ({"created": 3}, "created is 3, not text"),
        ({"created": "yesterday"}, "created is 'yesterday', not a date"),
    ],
)
def test_what_is_wrong_is_named(changes, message):
    with pytest.raises(RecordError) as error:
        read(**changes)
    assert str(error.value).startswith(message)


def test_a_record_that_is_no_object():
    with pytest.raises(RecordError, match=r"^the line is not a JSON object"):
        Result.from_json([])


def test_whole_numbers_are_numbers_and_a_date_without_a_zone_is_utc():
    result = read(guidance=1, created="2026-01-02T03:04:05")
    assert result.sampling.guidance == 1.0 and type(result.sampling.guidance) is float
    assert result.created == read().created


def test_a_measurement_is_hashable_and_part_of_its_result():
    result = read()
    measurement = Measurement.from_json(record())
    assert len({measurement, Measurement.from_json(record())}) == 1
    assert result.same_measurement(measurement)
    assert {field.name for field in dataclasses.fields(Measurement)} < set(vars(result))


def test_counts_in_names():
    assert [records.with_count("fid", n) for n in (50_000, 49_999, 5_000)] == [
        *("fid_50k", "fid_49999", "fid_5000")
    ]
    for distance in records.DISTANCES.values():
        for prefix in ("", "test_images_", "untrained_network_"):
            for count in (12, 50_000):
                assert records.count_of(prefix + records.with_count(distance, count)) == count
    for name in ("sfid_50k", "mean_image_fid", "nearest_neighbour_distance", "fid", "xfid_12", "fid_12x"):
        assert records.count_of(name) is None
