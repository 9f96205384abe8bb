"""The rows of configs/text_to_image.py are the paper's networks and settings (SPEC 10)."""

import jax
import pytest

from mcm_jax.config import paper_rows, validation
from mcm_jax.models.conditions import Captions, Classes
from mcm_jax.planning import computations
from mcm_jax.runs import build
from mcm_jax.system.errors import InputError

ROWS = ["teacher", "guidance,low", "guidance,high", "cd,steps=4", "cd,steps=8", "cd,steps=16"]


def config(row, **changes):
    raw = paper_rows.text_to_image(row)
    raw.data.update(changes)
    raw.teacher_checkpoint = None if row == "teacher" else "teacher"
    return validation.validate(raw)


def test_the_network():
    """Its levels have 256, 128, 64, 32 and 16 positions a side."""
    built = config("teacher")
    network = build.network(built, condition=computations.condition(built))
    count = sum(leaf.size for leaf in jax.tree.leaves(network.abstract_params))
    assert 4.97e9 < count < 4.98e9  # As its head says.
    assert built.model.patch * 2 ** (len(built.model.widths) - 1) * 16 == 512


@pytest.mark.parametrize("row", ROWS)
def test_rows(row):
    built = config(row)
    assert (built.schedule.noise_resolution_low, built.schedule.noise_resolution_high) == (32, 512)
    assert built.training.batch_size == 2048
    if row.startswith("guidance"):
        assert built.teacher_guidance == {"low": 0.5, "high": 3.0}[row.partition(",")[2]]
    if row.startswith("cd"):
        loss = built.consistency
        assert (loss.teacher_steps_first, loss.teacher_steps_last) == (256, 256)
        assert (loss.huber_epsilon, loss.xvar_frac, loss.teacher_guidance) == (1, 0.75, 0)
        assert built.training.num_steps == 30_000 and built.student_steps == (int(row.partition("=")[2]),)


@pytest.mark.parametrize(
    "row", ["", "guidance", "guidance,low,high", "cd", "cd,low,steps=4", "teacher,steps=4"]
)
def test_no_other_rows(row):
    with pytest.raises(InputError, match="there is no config row"):
        paper_rows.text_to_image(row)


@pytest.mark.parametrize("steps", [3, 300])
def test_steps_divide_the_teachers(steps):
    with pytest.raises(InputError, match="must divide the 256 teacher steps"):
        paper_rows.text_to_image(f"cd,steps={steps}")


def test_what_a_network_is_conditioned_on():
    assert computations.condition(config("teacher")) == Captions(128, 4096, 4096)
    assert computations.condition(config("teacher", encoder="minilm")) == Captions(128, 384, 384)
    assert computations.condition(config("teacher", encoder=None, dataset="imagenet/adm")) == Classes(1000)
    for changes, message in (
        (
            {"encoder": "mine"},
            "config.data.encoder=mine: the size of its embeddings is unknown; use one of minilm,",
        ),
        ({"encoder": None}, "config.data.dataset=folder/captioned: unknown classes; set --num_classes"),
    ):
        with pytest.raises(InputError) as caught:
            computations.condition(config("teacher", **changes))
        assert str(caught.value).startswith(message)
