"""The full-size rows of configs/imagenet64.py and configs/imagenet128.py: SPEC's values, header and network.

Expected values are written out here from SPEC 4 to 6, or are those of the paper's tables.
"""

import functools
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import imagenet64, imagenet128
from mcm_jax import fields
from mcm_jax.config import validation
from mcm_jax.config.settings import stage_configs
from mcm_jax.models.conditions import Classes
from mcm_jax.models.network import Network
from mcm_jax.reporting import paper
from mcm_jax.runs import build
from mcm_jax.system import sharding
from mcm_jax.system.errors import InputError
from mcm_jax.training import optimizer, step
from mcm_jax.training.state import TeacherParams

FILES = {64: imagenet64, 128: imagenet128}
BOTH = pytest.mark.parametrize("resolution", FILES)
SIZES = pytest.mark.parametrize("size", ["small", "large"])


def raw_config(resolution, row):
    raw = FILES[resolution].get_config(row)
    if raw.objective != "diffusion":
        raw.teacher_checkpoint = "runs/teacher"
    return raw


def load(resolution, row):
    return validation.validate(raw_config(resolution, row))


# --- Rows. ---


def paper_rows():
    return [(resolution, row) for resolution in FILES for row in paper.imagenet_fids(resolution)]


def test_the_tables_have_this_many_rows():
    """Table 1: 5 steps, CT and CD, two sizes, and two teachers. Tables 3 and 4 add 4 + 5, table 2 adds 12."""
    counts = {resolution: len(paper.imagenet_fids(resolution)) for resolution in FILES}
    assert counts == {64: 22 + 9, 128: 22 + 12}


@pytest.mark.parametrize(("resolution", "row"), paper_rows())
def test_every_row_of_the_tables(resolution, row):
    config = load(resolution, row)
    size, system, *rest = row.split(",")
    numbers = dict(part.split("=") for part in rest if "=" in part)
    assert config.objective == {"teacher": "diffusion", "pd": "progressive"}.get(system, system)
    assert config.student_steps == (() if system == "teacher" else (int(numbers["steps"]),))
    assert config.model.widths[-1] == {"small": 1024, "large": 2048}[size]
    settings = config.consistency
    constant = numbers.get("teacher_steps")
    found = (settings.teacher_steps_first, settings.teacher_steps_last)
    assert found == ((64, 1280) if constant is None else (float(constant),) * 2)
    assert settings.teacher_step == ("ddim" if "ddim" in rest else "addim")


@pytest.mark.parametrize(
    "row",
    [
        *("", "small", "cd,steps=8", "small,gan", "small,large,cd,steps=8", "small,cd,ct,steps=8"),
        *("small,cd", "small,cd,steps", "small,teacher,steps=4", "small,teacher,ddim", "small,cd,step=4"),
        *("small,ct,ddim,steps=4", "small,cd,addim,steps=4", "small,cd,ddim=1,steps=4"),
        *("small,pd,ddim,steps=4", "small,pd,steps=4,teacher_steps=128", "small,tract"),
        *("small,cd,ect,steps=4", "small,ct,ect,ict,steps=4", "small,shortcut,steps=4"),
    ],
)
def test_a_row_that_is_none(row):
    with pytest.raises(InputError) as error:
        imagenet64.get_config(row)
    message = str(error.value)
    assert repr(row) in message and "\n" not in message
    for word in (
        "small",
        "large",
        "teacher",
        "ct",
        "cd",
        "sct",
        "scd",
        "moments",
        "pd",
        "tract",
        "teacher_steps=N",
        "ddim",
    ):
        assert word in message


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("small,cd,steps=four", "'steps=four' is not NAME=WHOLE NUMBER"),
        ("small,cd,steps=4,steps=8", "steps appears twice"),
        ("small,pd,steps=3", "steps=3 must be a power of two from 1 to 512"),
        ("small,pd,steps=1024", "steps=1024 must be a power of two from 1 to 512"),
        ("small,tract,steps=32", "steps=32 must be one of 1, 2, 4, 8, 16"),
    ],
)
def test_numbers_that_are_not_allowed(row, message):
    with pytest.raises(InputError, match=re.escape(message)):
        imagenet128.get_config(row)


@pytest.mark.parametrize(
    ("row", "field"), [("steps=0", "student_steps"), ("steps=1,teacher_steps=0", "first")]
)
def test_zero_is_no_number_of_steps(row, field):
    with pytest.raises(InputError, match=f"{field}=0.* must be at least 1"):
        load(64, f"small,cd,{row}")


def test_the_order_of_a_rows_words_means_nothing():
    ordered, mixed = load(128, "large,cd,steps=8,teacher_steps=128"), "teacher_steps=128, cd,steps=8 ,large"
    assert load(128, mixed) == ordered


# --- Values. ---


@BOTH
@SIZES
def test_the_network(resolution, size):
    """SPEC 6: widths, blocks and dropouts of the appendix; large doubles the widths, not the embedding's."""
    model = load(resolution, f"{size},teacher").model
    widths, kinds, blocks = {
        64: ((256, 512, 1024), ("resnet", "transformer", "transformer"), (3, 3, 16)),
        128: ((128, 256, 512, 1024), ("resnet", "resnet", "transformer", "transformer"), (3, 3, 3, 16)),
    }[resolution]
    assert model.widths == (widths if size == "small" else tuple(2 * width for width in widths))
    assert (model.kinds, model.blocks) == (kinds, blocks)
    assert (model.embedding_width, model.head_width, model.mlp_factor) == (1024, 128, 4)
    assert model.dtype == "bfloat16"
    assert (
        model.dropouts
        == {
            (64, "small"): (0, 0, 0.2),
            (64, "large"): (0, 0.1, 0.1),
            (128, "small"): (0, 0, 0, 0.1),
            (128, "large"): (0, 0.1, 0.1, 0.1),
        }[resolution, size]
    )


@BOTH
@SIZES
def test_parameter_counts_of_the_paper(resolution, size):
    """Within 1.5%: the paper rounds. Shapes only, nothing is allocated."""
    network = build.network(load(resolution, f"{size},cd,steps=8"), condition=Classes(1000))
    count = sum(leaf.size for leaf in jax.tree.leaves(network.abstract_params))
    published = paper.tables()["parameters"][f"{size}/imagenet{resolution}"]
    units = {"M": 1e6, "B": 1e9}
    np.testing.assert_allclose(count, float(published[:-1]) * units[published[-1]], rtol=0.015)


@BOTH
def test_the_noise_schedule(resolution):
    """SPEC 2: interpolated from 32 to the image's resolution, lambda_cos - 2 log(resolution / 32) (1 - t)."""
    t = np.linspace(0.1, 0.9, 9)
    expected = -2 * np.log(np.tan(np.pi * t / 2)) - 2 * math.log(resolution / 32) * (1 - t)
    for row in ("small,teacher", "large,cd,steps=8"):
        schedule = build.schedule(load(resolution, row))
        # The ends' clip moves lambda by up to 1e-3 where the paper's formula has none.
        np.testing.assert_allclose(schedule(jnp.asarray(t, jnp.float32)), expected, atol=0.01)


@BOTH
@SIZES
def test_the_teachers_training(resolution, size):
    """SPEC 4 and 5; where guidance is used, at small ImageNet128, labels are dropped."""
    config = load(resolution, f"{size},teacher")
    optimizer, training = config.optimizer, config.training
    assert (training.num_steps, training.batch_size) == (1_000_000, 2048)
    assert (optimizer.learning_rate, optimizer.warmup_steps, optimizer.decay) == (1e-4, 10_000, "constant")
    assert config.diffusion.levels == {64: (), 128: (128, 64)}[resolution]
    assert config.diffusion.level_weights == "reciprocal"
    guided = (resolution, size) == (128, "small")
    assert config.diffusion.label_dropout == (0.1 if guided else 0)
    assert (config.sampling.guidance > 0) == guided
    assert (config.sampling.sampler, config.sampling.teacher_steps) == ("addim", 512)


@BOTH
@SIZES
@pytest.mark.parametrize("system", ["ct", "cd"])
def test_the_students_training(resolution, size, system):
    """SPEC 4."""
    config = load(resolution, f"{size},{system},steps=8")
    optimizer, training, settings = config.optimizer, config.training, config.consistency
    assert (training.num_steps, training.batch_size) == (200_000, 2048)
    assert (optimizer.learning_rate, optimizer.warmup_steps, optimizer.decay) == (2e-5, 0, "linear")
    assert (settings.anneal_steps, settings.xvar_frac, settings.huber_epsilon) == (100_000, 0.75, 1e-4)
    assert settings.target_network == "student"
    guided = (resolution, size, system) == (128, "small", "cd")
    assert config.teacher_guidance == (load(128, "small,teacher").sampling.guidance if guided else 0)


@BOTH
@SIZES
@pytest.mark.parametrize("system", ["teacher", "ct,steps=8", "cd,steps=8", "pd,steps=8", "tract,steps=8"])
def test_what_all_systems_share(resolution, size, system):
    config = load(resolution, f"{size},{system}")
    optimizer = config.optimizer
    assert (optimizer.b1, optimizer.b2, optimizer.eps) == (0.9, 0.99, 1e-12)
    assert (optimizer.clip_norm, optimizer.ema_decay) == (1.0, 0.9999)
    assert config.training.batch_size == 2048
    assert (config.data.dataset, config.data.data_dir) == ("imagenet", "data")
    assert config.data.resolution == resolution
    assert (config.mesh.data, config.mesh.fsdp) == (-1, {"small": 64, "large": 256}[size])


@pytest.mark.parametrize("size", ["small", "mini"])
def test_rows_of_later_methods(size):
    updates = 200_000 if size == "small" else 100_000
    ict, ect, plain = (load(64, f"{size},{row},steps=4").consistency for row in ("ct,ict", "ct,ect", "ct"))
    assert (ict.teacher_grid, ict.teacher_steps_first, ict.anneal_steps) == ("doubling", 10.0, updates)
    assert (ect.teacher_grid, ect.ect_q, ect.ect_stages * ect.ect_stage_steps) == ("ect", 4.0, updates)
    assert (plain.teacher_grid, plain.anneal_steps) == ("annealed", updates // 2)
    assert load(128, "small,ct,ect,steps=4").consistency.ect_q == 2.0
    assert load(64, f"{size},shortcut").student_steps == (1, 2, 4, 8, 16, 32, 64)


@pytest.mark.parametrize("system", ["teacher", "ct,steps=8", "cd,steps=8", "pd,steps=8", "tract,steps=8"])
def test_the_mini_network_is_small_but_for_its_size_and_length(system):
    mini, small = (fields.flat(load(64, row)) for row in (f"mini,{system}", f"{system},small"))
    changed = {name for name in mini if mini[name] != small[name]}
    assert changed <= {
        *("model.widths", "model.dropouts", "model.embedding_width", "mesh.fsdp", "training.batch_size"),
        *("training.num_steps", "optimizer.warmup_steps", "consistency.anneal_steps"),
    }
    assert mini["model.widths"] == tuple(width // 2 for width in small["model.widths"])
    assert mini["training.batch_size"] == small["training.batch_size"] // 4 and mini["mesh.fsdp"] == 8
    lengths = {"teacher": 300_000, "pd,steps=8": 10_000, "tract,steps=8": 50_000}
    assert mini["training.num_steps"] == lengths.get(system, 100_000)
    assert 2 * mini["consistency.anneal_steps"] == 100_000 or not system.startswith("c")
    network = build.network(load(64, f"mini,{system}"), condition=Classes(1000))
    assert sum(leaf.size for leaf in jax.tree.leaves(network.abstract_params)) == pytest.approx(
        100e6, rel=0.01
    )


def test_progressive_distillation_halves_down_to_the_students_steps():
    raw = load(64, "small,pd,steps=8")
    stages = [config for _, config in stage_configs(raw, Path("pd"))]
    assert [config.progressive.stages for config in stages] == [
        (2**n, 2 ** (n - 1)) for n in range(10, 3, -1)
    ]
    # The first teacher lacks aDDIM's adjustment; the others are students, which carry it.
    assert [config.progressive.xvar_frac for config in stages] == [0.75] + [0] * 6
    assert {config.training.num_steps for config in stages} == {20_000}
    assert {config.optimizer.learning_rate for config in stages} == {2e-5}
    assert len(load(64, "small,pd,steps=1").progressive.stages) == 11


def test_tract_takes_two_stages():
    config = load(64, "small,tract,steps=2")
    assert config.tract.stages == (1024, 32, 2)
    assert (config.training.num_steps, config.target_decay) == (100_000, 0.5)


# --- Headers. ---


def header_fids(header):
    """{row: FID} of the tables in a header: row names without steps above, steps at the left."""
    fids = {}
    for paragraph in header.split("\n\n"):
        (corner, *columns), *lines = [line.split() for line in paragraph.strip().splitlines()]
        if corner != "S":
            continue
        for steps, *values in lines:
            for column, value in zip(columns, values, strict=True):
                if value != "-":
                    fids[f"{column},steps={steps}"] = float(value)
    return fids


def one_line(text):
    return " ".join(text.split())


@BOTH
def test_a_headers_fids_are_the_papers(resolution):
    header, fids = FILES[resolution].__doc__, paper.imagenet_fids(resolution)
    small, large = fids.pop("small,teacher"), fids.pop("large,teacher")
    assert header_fids(header) == fids
    assert f"512 steps of aDDIM: small {small}, large {large}." in one_line(header)


def test_a_headers_numbers_from_other_tables():
    def progressive(steps, data):
        (value,) = (
            value
            for name, evaluations, value, _ in paper.tables()["table5"][data]
            if (name, evaluations) == ("PD (reimpl. with aDDIM)", steps)
        )
        return value

    *most, last = (paper.fid("table4", "addim", steps) for steps in (1, 2, 4, 8, 16))
    expected = (
        f"Table 4 reports small,cd as {', '.join(map(str, most))} and {last}, "
        f"and table 5 reports small,pd with 8 steps as {progressive(8, 'imagenet64')}."
    )
    assert expected in one_line(imagenet64.__doc__)
    two, four, eight = (progressive(steps, "imagenet128") for steps in (2, 4, 8))
    expected = f"Table 5 reports pd as {two}, {four} and {eight} with 2, 4 and 8 steps"
    assert expected in one_line(imagenet128.__doc__)


def test_tables_that_share_a_row_agree():
    """Table 1 rounds table 4's aDDIM; tables 2 and 3 repeat its CT and CD."""
    small, large = paper.imagenet_fids(64), paper.imagenet_fids(128)
    for steps in (1, 2, 4, 8):
        row = f"cd,steps={steps}"
        assert abs(small[f"small,{row}"] - paper.fid("table4", "addim", steps)) < 0.0501
        assert small[f"small,{row}"] == paper.fid("table3", "cd", steps)
        assert small[f"small,ct,steps={steps}"] == paper.fid("table3", "ct", steps)
        assert large[f"large,{row}"] == paper.fid("table2", "64->1280", steps)


@BOTH
def test_a_headers_hours_follow_from_the_published_speed(resolution):
    header = FILES[resolution].__doc__
    published = [
        row for row in paper.tables()["throughput"]["rows"] if row["data"] == f"imagenet{resolution}"
    ]
    speeds = {row["model"]: row for row in published}
    for size in ("small", "large"):
        assert f"{size}, {speeds[size]['chips'].replace(' x ', ' ')}" in header
    line = r"^    (\w+) +([\d,]+) (?:updates|a stage) +([\d.]+) h +([\d.]+) h\b"
    lines = re.findall(line, header, re.MULTILINE)
    assert [system for system, *_ in lines] == ["teacher", "ct", "cd", "pd", "tract"]
    for system, updates, *hours in lines:
        updates = int(updates.replace(",", ""))
        row = system if system == "teacher" else f"{system},steps=1"
        assert load(resolution, f"small,{row}").training.num_steps == updates
        for size, shown in zip(("small", "large"), hours, strict=True):
            # A teacher's update has no published speed; it needs one network call fewer than CT's.
            speed = speeds[size]["ct" if system in ("teacher", "ct") else "cd"]
            half_a_digit = 0.05 if "." in shown else 0.5
            assert abs(float(shown) - updates / speed / 3600) <= half_a_digit


# --- Training. ---


SIDE = 16


def shrunk(raw):
    """The same stages, dropouts, precision and objective in little: 16x16 images, a block a stage."""
    factor = raw.data.resolution // SIDE
    raw.data.resolution = SIDE
    raw.schedule.update(noise_resolution_low=32 // factor, noise_resolution_high=SIDE)
    raw.diffusion.levels = tuple(side // factor for side in raw.diffusion.levels)
    stages = len(raw.model.kinds)
    raw.model.update(
        widths=(8,) * (stages - 1) + (16,), blocks=(1,) * stages, embedding_width=16, head_width=8
    )
    raw.training.batch_size = 4
    raw.mesh.fsdp = 1
    return raw


class CompiledNetwork(Network):
    """Compiled by itself and once for equal sizes: the objectives around it are run as they are."""

    @functools.partial(jax.jit, static_argnums=0)
    def apply(self, *arguments):
        return super().apply(*arguments)


@pytest.mark.parametrize(
    ("resolution", "row"),
    [
        (64, "small,teacher"),
        (64, "small,ct,steps=8"),
        (64, "small,cd,steps=8"),
        (64, "small,cd,ddim,steps=8"),
        (64, "small,pd,steps=8"),
        (64, "small,tract,steps=8"),
        (128, "small,teacher"),  # Multiscale, with labels dropped.
        (128, "small,cd,steps=8"),  # Guided.
    ],
)
def test_an_update_of_every_program(resolution, row):
    config = validation.validate(shrunk(raw_config(resolution, row)))
    _, config = stage_configs(config, Path("run"))[0]
    mesh = sharding.make_mesh(data=config.mesh.data, fsdp=config.mesh.fsdp)
    network = CompiledNetwork(config.model, build.image_shape(config), condition=Classes(5))
    adam = optimizer.adam(config.optimizer, num_steps=config.training.num_steps)
    rng = np.random.default_rng(0)
    # Away from the initial zeros, at which every network predicts the same.
    params = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(0, 0.1, leaf.shape), leaf.dtype),
        network.abstract_params,
    )
    batch = {
        "image": jnp.asarray(rng.uniform(-1, 1, (4, SIDE, SIDE, 3)), jnp.float32),
        "label": jnp.arange(4),
    }
    update = step.Update(
        loss_fn=build.loss_fn(config, network, mesh=mesh),
        optimizer=adam,
        ema_decay=config.optimizer.ema_decay,
        target_decay=config.target_decay,
        seed=config.seed,
    )
    before = step.init_state(params, adam, target_decay=config.target_decay)
    state, metrics = update(before, TeacherParams(params) if config.distils else None, batch)
    assert int(state.step) == 1
    for metric in metrics.values():
        assert np.isfinite(metric) and metric > 0
    assert all(jax.tree.leaves(jax.tree.map(lambda new, old: np.any(new != old), state.params, params)))
