"""Runs that were started by version 0.1 are read as what they were."""

import dataclasses

import pytest

from mcm_jax.config import validation
from mcm_jax.config.settings import Config
from mcm_jax.config.upgrade import upgraded


def settings_of_version_0_1(objective, **consistency):
    """What version 0.1 wrote for a run of `objective`; sections that stayed the same are left to defaults."""
    return {
        "objective": objective,
        "seed": 3,
        "teacher_checkpoint": None if objective == "diffusion" else "runs/teacher",
        "teacher_guidance": 0.5 if objective in ("cd", "guidance") else 0.0,
        "diffusion": {"levels": [], "level_weights": "reciprocal", "label_dropout": 0.1},
        "consistency": {
            "student_steps": None,
            "stages": [],
            "teacher_steps_first": 64.0,
            "teacher_steps_last": 1280.0,
            "anneal_steps": 150,
            "teacher_step": "addim",
            "xvar_frac": 0.5,
            "later_xvar_frac": 0.25,
            "huber_epsilon": 1e-4,
            "huber_reduction": "mean",
            "loss_weight": None,
            "target_network": "student",
            "target_decay": None,
            **consistency,
        },
    }


@pytest.mark.parametrize(
    ("objective", "given", "expected"),
    [
        ("diffusion", {}, {"label_dropout": 0.1}),
        ("cd", {"student_steps": 4}, {"student_steps": (4,), "anneal_steps": 150, "teacher_guidance": 0.5}),
        (
            "ct",
            {"student_steps": 1, "target_network": "ema"},
            {"target_decay": 0.95, "teacher_guidance": 0.0},
        ),
        ("tract", {"stages": [8, 2]}, {"stages": (8, 2), "loss_weight": "max_snr_one", "target_decay": 0.5}),
        ("tract", {"stages": [8, 2], "target_decay": 0.3}, {"target_decay": 0.3}),
        (
            "progressive",
            {"stages": [4, 2, 1]},
            {"stages": (4, 2, 1), "xvar_frac": 0.5, "later_xvar_frac": 0.25},
        ),
        ("guidance", {}, {"teacher_guidance": 0.5}),
    ],
)
def test_settings_keep_their_meaning(objective, given, expected):
    config = validation.validate(upgraded(settings_of_version_0_1(objective, **given)))
    assert (config.objective, config.seed) == (objective, 3)
    assert dataclasses.asdict(config.loss).items() >= expected.items()


@pytest.mark.parametrize(("given", "expected"), [(4, (4,)), (None, ()), ([1, 4], [1, 4])])
@pytest.mark.parametrize("section", ["consistency", "continuous"])
def test_a_single_number_of_steps_becomes_a_tuple(section, given, expected):
    raw = dataclasses.asdict(Config())
    raw[section]["student_steps"] = given
    assert upgraded(raw)[section] == {**raw[section], "student_steps": expected}


def test_settings_of_today_stay_as_they_are():
    raw = dataclasses.asdict(Config(seed=5))
    assert upgraded(raw) == raw
