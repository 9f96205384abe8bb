"""Whole runs: continued, distilled, interrupted, and refused."""

import contextlib
import dataclasses
import errno
import functools
import json
import os
import re
import shutil
import signal
import time

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from mcm_jax.config import validation
from mcm_jax.config.settings import stage_configs
from mcm_jax.data import pipeline
from mcm_jax.models.conditions import Classes
from mcm_jax.runs import build, trainer, workdirs
from mcm_jax.runs.run import load_run
from mcm_jax.system import sharding
from mcm_jax.system.errors import InputError
from mcm_jax.system.pictures import image_grid
from mcm_jax.training import loop, observer, step
from mcm_jax.training.checkpoints import Checkpoints
from mcm_jax.training.loop import NonFiniteError
from mcm_jax.training.state import TeacherParams
from tests import forks, tiny


def params_of(workdir, parameters="raw"):
    return jax.device_get(load_run(workdir, parameters=parameters).params)


def assert_equal_trees(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def checkpoint_steps(workdir):
    with Checkpoints(workdir) as checkpoints:
        return checkpoints.all_steps()


@pytest.mark.parametrize(
    "objective",
    ["diffusion", "cd", "ct", "scd", "sct", "moments", "moments instant", "meanflow", "shortcut", "tract"],
)
def test_four_updates_are_two_and_two_more(objective, tiny_data, teacher, tmp_path, capsys):
    """Bit for bit: parameters, averages, optimizer, randomness and data go on where they were.

    TRACT's target network is an average of its own, saved with the rest.
    """
    objective, *instant = objective.split()
    config = tiny.config(tiny_data, objective, None if objective == "diffusion" else teacher)
    config.moments.instant = bool(instant)
    assert trainer.train(config, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    shutil.rmtree(tmp_path / "parts/checkpoints/4")
    assert trainer.train(config, tmp_path / "parts")
    assert "continuing at update 2" in capsys.readouterr().out
    for parameters in ("raw", "ema"):
        whole, parts = (params_of(tmp_path / name, parameters) for name in ("whole", "parts"))
        assert_equal_trees(whole, parts)
    assert not np.array_equal(
        params_of(tmp_path / "whole")["conv_in"]["kernel"],
        params_of(tmp_path / "whole", "ema")["conv_in"]["kernel"],
    )


def test_a_finished_run_says_so(teacher, tiny_data, capsys):
    assert trainer.train(tiny.config(tiny_data), teacher)
    assert "is finished: all 4 updates are done" in capsys.readouterr().out


def test_a_finished_run_needs_nothing_any_more(tiny_data, teacher, tmp_path, capsys):
    """Neither its data nor, for a student, its teacher."""
    shutil.copytree(teacher, tmp_path / "teacher")
    config = tiny.config(tiny_data, "ct", tmp_path / "teacher")
    config.training.num_steps = 1
    assert trainer.train(config, tmp_path / "student")
    shutil.rmtree(tmp_path / "teacher")
    config.data.data_dir = "/none"
    assert trainer.train(config, tmp_path / "student")
    assert "is finished: all 1 updates are done" in capsys.readouterr().out


def test_settings_that_may_change_are_kept_as_they_are_now(tiny_data, tmp_path):
    config = tiny.config(tiny_data)
    config.training.num_steps = 1
    assert trainer.train(config, tmp_path / "run")
    config.training.num_steps = 2
    config.sampling.teacher_steps = 3
    assert trainer.train(config, tmp_path / "run")
    assert load_run(tmp_path / "run").sampling().steps == 3


def test_an_unfinished_teacher_is_none(tiny_data, teacher, tmp_path, no_compilation):
    shutil.copytree(teacher, tmp_path / "teacher")
    file = tmp_path / "teacher/run.json"
    content = json.loads(file.read_text())
    content["config"]["training"]["num_steps"] = 9
    file.write_text(json.dumps(content))
    with pytest.raises(InputError, match="has completed 4 of its 9 updates; finish its training first"):
        trainer.train(tiny.config(tiny_data, "cd", tmp_path / "teacher"), tmp_path / "run")


def test_a_student_keeps_its_teacher_through_all_its_starts(handed, tiny_data, teacher, tmp_path):
    """By whatever path; and refuses any other, such as one that was trained again in the same place."""
    shutil.copytree(teacher, tmp_path / "teacher")
    for path in (tmp_path / "teacher", tmp_path / "run" / ".." / "teacher", teacher):
        assert trainer.train(tiny.config(tiny_data, "cd", path), tmp_path / "run")
        assert handed.pop("teacher_params") is not None
    shutil.rmtree(tmp_path / "teacher/checkpoints/4")
    (tmp_path / "teacher/checkpoints/2").rename(tmp_path / "teacher/checkpoints/4")
    with pytest.raises(InputError, match="teacher contains another checkpoint than the one that the run in"):
        trainer.train(tiny.config(tiny_data, "cd", tmp_path / "teacher"), tmp_path / "run")
    assert "teacher_params" not in handed


def test_a_student_starts_from_the_averaged_teacher(tiny_data, teacher, tmp_path):
    config = tiny.config(tiny_data, "cd", teacher)
    config.training.num_steps = 1
    config.optimizer.learning_rate = 0.0
    assert trainer.train(config, tmp_path / "student")
    assert_equal_trees(params_of(tmp_path / "student"), params_of(teacher, "ema"))


@pytest.fixture(scope="module")
def staged(tiny_data, teacher, tmp_path_factory):
    """workdir of a progressive distillation 4 -> 2 -> 1 of two updates a stage."""
    workdir = tmp_path_factory.mktemp("staged") / "progressive"
    assert trainer.train(progressive(tiny_data, teacher), workdir)
    return workdir


def progressive(tiny_data, teacher):
    config = tiny.config(tiny_data, "progressive", teacher)
    config.progressive.update(stages=(4, 2, 1), xvar_frac=0.5, later_xvar_frac=0.25)
    config.training.num_steps = 2
    return config


def test_every_stage_is_a_run_of_its_own(staged, teacher):
    """Started from the last, sampled with its own step count; the adjustment only in the first."""
    first, second = (load_run(staged / name) for name in ("steps_2", "steps_1"))
    assert (first.student_steps, second.student_steps) == ((2,), (1,))
    assert first.sampling().steps == 2
    assert first.config.teacher_checkpoint == str(teacher)
    assert second.config.teacher_checkpoint == str(staged / "steps_2")
    assert first.config.progressive.stages == (4, 2) and second.config.progressive.stages == (2, 1)
    assert first.config.progressive.xvar_frac == 0.5 and second.config.progressive.xvar_frac == 0.25


def test_a_stage_starts_from_the_last_one(tiny_data, teacher, staged, tmp_path):
    config = progressive(tiny_data, staged / "steps_2")
    config.progressive.stages = (2, 1)
    with pytest.raises(InputError, match=r"includes aDDIM's adjustment; set it to later_xvar_frac=0.25"):
        trainer.train(config, tmp_path / "student")
    config.progressive.xvar_frac = 0.25
    config.training.num_steps = 1
    config.optimizer.learning_rate = 0.0
    assert trainer.train(config, tmp_path / "student")
    assert_equal_trees(params_of(tmp_path / "student"), params_of(staged / "steps_2", "ema"))


def test_stages_go_on_inside_a_stage(tiny_data, teacher, staged, tmp_path, capsys):
    """The first stage finished and the second half done: only what is left is done, with the same result."""
    config = progressive(tiny_data, teacher)
    shutil.copytree(staged / "steps_2", tmp_path / "steps_2")
    config.progressive.stages = (2, 1)
    config.progressive.xvar_frac = 0.25
    config.teacher_checkpoint = str(tmp_path / "steps_2")
    config.training.num_steps = 1
    assert trainer.train(config, tmp_path / "steps_1")
    capsys.readouterr()
    assert trainer.train(progressive(tiny_data, teacher), tmp_path)
    printed = capsys.readouterr().out
    assert f"{tmp_path / 'steps_2'} is finished" in printed and "continuing at update 1" in printed
    assert_equal_trees(params_of(tmp_path / "steps_1"), params_of(staged / "steps_1"))


def test_an_interrupted_stage_is_the_last(tiny_data, teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "_train_run", lambda config, workdir, profile: False)
    assert not trainer.train(progressive(tiny_data, teacher), tmp_path)


def test_all_stages_are_asked_before_the_first_is_trained(
    tiny_data, teacher, staged, tmp_path, no_compilation
):
    shutil.copytree(staged / "steps_1", tmp_path / "steps_1")
    config = progressive(tiny_data, teacher)
    with pytest.raises(InputError, match="steps_1 contains a run with config"):
        trainer.train(config, tmp_path)
    assert not (tmp_path / "steps_2").exists()
    with pytest.raises(InputError, match="contains a run, not its stages"):
        trainer.train(progressive(tiny_data, teacher), teacher)


def test_the_next_stage_trains_on_the_same_images(teacher, staged, tmp_path, no_compilation):
    shutil.copytree(staged / "steps_2", tmp_path / "steps_2")
    config = progressive(tiny.prepare_folder(tmp_path / "other", count=44), teacher)
    config.progressive.update(stages=(4, 2, 1), xvar_frac=0.5, later_xvar_frac=0.25)
    with pytest.raises(InputError, match=r"steps_2, the stage before, was trained on other images"):
        trainer._train_run(
            stage_configs(validation.validate(config), tmp_path)[1][1], tmp_path / "steps_1", None
        )


def test_stages_are_no_run_to_sample(staged):
    with pytest.raises(InputError, match=r"contains the stages steps_1, steps_2 of a run; choose one"):
        load_run(staged)


UNSTAGED = {"progressive__stages": ()}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"progressive__stages": (4, 3)}, "each stage must halve the steps, 4 -> 2"),
        ({"progressive__stages": (4,)}, "needs the steps of the teacher and of one or more"),
        ({"objective": "tract", "tract__stages": (4, 3)} | UNSTAGED, "4 steps can't be grouped into 3"),
        ({"objective": "tract", "tract__stages": (2, 4)} | UNSTAGED, "2 steps can't be grouped into 4"),
        ({"consistency__teacher_guidance": 1.0}, "teacher_guidance=1.0 has no effect on progressive"),
        (
            {"objective": "guidance", "guidance__teacher_guidance": 1.0} | UNSTAGED,
            "was not trained for 'any class'; train a diffusion model",
        ),
        ({"objective": "guidance"} | UNSTAGED, "there is no guidance to distil"),
        ({"objective": "cd", "consistency__student_steps": (2,)}, "stages=(4, 2) has no effect on cd"),
        (
            {"objective": "ct", "consistency__student_steps": (2,), "consistency__teacher_guidance": 1.0}
            | UNSTAGED,
            "config.consistency.teacher_guidance=1.0 has no effect on ct",
        ),
        ({"consistency__student_steps": (2,)}, "student_steps=(2,) has no effect on progressive"),
        ({"sampling__guidance": 1.0}, "config.sampling.guidance=1.0 needs a diffusion model that was also"),
        ({"diffusion__levels": (8,)}, "config.diffusion.levels=(8,) has no effect on progressive"),
    ],
)
def test_bad_stages_and_guidance(fields, message, tiny_data, teacher, tmp_path, no_compilation):
    config = changed(tiny.config(tiny_data, "progressive", teacher), **fields)
    with pytest.raises(InputError, match=re.escape(message)):
        trainer.train(config, tmp_path / "run")


def test_a_student_teaches_only_the_next_stage(tiny_data, staged, tmp_path, no_compilation):
    config = progressive(tiny_data, staged / "steps_2")
    with pytest.raises(InputError, match=r"is a student of 2 steps, but .* needs a teacher of 4"):
        trainer.train(config, tmp_path / "run")
    for objective in ("cd", "tract"):
        with pytest.raises(InputError, match="is a progressive student; use the workdir of a diffusion"):
            trainer.train(tiny.config(tiny_data, objective, staged / "steps_2"), tmp_path / "run")


def test_guidance_is_distilled_and_then_distilled_from(tiny_data, tmp_path):
    """The chain of the paper's text to image: teacher with label dropout, guidance, then CD of that."""
    config = tiny.config(tiny_data)
    config.training.num_steps = 1
    config.diffusion.label_dropout = 0.5
    assert trainer.train(config, tmp_path / "teacher")
    config = tiny.config(tiny_data, "guidance", tmp_path / "teacher")
    config.training.num_steps = 1
    config.guidance.teacher_guidance = 1.0
    assert trainer.train(config, tmp_path / "guided")
    guided = load_run(tmp_path / "guided")
    assert guided.student_steps == ()
    config = tiny.config(tiny_data, "cd", tmp_path / "guided")
    config.training.num_steps = 1
    assert trainer.train(config, tmp_path / "student")
    config = tiny.config(tiny_data, "cd", tmp_path / "teacher")
    config.training.num_steps = 1
    config.consistency.teacher_guidance = 1.0
    assert trainer.train(config, tmp_path / "guided_student")


def test_a_teacher_is_never_saved_again(tiny_data, teacher, tmp_path):
    config = tiny.config(tiny_data, "cd", teacher)
    config.training.num_steps = 1
    assert trainer.train(config, tmp_path / "student")
    items = {path.name for path in (tmp_path / "student/checkpoints/1").iterdir() if path.is_dir()}
    assert items == {"params", "ema_params", "opt_state", "step", "data"}


def test_a_target_network_is_saved_where_there_is_one(tiny_data, teacher, tmp_path):
    config = tiny.config(tiny_data, "cd", teacher)
    config.consistency.target_network = "ema"
    config.training.num_steps = 1
    assert trainer.train(config, tmp_path / "student")
    items = {path.name for path in (tmp_path / "student/checkpoints/1").iterdir() if path.is_dir()}
    assert items == {"params", "ema_params", "target_params", "opt_state", "step", "data"}


def test_only_the_newest_checkpoints_are_kept(tiny_data, tmp_path):
    config = tiny.config(tiny_data)
    config.training.update(num_steps=5, checkpoint_every_steps=1, keep_checkpoints=2)
    assert trainer.train(config, tmp_path / "run")
    assert checkpoint_steps(tmp_path / "run") == [4, 5]


def test_a_grid_is_drawn_for_people(tiny_data, tmp_path):
    config = tiny.config(tiny_data)
    config.training.sample_every_steps = 4
    assert trainer.train(config, tmp_path / "run")
    assert (tmp_path / "run/samples/step_0000004.png").stat().st_size > 1000
    assert list((tmp_path / "run").glob("events.out.tfevents.*"))


def test_a_non_finite_run_stops_and_keeps_its_last_good_checkpoint(tiny_data, tmp_path, monkeypatch):
    config = tiny.config(tiny_data)
    config.training.num_steps = 2
    assert trainer.train(config, tmp_path / "run")
    config.training.num_steps = 20
    adam = build.optimizer.adam
    # No config may have this learning rate.
    monkeypatch.setattr(
        build.optimizer,
        "adam",
        lambda settings, num_steps: adam(
            dataclasses.replace(settings, learning_rate=1e30), num_steps=num_steps
        ),
    )
    with pytest.raises(NonFiniteError, match=r"update \d+ is not finite.*the last good checkpoint is \d+"):
        trainer.train(config, tmp_path / "run")
    for parameters in ("raw", "ema"):
        leaves = jax.tree.leaves(params_of(tmp_path / "run", parameters))
        assert all(np.all(np.isfinite(leaf)) for leaf in leaves)


def test_a_run_goes_on_after_its_disk_was_full(tiny_data, teacher, tmp_path, monkeypatch):
    """What the line on a full disk says of checkpoints, see test_command_line, is so."""

    def full(self, state, data, *, step):
        if step == 4:
            raise OSError(errno.ENOSPC, "No space left on device", str(self.directory / "4"))
        save(self, state, data, step=step)

    save = Checkpoints.save
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", full)
        with pytest.raises(OSError, match="No space left on device"):
            trainer.train(tiny.config(tiny_data), tmp_path / "run")
    assert checkpoint_steps(tmp_path / "run") == [2]
    assert trainer.train(tiny.config(tiny_data), tmp_path / "run")
    assert_equal_trees(params_of(tmp_path / "run"), params_of(teacher))


@pytest.fixture(scope="module")
def made_up_teacher(tiny_data, tmp_path_factory):
    return tiny.made_up_teacher(tiny_data, tmp_path_factory.mktemp("made_up") / "teacher")


@pytest.fixture(scope="module")
def alone(tiny_data, made_up_teacher):
    """objective -> three updates on one device, computed once for all shapes."""
    return functools.cache(
        lambda objective: three_updates(objective, mesh_of(1, 1), tiny_data, made_up_teacher)
    )


def mesh_of(data, fsdp):
    devices = jax.devices()[: data * fsdp]
    return jax.make_mesh((data, fsdp), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2, devices=devices)


@pytest.fixture
def split(monkeypatch):
    """The tiny network's arrays are all small: as large ones are, they are split over fsdp here."""
    monkeypatch.setattr(sharding, "_SMALLEST_SHARDED", 64)


def assert_trained_alike(params, expected):
    # Sums over the batch in another order; three updates of 1e-3 each move a parameter by up to 3e-3.
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4)


@pytest.mark.multi_device
@pytest.mark.parametrize(
    ("objective", "shape", "gather"),
    # The whole run below is ct's of (8, 1).
    [
        ("diffusion", (8, 1), "all"),
        ("diffusion", (2, 4), "all"),
        ("cd", (8, 1), "all"),
        ("cd", (2, 4), "all"),
        ("cd", (2, 4), "blocks"),
        ("ct", (2, 4), "all"),
        ("scd", (2, 4), "blocks"),
        ("moments", (2, 4), "blocks"),
        ("moments instant", (2, 4), "all"),
    ],
)
def test_eight_devices_train_the_real_objectives_like_one(
    objective, shape, gather, tiny_data, made_up_teacher, alone, split
):
    losses, params = three_updates(objective, mesh_of(*shape), tiny_data, made_up_teacher, gather=gather)
    np.testing.assert_allclose(losses, alone(objective)[0], rtol=1e-4)
    assert_trained_alike(params, alone(objective)[1])


@pytest.mark.multi_device
def test_a_whole_run_on_eight_devices(tiny_data, made_up_teacher, alone, tmp_path):
    """From the checkpoint of one device, interrupted, to one that is read again."""
    config = three_updates_config("ct", tiny_data, made_up_teacher)
    for num_steps in (1, 3):
        config.training.num_steps = num_steps
        assert trainer.train(config, tmp_path / "run")
    assert_trained_alike(params_of(tmp_path / "run"), alone("ct")[1])


def three_updates_config(objective, tiny_data, teacher):
    objective, *instant = objective.split()
    config = tiny.two_stage_config(tiny_data, objective, None if objective == "diffusion" else teacher)
    config.moments.instant = bool(instant)
    # Adam's tiny epsilon would turn the rounding of a gradient that is zero (the bias of the keys' norm has
    # none, softmax is blind to it) into an update of full size.
    config.optimizer.update(learning_rate=1e-3, eps=1e-5)
    return config


def three_updates(objective, mesh, tiny_data, teacher, *, gather="all"):
    raw_config = three_updates_config(objective, tiny_data, teacher)
    raw_config.mesh.gather = gather
    config = validation.validate(raw_config)
    training = build.training(config, condition=Classes(2), mesh=mesh)
    assert mesh.shape["fsdp"] == 1 or any(
        not s.is_fully_replicated for s in jax.tree.leaves(training.shardings)
    )
    params = params_of(teacher)
    state, train_step = training.init_from(params), training.train_step()
    teacher_params = None
    if config.distils:
        teacher_params = jax.device_put(TeacherParams(params), training.teacher_shardings)
    batches = trainer.train_batches(config)
    losses = []
    for _ in range(3):
        batch = sharding.global_batch(mesh, next(batches))
        state, metrics = train_step(state, teacher_params, batch)
        losses.append(float(metrics["loss"]))
    return losses, jax.device_get(state.params)


# What the trainer hands to the loop.


class Handed(dict):
    """What was handed over, by name, in place of training; and an observer that does nothing."""

    def train(self, state, teacher_params, train_step, data, **others):
        self.update(state=state, teacher_params=teacher_params, data=data, **others)
        return True

    def observe(self, workdir, **settings):
        self.update(observer_workdir=workdir, **settings)
        return contextlib.nullcontext()

    def make_train_step(self, update, **others):
        self.update(vars(update) | others)
        return jax.jit(lambda *_: None)

    def claim(self, *arguments, needed_bytes, **others):
        self.update(needed_bytes=needed_bytes)
        return claim(*arguments, needed_bytes=needed_bytes, **others)


claim = workdirs.claim


@pytest.fixture
def handed(monkeypatch):
    result = Handed()
    monkeypatch.setattr(loop, "train", result.train)
    monkeypatch.setattr(step, "make_train_step", result.make_train_step)
    monkeypatch.setattr(observer, "RunObserver", result.observe)
    monkeypatch.setattr(workdirs, "claim", result.claim)
    return result


def test_settings_arrive_where_they_belong(handed, tiny_data, tmp_path):
    config = tiny.config(tiny_data)
    config.seed = 5
    config.optimizer.ema_decay = 0.75
    config.training.update(
        num_steps=70, batch_size=8, log_every_steps=11, checkpoint_every_steps=12, sample_every_steps=13
    )
    config.training.keep_checkpoints = 4
    jax.config.update("jax_compilation_cache_dir", None)
    trainer.train(config, tmp_path / "run")
    assert handed["settings"] == validation.validate(config).training
    expected = {"first_step": 0, "num_steps": 70, "batch_size": 8, "log_every_steps": 11}
    assert handed.items() >= (expected | {"seed": 5, "ema_decay": 0.75}).items()
    assert handed["observer_workdir"] == tmp_path / "run"
    # The checkpoints that are kept, and one that is written before the oldest goes.
    assert handed["needed_bytes"] == 5 * sum(leaf.nbytes for leaf in jax.tree.leaves(handed["state"]))
    assert jax.config.jax_compilation_cache_dir == os.environ["MCM_COMPILATION_CACHE"]


def test_a_fresh_run_starts_where_its_seed_says(handed, tiny_data, tmp_path):
    config = tiny.config(tiny_data)
    config.seed = 5
    trainer.train(config, tmp_path / "run")
    validated = validation.validate(config)
    network = build.network(validated, condition=Classes(2))
    expected = jax.jit(network.init)(build.init_key(5))
    assert_equal_trees(handed["state"].params, expected)
    assert_equal_trees(handed["state"].ema_params, expected)
    assert int(handed["state"].step) == 0 and handed["teacher_params"] is None


@pytest.mark.parametrize("flip", [False, True])
def test_the_batches_are_those_of_the_training_images_and_the_seed(flip, handed, tiny_data, tmp_path):
    config = tiny.config(tiny_data)
    config.seed = 5
    config.data.horizontal_flip = flip
    trainer.train(config, tmp_path / "run")
    source = pipeline.open_split(data_dir=tiny_data, dataset="folder/tiny", resolution=8, split="train")
    expected = pipeline.train_batches(source, batch_size=16, seed=5, flip=flip)
    for _ in range(3):
        assert_equal_trees(next(handed["data"]), next(expected))


def test_corrupt_training_images_are_skipped_up_to_the_budget(tiny_data, tmp_path, capsys):
    shutil.copytree(tiny_data, tmp_path / "data")
    (shard,) = (tmp_path / "data").rglob("folder-train*")
    content = bytearray(shard.read_bytes())
    content[1000] ^= 1  # The first 5000 bytes are those of the records.
    shard.write_bytes(content)
    config = tiny.config(tmp_path / "data")
    assert next(trainer.train_batches(validation.validate(config)))["image"].shape == (16, 8, 8, 3)
    assert "(1 of at most 10)" in capsys.readouterr().err
    config.data.max_corrupt_records = 0
    with pytest.raises(
        InputError, match=r"is corrupt: .* remake the data set with: python -m mcm_jax.prepare"
    ):
        trainer.train_batches(validation.validate(config))


@pytest.mark.parametrize("objective", ["cd", "ct"])
def test_a_teacher_stays_with_its_student_only_where_it_teaches(
    objective, handed, tiny_data, teacher, tmp_path
):
    trainer.train(tiny.config(tiny_data, objective, teacher), tmp_path / "run")
    averaged = params_of(teacher, "ema")
    assert_equal_trees(handed["state"].params, averaged)
    if objective == "cd":
        assert_equal_trees(handed["teacher_params"], TeacherParams(averaged))
        assert handed["teacher_sharding"] == TeacherParams(handed["state_sharding"].params)
    else:
        assert handed["teacher_params"] is None and handed["teacher_sharding"] is None


def test_a_continued_run_is_told_where_it_is(handed, tiny_data, teacher, tmp_path):
    shutil.copytree(teacher, tmp_path / "run")
    config = tiny.config(tiny_data)
    config.training.num_steps = 9
    trainer.train(config, tmp_path / "run")
    assert handed["first_step"] == int(handed["state"].step) == 4
    assert_equal_trees(handed["state"].params, params_of(teacher))


def test_every_grid_is_of_the_parameters_given(handed, tiny_data, teacher, tmp_path):
    trainer.train(tiny.config(tiny_data), tmp_path / "run")
    grids = [handed["draw"](params_of(teacher, parameters)) for parameters in ("raw", "ema")]
    expected = [load_run(teacher, parameters=name).sample(64)[0] for name in ("raw", "ema")]
    for grid, images in zip(grids, expected, strict=True):
        np.testing.assert_array_equal(grid, image_grid(images, 8, scale=6))
    assert not np.array_equal(*grids)


def test_other_images_than_before(handed, tiny_data, teacher, tmp_path):
    shutil.copytree(teacher, tmp_path / "run")
    tiny.prepare_folder(tmp_path, count=44)
    config = tiny.config(tmp_path / "data")
    config.training.num_steps = 9
    with pytest.raises(InputError, match="was trained on other images"):
        trainer.train(config, tmp_path / "run")
    assert "state" not in handed


@pytest.mark.multi_device
def test_a_batch_that_can_not_be_divided_is_told_first(handed, tiny_data, tmp_path):
    config = tiny.config(tiny_data)
    config.training.batch_size = 12
    with pytest.raises(InputError, match=r"batch_size=12 can't be divided over 8 devices"):
        trainer.train(config, tmp_path / "run")
    assert not handed and not (tmp_path / "run").exists()


# Programs, killed and interrupted.


def start_training(tiny_data, workdir, num_steps):
    """(a teacher's training as a process of its own, the file of its output)."""
    code = f"""
import sys
from pathlib import Path
from mcm_jax.runs import trainer
from tests import tiny
config = tiny.config(Path({str(tiny_data)!r}))
config.training.update(num_steps={num_steps}, checkpoint_every_steps=10)
sys.exit(0 if trainer.train(config, Path({str(workdir)!r})) else 130)
"""
    output = workdir.with_name(f"{workdir.name}-{time.monotonic_ns()}.txt")
    return forks.Process(code, out=output, err=output), output


def wait_for(pattern, process, output):
    """Until the process has written a line that starts so."""
    while not (output.exists() and re.search(pattern, output.read_text(), re.MULTILINE)):
        assert process.poll() is None, output.read_text()
        time.sleep(0.02)


def test_a_killed_run_ends_as_if_it_had_not_been(tiny_data, tmp_path):
    num_steps = 60
    whole, output = start_training(tiny_data, tmp_path / "whole", num_steps)
    assert whole.wait() == 0, output.read_text()
    rng = np.random.default_rng()
    print("seed of the moments:", rng.bit_generator.seed_seq.entropy)
    for _ in range(2):
        process, output = start_training(tiny_data, tmp_path / "killed", num_steps)
        wait_for(r"^step \d+/", process, output)
        time.sleep(rng.uniform(0.0, 1.0))
        process.kill()
        process.wait()
    last, output = start_training(tiny_data, tmp_path / "killed", num_steps)
    assert last.wait() == 0, output.read_text()
    for parameters in ("raw", "ema"):
        assert_equal_trees(*(params_of(tmp_path / name, parameters) for name in ("whole", "killed")))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_saves_first(number, tiny_data, tmp_path):
    process, output = start_training(tiny_data, tmp_path / "run", 100_000)
    wait_for(r"^step 2\d/", process, output)
    process.send_signal(number)
    assert process.wait(timeout=120) == 130, output.read_text()
    assert checkpoint_steps(tmp_path / "run")[-1] >= 20


# Bad input, before anything is compiled.


@pytest.fixture
def no_compilation(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("something was compiled before the input was checked")

    monkeypatch.setattr(step, "make_train_step", refuse)
    monkeypatch.setattr(Checkpoints, "save", refuse)


def changed(config, **fields):
    with config.unlocked():
        for name, value in fields.items():
            section, _, field = name.rpartition("__")
            (config[section] if section else config)[field] = value
    return config


TWO_STAGES = {f"model__{name}": value for name, value in tiny.TWO_STAGES.items()}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"objective": "gan"},
            "config.objective='gan' must be one of diffusion, guidance, cd, ct, scd, sct, moments, ayf, "
            "meanflow, shortcut, progressive, tract",
        ),
        ({"model__width": 3}, "config.model.width is not a setting"),
        ({"model__widths": (8, 16)}, "config.model.widths=(8, 16) must have one entry"),
        ({"model__head_width": 5}, "config.model.head_width=5 does not divide"),
        ({"optimizer__learning_rate": float("nan")}, "learning_rate=nan must be finite"),
        ({"data__resolution": 7, **TWO_STAGES}, "config.data.resolution=7 can't be halved 1 times"),
        ({"data__resolution": 16}, "folder/tiny at resolution 16 is not in"),
        ({"data__dataset": "folder/none"}, "python -m mcm_jax.prepare --dataset=folder"),
        ({"diffusion__levels": (8, 3)}, "3 does not divide config.data.resolution=8"),
        ({"mesh__data": 3}, "data=3 x fsdp=1 is not the 1 devices"),
        ({"teacher_checkpoint": "x"}, "has no effect on a diffusion model"),
        ({"objective": "cd"}, "config.teacher_checkpoint is not set"),
        (
            {"objective": "cd", "teacher_checkpoint": "/none", "consistency__student_steps": (2,)},
            "/none is not a run",
        ),
    ],
)
def test_bad_config(fields, message, tiny_data, tmp_path, no_compilation):
    config = changed(tiny.config(tiny_data), **fields)
    with pytest.raises(InputError, match=re.escape(message)) as error:
        trainer.train(config, tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model__embedding_width": 32}, "its model.embedding_width is 16, this run's is 32"),
        ({"schedule__noise_resolution_low": 4}, "its schedule.noise_resolution_low is None, this run's is 4"),
        ({"consistency__student_steps": ()}, "config.consistency.student_steps is not set"),
        ({"consistency__student_steps": (2, 4, 2)}, "student_steps=(2, 4, 2): a number appears twice"),
        ({"consistency__steps_power": 1.0}, "steps_power=1.0 has no effect on a student of one number"),
        ({"model__blocks": (3,)}, "its model.blocks is (1,), this run's is (3,)"),
    ],
)
def test_a_teacher_that_does_not_fit(fields, message, tiny_data, teacher, tmp_path, no_compilation):
    config = changed(tiny.config(tiny_data, "cd", teacher), **fields)
    with pytest.raises(InputError, match=re.escape(message)):
        trainer.train(config, tmp_path / "run")


def checked(tiny_data, teacher, class_names=("even", "odd"), **fields):
    config = validation.validate(changed(tiny.config(tiny_data, "cd", teacher), **fields))
    described = pipeline.describe(data_dir=tiny_data, dataset="folder/tiny", resolution=8)
    dataset = dataclasses.replace(described, class_names=class_names)
    trainer.check_teacher(config, dataset)


def test_a_teacher_of_other_classes(tiny_data, teacher):
    for class_names in (("even", "prime"), ("even", "odd", "prime"), ("odd", "even")):
        with pytest.raises(InputError, match="use its data set"):
            checked(tiny_data, teacher, class_names)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"model__dropouts": (0.2,)},
        {"model__dtype": "bfloat16"},
        {"model__remat": "full", "model__saved": ("qkv",)},
        {"model__unroll": False},
    ],
)
def test_what_parameters_do_not_depend_on_may_differ_from_the_teacher(fields, tiny_data, teacher):
    checked(tiny_data, teacher, **fields)


def test_a_teacher_of_another_resolution(teacher, tiny_data, tmp_path, no_compilation):
    tiny.prepare_folder(tmp_path, resolution=16)
    config = changed(tiny.config(tmp_path / "data", "cd", teacher), data__resolution=16)
    with pytest.raises(InputError, match="trained on images of 8x8 pixels, not 16x16; use its resolution"):
        trainer.train(config, tmp_path / "run")


def test_a_student_is_no_teacher(tiny_data, teacher, tmp_path, monkeypatch):
    config = tiny.config(tiny_data, "ct", teacher)
    config.training.num_steps = 1
    assert trainer.train(config, tmp_path / "student")
    with pytest.raises(InputError, match="is a ct student"):
        trainer.train(tiny.config(tiny_data, "cd", tmp_path / "student"), tmp_path / "run")


def test_another_runs_workdir(tiny_data, teacher, no_compilation):
    config = changed(tiny.config(tiny_data), optimizer__learning_rate=0.5)
    with pytest.raises(
        InputError, match=r"contains a run with config.optimizer.learning_rate=0.01, now it is 0.5"
    ):
        trainer.train(config, teacher)
    assert checkpoint_steps(teacher) == [2, 4]


def test_a_workdir_that_can_not_be_made(tiny_data, tmp_path, no_compilation):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"--workdir=.*cannot write there .*choose another directory"):
        trainer.train(tiny.config(tiny_data), tmp_path / "file" / "run")


def test_a_full_workdir(tiny_data, tmp_path, monkeypatch, no_compilation):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(InputError, match="its checkpoints need"):
        trainer.train(tiny.config(tiny_data), tmp_path / "run")


def test_a_run_with_a_damaged_checkpoint_ends_as_if_it_had_not_been(tiny_data, tmp_path, capsys):
    """It goes on from the one before, although the damaged one claims that the run is finished."""
    config = tiny.config(tiny_data)
    assert trainer.train(config, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "damaged")
    (tmp_path / "damaged/checkpoints/4").rename(tmp_path / "damaged/checkpoints/7")
    capsys.readouterr()
    assert trainer.train(config, tmp_path / "damaged")
    output = capsys.readouterr().out
    assert "checkpoint 7 is damaged (it was saved as 4)" in output and "continuing at update 2" in output
    assert checkpoint_steps(tmp_path / "damaged") == [2, 4]
    for parameters in ("raw", "ema"):
        assert_equal_trees(*(params_of(tmp_path / name, parameters) for name in ("whole", "damaged")))


def test_a_run_whose_only_checkpoint_is_damaged_does_not_start_anew(tiny_data, tmp_path):
    config = tiny.config(tiny_data)
    config.training.checkpoint_every_steps = 10
    assert trainer.train(config, tmp_path)
    (tmp_path / "checkpoints/4/step/metadata").write_text("")
    with pytest.raises(InputError, match=r"no checkpoint under .* can be restored"):
        trainer.train(config, tmp_path)
    assert checkpoint_steps(tmp_path) == [4]


def test_a_directory_in_use_is_refused(tiny_data, tmp_path):
    """Until that training ends, even by SIGKILL; the message says which it is."""
    process, output = start_training(tiny_data, tmp_path / "run", 100_000)
    wait_for(r"^step \d+/", process, output)
    record = (tmp_path / "run/run.json").read_text()
    config = tiny.config(tiny_data)
    config.training.update(num_steps=100_000, checkpoint_every_steps=10)
    with pytest.raises(InputError, match=rf"run is in use by process {process.pid} on .* since 20.*; stop"):
        trainer.train(config, tmp_path / "run")
    assert process.poll() is None and (tmp_path / "run/run.json").read_text() == record
    process.kill()
    process.wait()
    run = workdirs.read(tmp_path / "run")
    with workdirs.claim(tmp_path / "run", run, existing=run, needed_bytes=0):
        pass


def test_of_two_that_start_at_once_the_later_is_refused(tiny_data, tmp_path):
    """Even if it looked for a run before the other one wrote its own."""
    dataset = pipeline.describe(data_dir=tiny_data, dataset="folder/tiny", resolution=8)
    run = workdirs.RunRecord(config=validation.validate(tiny.config(tiny_data)), dataset=dataset)
    with workdirs.claim(tmp_path, run, existing=None, needed_bytes=0):
        with pytest.raises(InputError, match="is in use by process"):
            workdirs.claim(tmp_path, run, existing=None, needed_bytes=0).__enter__()
    with pytest.raises(InputError, match="another process has just started a run there"):
        workdirs.claim(tmp_path, run, existing=None, needed_bytes=0).__enter__()
