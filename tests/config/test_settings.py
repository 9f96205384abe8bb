import dataclasses
import importlib.util
import json
import math
import re
from pathlib import Path

import pytest

from mcm_jax.config import rows, validation
from mcm_jax.config.settings import Config, default_config
from mcm_jax.system.errors import InputError

# The tiny systems; tests/test_paper_rows.py has the paper's.
CONFIGS = [Path(__file__).parents[2] / "configs" / name for name in ("openmoji.py", "folder.py")]


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
@pytest.mark.parametrize("row", ["teacher", "cd,steps=1", "cd,steps=4", "ct,steps=16"])
def test_every_row_is_valid(path, row):
    raw = load(path).get_config(row)
    if row != "teacher":
        raw.teacher_checkpoint = "runs/teacher"
    config = validation.validate(raw)
    assert config.objective == {"t": "diffusion", "c": row[:2]}[row[0]]
    if row != "teacher":
        assert config.consistency.student_steps == (int(row.partition("=")[2]),)


@pytest.mark.parametrize(
    "row",
    ["", "gan", "cd", "cd,ct,steps=4", "teacher,steps=4", "cd,steps=x", "cd,steps=4,steps=8", "cd,step=4"],
)
def test_a_row_that_is_none(row):
    with pytest.raises(InputError):
        rows.tiny(row, dataset="openmoji", resolution=16)


def test_the_config_survives_json():
    raw = default_config()
    raw.model.widths = (16, 32, 64)
    config = validation.validate(raw)
    again = validation.validate(json.loads(json.dumps(dataclasses.asdict(config))))
    assert again == config


def test_every_setting_is_documented():
    def settings(kind):
        for field in dataclasses.fields(kind):
            if dataclasses.is_dataclass(field.type):
                yield from settings(field.type)
            else:
                yield field

    assert all(field.metadata["doc"] for field in settings(Config))


@pytest.mark.parametrize(
    ("section", "field", "value", "message"),
    [
        ("consistency", "teacher_step", "euler", "'euler' must be one of addim, ddim, heun"),
        ("consistency", "huber_epsilon", 0.0, "must be at least 1e-30"),
        ("optimizer", "b1", 1.5, "must be at most 0.999999"),
        ("optimizer", "learning_rate", 1e30, "must be at most 10"),
        ("optimizer", "learning_rate", math.inf, "must be finite"),
        ("optimizer", "learning_rate", math.nan, "must be finite"),
        ("consistency", "teacher_steps_first", math.inf, "must be finite"),
        ("training", "batch_size", 10**9, "must be at most 1048576"),
        ("model", "kinds", ("resnet", "resnet", "mlp"), "'mlp' must be one of resnet, transformer"),
        ("model", "dtype", "float16", "must be one of float32, bfloat16"),
        ("model", "embedding_width", 31, "must be even"),
        ("mesh", "data", 0, "config.mesh.data=0"),
    ],
)
def test_values_that_are_not_allowed(section, field, value, message):
    raw = default_config()
    raw.model.embedding_width = 32
    raw[section][field] = value
    with pytest.raises(InputError, match=re.escape(message)) as error:
        validation.validate(raw)
    assert f"config.{section}.{field}" in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"schedule.kind": "karras", "schedule.noise_resolution_low": 8},
            r"schedule\.noise_resolution_low=8 has no effect on config\.schedule\.kind=karras",
        ),
        (
            {"schedule.kind": "karras", "schedule.end_points": "kept"},
            r"schedule\.end_points='kept' has no effect",
        ),
        (
            {"sampling.noise_grid": "published_ct", "sampling.teacher_steps": 3},
            r"published_ct has noise levels for 1 or 2 steps, not for config\.sampling\.teacher_steps=3",
        ),
        (
            {"objective": "ct", "consistency.teacher_step": "heun"},
            r"consistency\.teacher_step=heun has no effect on ct",
        ),
        (
            {
                "objective": "moments",
                "moments.student_steps": 2,
                "moments.instant": True,
                "mesh.gather": "blocks",
            },
            r"mesh\.gather=blocks: config\.moments\.instant=True differentiates by all parameters",
        ),
        (
            {
                "objective": "moments",
                "moments.student_steps": 2,
                "moments.instant": True,
                "moments.teacher_guidance": 0.5,
            },
            r"moments\.teacher_guidance=0\.5: config\.moments\.instant=True moves the teacher itself",
        ),
    ],
)
def test_settings_that_have_no_effect_together(changes, message):
    raw = rows.tiny("cd,steps=4", dataset="openmoji", resolution=16)
    raw.teacher_checkpoint = "runs/teacher"
    validation.validate(raw)
    raw.update_from_flattened_dict(changes)
    with pytest.raises(InputError, match=message):
        validation.validate(raw)


@pytest.mark.parametrize(("warmup_steps", "num_steps"), [(100, 50), (100, 100), (1, 1)])
def test_a_warmup_that_is_not_shorter_than_the_run(warmup_steps, num_steps):
    raw = default_config()
    raw.optimizer.warmup_steps, raw.training.num_steps = warmup_steps, num_steps
    expected = (
        f"config.optimizer.warmup_steps={warmup_steps} must be below config.training.num_steps={num_steps};"
    )
    with pytest.raises(InputError, match=f"^{re.escape(expected)}"):
        validation.validate(raw)
    raw.training.num_steps = warmup_steps + 1
    assert validation.validate(raw).optimizer.warmup_steps == warmup_steps


def test_a_wrong_type():
    content = dataclasses.asdict(Config())
    content["training"]["batch_size"] = "64"
    with pytest.raises(InputError, match=r"config.training.batch_size='64' must be of type int"):
        validation.validate(content)
