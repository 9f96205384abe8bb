"""Whole runs: continued, distilled, interrupted, and refused."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from mcm_jax import configuration, runs, trainer
from mcm_jax.errors import InputError
from mcm_jax.training import sharding, step
from mcm_jax.training.checkpoints import Checkpoints
from mcm_jax.training.loop import NonFiniteError
from tests import tiny


def params_of(workdir, parameters="raw"):
    return jax.device_get(runs.load_run(workdir, parameters=parameters).params)


def assert_equal_trees(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def checkpoint_steps(workdir):
    with Checkpoints(workdir) as checkpoints:
        return checkpoints.all_steps()


@pytest.mark.parametrize("objective", ["diffusion", "cd", "ct", "tract"])
def test_four_updates_are_two_and_two_more(objective, tiny_data, teacher, tmp_path):
    """Bit for bit: parameters, averages, optimizer, randomness and data go on where they were.

    TRACT's target network is an average of its own, saved with the rest.
    """
    config = tiny.config(tiny_data, objective, None if objective == "diffusion" else teacher)
    assert trainer.train(config, tmp_path / "whole")
    config.training.num_steps = 2
    assert trainer.train(config, tmp_path / "parts")
    config.training.num_steps = 4
    assert trainer.train(config, tmp_path / "parts")
    for parameters in ("raw", "ema"):
        whole, parts = (params_of(tmp_path / name, parameters) for name in ("whole", "parts"))
        assert_equal_trees(whole, parts)
    assert not np.array_equal(
        params_of(tmp_path / "whole")["conv_in"]["kernel"],
        params_of(tmp_path / "whole", "ema")["conv_in"]["kernel"],
    )


def test_a_finished_run_says_so(teacher, tiny_data, capsys):
    assert trainer.train(tiny.config(tiny_data), teacher)
    assert "is finished: all its 4 updates are done" in capsys.readouterr().out


def test_a_finished_run_needs_nothing_any_more(tiny_data, teacher, tmp_path, capsys):
    """Neither its data nor, for a student, its teacher."""
    shutil.copytree(teacher, tmp_path / "teacher")
    config = tiny.config(tiny_data, "ct", tmp_path / "teacher")
    config.training.num_steps = 1
    assert trainer.train(config, tmp_path / "student")
    shutil.rmtree(tmp_path / "teacher")
    config.data.data_dir = "/none"
    assert trainer.train(config, tmp_path / "student")
    assert "is finished: all its 1 updates are done" in capsys.readouterr().out


def test_settings_that_may_change_are_kept_as_they_are_now(tiny_data, tmp_path):
    config = tiny.config(tiny_data)
    config.training.num_steps = 1
    assert trainer.train(config, tmp_path / "run")
    config.training.num_steps = 2
    config.sampling.teacher_steps = 3
    assert trainer.train(config, tmp_path / "run")
    assert runs.load_run(tmp_path / "run").sampling_record()["steps"] == 3


def test_an_unfinished_teacher_is_none(tiny_data, teacher, tmp_path, no_compilation):
    shutil.copytree(teacher, tmp_path / "teacher")
    file = tmp_path / "teacher/run.json"
    content = json.loads(file.read_text())
    content["config"]["training"]["num_steps"] = 9
    file.write_text(json.dumps(content))
    with pytest.raises(InputError, match="has 4 of its 9 updates; finish the teacher first"):
        trainer.train(tiny.config(tiny_data, "cd", tmp_path / "teacher"), tmp_path / "run")


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
    config.consistency.update(stages=(4, 2, 1), xvar_frac=0.5, later_xvar_frac=0.25)
    config.training.num_steps = 2
    return config


def test_every_stage_is_a_run_of_its_own(staged, teacher):
    """Started from the last, sampled with its own step count; the adjustment only in the first."""
    first, second = (runs.load_run(staged / name) for name in ("steps_2", "steps_1"))
    assert (first.student_steps, second.student_steps) == (2, 1)
    assert first.sampling_record()["steps"] == 2
    assert first.config.teacher_checkpoint == str(teacher)
    assert second.config.teacher_checkpoint == str(staged / "steps_2")
    assert first.config.consistency.stages == (4, 2) and second.config.consistency.stages == (2, 1)
    assert first.config.consistency.xvar_frac == 0.5 and second.config.consistency.xvar_frac == 0.25


def test_a_stage_starts_from_the_last_one(tiny_data, teacher, staged, tmp_path):
    config = progressive(tiny_data, staged / "steps_2")
    config.consistency.stages = (2, 1)
    config.training.num_steps = 1
    config.optimizer.learning_rate = 0.0
    assert trainer.train(config, tmp_path / "student")
    assert_equal_trees(params_of(tmp_path / "student"), params_of(staged / "steps_2", "ema"))


def test_stages_go_on_inside_a_stage(tiny_data, teacher, staged, tmp_path, capsys):
    """The first stage finished and the second half done: only what is left is done, with the same result."""
    config = progressive(tiny_data, teacher)
    shutil.copytree(staged / "steps_2", tmp_path / "steps_2")
    config.consistency.stages = (2, 1)
    config.consistency.xvar_frac = 0.25
    config.teacher_checkpoint = str(tmp_path / "steps_2")
    config.training.num_steps = 1
    assert trainer.train(config, tmp_path / "steps_1")
    capsys.readouterr()
    assert trainer.train(progressive(tiny_data, teacher), tmp_path)
    printed = capsys.readouterr().out
    assert f"{tmp_path / 'steps_2'} is finished" in printed and "continuing at update 1" in printed
    assert_equal_trees(params_of(tmp_path / "steps_1"), params_of(staged / "steps_1"))


def test_an_interrupted_stage_is_the_last(tiny_data, teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "_train_run", lambda config, workdir: False)
    assert not trainer.train(progressive(tiny_data, teacher), tmp_path)


def test_stages_are_no_run_to_sample(staged):
    with pytest.raises(InputError, match=r"holds the stages steps_1, steps_2 of a run; name one"):
        runs.load_run(staged)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"consistency__stages": (4, 3)}, "progressive halves, 4 -> 2"),
        ({"consistency__stages": (4,)}, "needs the teacher's steps and those of one student"),
        ({"objective": "tract", "consistency__stages": (4, 3)}, "3 steps are no whole segments of 4"),
        ({"objective": "tract", "consistency__stages": (2, 4)}, "4 steps are no whole segments of 2"),
        ({"teacher_guidance": 1.0}, "config.teacher_guidance=1.0 means nothing to progressive"),
        ({"objective": "guidance", "teacher_guidance": 1.0}, "knows no 'any class'; train one with 0.1"),
        ({"diffusion__levels": (8, 3)}, "3 does not divide config.data.resolution=8"),
    ],
)
def test_bad_stages_and_guidance(fields, message, tiny_data, teacher, tmp_path, no_compilation):
    config = changed(tiny.config(tiny_data, "progressive", teacher), **fields)
    with pytest.raises(InputError, match=re.escape(message)):
        trainer.train(config, tmp_path / "run")


def test_a_student_teaches_only_the_next_stage(tiny_data, staged, tmp_path, no_compilation):
    config = progressive(tiny_data, staged / "steps_2")
    with pytest.raises(InputError, match=r"is a student of 2 steps and .* wants a teacher of 4"):
        trainer.train(config, tmp_path / "run")
    for objective in ("cd", "tract"):
        with pytest.raises(InputError, match="is a progressive student; name the workdir of a diffusion"):
            trainer.train(tiny.config(tiny_data, objective, staged / "steps_2"), tmp_path / "run")


def test_guidance_is_distilled_and_then_distilled_from(tiny_data, tmp_path):
    """The chain of the paper's text to image: teacher with label dropout, guidance, then CD of that."""
    config = tiny.config(tiny_data)
    config.training.num_steps = 1
    config.diffusion.label_dropout = 0.5
    assert trainer.train(config, tmp_path / "teacher")
    config = tiny.config(tiny_data, "guidance", tmp_path / "teacher")
    config.training.num_steps = 1
    config.teacher_guidance = 1.0
    assert trainer.train(config, tmp_path / "guided")
    guided = runs.load_run(tmp_path / "guided")
    assert guided.student_steps is None
    config = tiny.config(tiny_data, "cd", tmp_path / "guided")
    config.training.num_steps = 1
    assert trainer.train(config, tmp_path / "student")
    config = tiny.config(tiny_data, "cd", tmp_path / "teacher")
    config.training.num_steps = 1
    config.teacher_guidance = 1.0
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


def test_a_non_finite_run_stops_and_keeps_its_last_good_checkpoint(tiny_data, tmp_path):
    config = tiny.config(tiny_data)
    config.training.num_steps = 2
    assert trainer.train(config, tmp_path / "run")
    # Not the same run any more: written into its file, as only a mistake in the code could do it.
    config.training.num_steps = 20
    config.optimizer.learning_rate = 1e30
    file = tmp_path / "run/run.json"
    content = json.loads(file.read_text())
    content["config"]["optimizer"]["learning_rate"] = 1e30
    file.write_text(json.dumps(content))
    with pytest.raises(NonFiniteError, match=r"update \d+ is not finite.*the last good one is \d+"):
        trainer.train(config, tmp_path / "run")
    for parameters in ("raw", "ema"):
        leaves = jax.tree.leaves(params_of(tmp_path / "run", parameters))
        assert all(np.all(np.isfinite(leaf)) for leaf in leaves)


def test_a_disk_that_fills_leaves_the_checkpoints_and_the_run_goes_on(
    tiny_data, teacher, tmp_path, monkeypatch
):
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


@pytest.mark.multi_device
@pytest.mark.parametrize("shape", [(8, 1), (2, 4)])
@pytest.mark.parametrize("objective", ["diffusion", "cd", "ct"])
def test_eight_devices_train_the_real_objectives_like_one(objective, shape, tiny_data, teacher):
    results = []
    for data, fsdp in ((1, 1), shape):
        devices = jax.devices()[: data * fsdp]
        mesh = jax.make_mesh((data, fsdp), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2, devices=devices)
        results.append(three_updates(objective, mesh, tiny_data, teacher))
    # Sums over the batch in another order; three updates of 1e-3 each move a parameter by up to 3e-3.
    np.testing.assert_allclose(results[1][0], results[0][0], rtol=1e-4)
    for a, b in zip(*(jax.tree.leaves(params) for _, params in results), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4)


def three_updates(objective, mesh, tiny_data, teacher):
    config = tiny.config(tiny_data, objective, None if objective == "diffusion" else teacher)
    # Adam's tiny epsilon would turn the rounding of a gradient that is zero (the bias of the keys' norm has
    # none, softmax is blind to it) into an update of full size.
    config.optimizer.update(learning_rate=1e-3, eps=1e-5)
    config = configuration.validate(config)
    parts = trainer.build(config, num_classes=2, mesh=mesh)
    params = jax.device_get(runs.load_run(teacher).params)
    state, train_step = parts.init_from(params), parts.train_step()
    teacher_params = jax.device_put(params, parts.shardings.params) if objective == "cd" else None
    batches = trainer.train_batches(config)
    losses = []
    for _ in range(3):
        batch = sharding.global_batch(mesh, next(batches))
        state, metrics = train_step(state, teacher_params, batch)
        losses.append(float(metrics["loss"]))
    return losses, jax.device_get(state.params)


# Programs, killed and interrupted.


def start_training(tiny_data, workdir, num_steps):
    """A teacher's training as a process of its own, on one device."""
    code = f"""
import sys
from pathlib import Path
from mcm_jax import trainer
from tests import tiny
config = tiny.config(Path({str(tiny_data)!r}))
config.training.update(num_steps={num_steps}, checkpoint_every_steps=10)
sys.exit(0 if trainer.train(config, Path({str(workdir)!r})) else 130)
"""
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=environment,
        cwd=Path(__file__).parents[1],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
def test_a_killed_run_ends_as_if_it_had_not_been(tiny_data, tmp_path):
    num_steps = 120
    whole = start_training(tiny_data, tmp_path / "whole", num_steps)
    assert whole.wait(timeout=300) == 0, whole.stdout.read()
    rng = np.random.default_rng()
    print("seed of the moments:", rng.bit_generator.seed_seq.entropy)
    for _ in range(2):
        process = start_training(tiny_data, tmp_path / "killed", num_steps)
        for line in process.stdout:
            if re.match(r"step \d+/", line):
                break
        time.sleep(rng.uniform(0.0, 1.0))
        process.kill()
        process.wait()
    last = start_training(tiny_data, tmp_path / "killed", num_steps)
    output = last.stdout.read()
    assert last.wait(timeout=300) == 0, output
    for parameters in ("raw", "ema"):
        assert_equal_trees(*(params_of(tmp_path / name, parameters) for name in ("whole", "killed")))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_saves_first(number, tiny_data, tmp_path):
    process = start_training(tiny_data, tmp_path / "run", 100_000)
    for line in process.stdout:
        if re.match(r"step 2\d/", line):
            break
    process.send_signal(number)
    assert process.wait(timeout=120) == 130, process.stdout.read()
    process.stdout.read()
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


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"objective": "gan"},
            "config.objective='gan' must be one of diffusion, cd, ct, tract, progressive, guidance",
        ),
        ({"model__width": 3}, "config.model.width is not a setting"),
        ({"model__widths": (8,)}, "config.model.widths=(8,) has not one entry"),
        ({"model__head_width": 5}, "config.model.head_width=5 does not divide"),
        ({"optimizer__learning_rate": float("nan")}, "learning_rate=nan must be at least 0"),
        ({"data__resolution": 7}, "config.data.resolution=7 can't be halved 1 times"),
        ({"data__resolution": 16}, "folder/tiny at resolution 16 is not in"),
        ({"data__dataset": "folder/none"}, "python -m mcm_jax.prepare --dataset=folder"),
        ({"mesh__fsdp": 3}, "data=0 x fsdp=3 is not the 1 devices"),
        ({"teacher_checkpoint": "x"}, "has no meaning for a diffusion teacher"),
        ({"objective": "cd"}, "config.teacher_checkpoint is not set"),
        (
            {"objective": "cd", "teacher_checkpoint": "/none", "consistency__student_steps": 2},
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
        ({"model__embedding_width": 32}, "its embedding_width is 16, this run's 32"),
        ({"schedule__noise_resolution_low": 4}, "its noise_resolution_low is None, this run's 4"),
        ({"consistency__student_steps": None}, "config.consistency.student_steps is not set"),
        ({"model__blocks": (1, 3)}, "its stages is"),
    ],
)
def test_a_teacher_that_does_not_fit(fields, message, tiny_data, teacher, tmp_path, no_compilation):
    config = changed(tiny.config(tiny_data, "cd", teacher), **fields)
    with pytest.raises(InputError, match=re.escape(message)):
        trainer.train(config, tmp_path / "run")


def test_a_teacher_of_another_resolution(teacher, tiny_data, tmp_path, no_compilation):
    tiny.prepare_folder(tmp_path, resolution=16)
    config = changed(tiny.config(tmp_path / "data", "cd", teacher), data__resolution=16)
    with pytest.raises(InputError, match="its resolution is 8, this run's 16"):
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
        InputError, match=r"holds a run with config.optimizer.learning_rate=0.01, now it is 0.5"
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
