"""Guidance by another run: a worse model of the same images."""

import json
import re
import shutil

import jax
import numpy as np
import pytest

from mcm_jax.runs import trainer
from mcm_jax.runs.run import load_run
from mcm_jax.system.errors import InputError
from mcm_jax.training import loop
from tests import tiny


@pytest.fixture(scope="module")
def guide(tiny_data, tmp_path_factory):
    """A run with another network than `teacher` has."""
    return tiny.made_up_teacher(tiny_data, tmp_path_factory.mktemp("runs") / "guide")


def student_config(data_dir, teacher, guide, *, guidance=1.0):
    config = tiny.config(data_dir, "cd", teacher)
    config.guide_checkpoint = None if guide is None else str(guide)
    config.consistency.teacher_guidance = guidance
    return config


def test_a_student_is_trained_to_its_end(tiny_data, teacher, guide, tmp_path):
    config = student_config(tiny_data, teacher, guide)
    config.training.num_steps = 1
    assert trainer.train(config, tmp_path / "run")
    recorded = json.loads((tmp_path / "run/run.json").read_text())
    assert recorded["guide"] is not None and recorded["guide"] != recorded["teacher"]
    assert load_run(tmp_path / "run").sample(2)[0].shape == (2, 8, 8, 3)


def test_both_networks_reach_the_train_step(monkeypatch, tiny_data, teacher, guide, tmp_path):
    """Their losses differ, and the guide's parameters are those of its own run."""
    handed = {}

    def train(state, teacher_params, train_step, batches, *, mesh, **_):
        batch = jax.tree.map(jax.numpy.asarray, next(batches))
        handed["loss"] = float(train_step(state, teacher_params, batch)[1]["loss"])
        handed["teacher"], handed["guide"] = jax.device_get(teacher_params)
        return True

    monkeypatch.setattr(loop, "train", train)
    losses = []
    for name, config in {
        "guided": student_config(tiny_data, teacher, guide),
        "by itself": student_config(tiny_data, teacher, teacher),
        "unguided": student_config(tiny_data, teacher, None, guidance=0.0),
    }.items():
        trainer.train(config, tmp_path / name)
        losses.append(handed["loss"])
        expected = {"guided": guide, "by itself": teacher, "unguided": None}[name]
        if expected is None:
            assert handed["guide"] is None
        else:
            jax.tree.map(np.testing.assert_array_equal, handed["guide"], load_run(expected).params)
        jax.tree.map(np.testing.assert_array_equal, handed["teacher"], load_run(teacher).params)
    # A model that is guided by itself is not guided: x + g (x - x) = x.
    assert losses[1] == pytest.approx(losses[2], rel=1e-5)
    assert losses[0] != pytest.approx(losses[2], rel=1e-3)


def test_a_student_keeps_its_guide(monkeypatch, tiny_data, teacher, guide, tmp_path):
    monkeypatch.setattr(loop, "train", lambda *_, **__: True)
    shutil.copytree(guide, tmp_path / "guide")
    for path in (tmp_path / "guide", guide):
        assert trainer.train(student_config(tiny_data, teacher, path), tmp_path / "run")
    with pytest.raises(
        InputError, match=r"config.guide_checkpoint=.*contains another checkpoint than the one"
    ):
        trainer.train(student_config(tiny_data, teacher, teacher), tmp_path / "run")
    with pytest.raises(InputError, match=r"contains a run with config.guide_checkpoint=.*, now it is None"):
        trainer.train(student_config(tiny_data, teacher, None), tmp_path / "run")


def changed(run, directory, section, **fields):
    """A copy of `run` whose record has other fields."""
    shutil.copytree(run, directory)
    record = json.loads((directory / "run.json").read_text())
    record[section].update(fields)
    (directory / "run.json").write_text(json.dumps(record))
    return directory


def test_unsuitable_guides_are_refused(tiny_data, teacher, guide, tmp_path):
    longer = json.loads((guide / "run.json").read_text())["config"]["training"] | {"num_steps": 9}
    unsuitable = {
        changed(
            guide, tmp_path / "unfinished", "config", training=longer
        ): "has completed 4 of its 9 updates",
        changed(guide, tmp_path / "size", "dataset", resolution=16): "images of 16x16 pixels, not 8x8",
        changed(guide, tmp_path / "student", "config", objective="cd", consistency={"student_steps": (2,)}): (
            "is a cd student; use the workdir of a diffusion model"
        ),
        changed(guide, tmp_path / "range", "config", schedule={"logsnr_max": 12.0}): (
            r"the guide was trained at log-SNRs from -15.0 to 12.0, but is needed from -15.0 to 15.0"
        ),
        tmp_path / "none": "is not a run",
    }
    for path, message in unsuitable.items():
        with pytest.raises(InputError, match=f"^{re.escape(f'config.guide_checkpoint={path}')}.*{message}"):
            trainer.train(student_config(tiny_data, teacher, path), tmp_path / "run")
    with pytest.raises(InputError, match=r"^config.guide_checkpoint=.* has no effect without guidance"):
        trainer.train(student_config(tiny_data, teacher, guide, guidance=0.0), tmp_path / "run")


def test_samples_are_guided_by_another_run(teacher, guide):
    plain = load_run(teacher)
    by_itself, by_guide = (plain.guided_by(load_run(path)) for path in (teacher, guide))
    expected, _ = plain.sample(6)
    unguided, _ = by_itself.sample(6, guidance=2.0)
    # Another program may round a pixel to the other side.
    assert np.abs(unguided.astype(int) - expected).max() <= 1
    guided, _ = by_guide.sample(6, guidance=2.0)
    assert np.abs(guided.astype(int) - expected).mean() > 1
    np.testing.assert_array_equal(by_guide.sample(6, guidance=0.0)[0], expected)
    settings = by_guide.sampling(guidance=2.0)
    assert settings.guide == guide.name
    assert settings.guide_checkpoint == f"{load_run(guide).checkpoint} ema"
    assert settings.label.endswith("(guided by guide)") and settings.network_calls == 8
    assert by_guide.sampling(guidance=0.0) == plain.sampling(guidance=0.0)


def test_the_licence_of_a_guide_is_recorded(monkeypatch, tiny_data, teacher, guide, tmp_path, capsys):
    monkeypatch.setattr(loop, "train", lambda *_, **__: True)
    published = {
        "kind": "edm2",
        "file": "xs.pkl",
        "sha256": "0",
        "source": "there",
        "licence": "non-commercial",
    }
    shutil.copytree(guide, tmp_path / "guide")
    record = json.loads((tmp_path / "guide/run.json").read_text()) | {"origin": published}
    (tmp_path / "guide/run.json").write_text(json.dumps(record))
    assert trainer.train(student_config(tiny_data, teacher, tmp_path / "guide"), tmp_path / "run")
    assert "its guide is xs.pkl from there: non-commercial" in capsys.readouterr().out
    recorded = json.loads((tmp_path / "run/run.json").read_text())
    assert recorded["guide_origin"] == published and recorded["origin"] is None
    by_guide = load_run(teacher).guided_by(load_run(tmp_path / "guide"))
    settings = by_guide.sampling(guidance=1.0)
    assert settings.guide == "xs.pkl"
    assert by_guide.guide_origin(settings).licence == "non-commercial"
    assert by_guide.guide_origin(by_guide.sampling(guidance=0.0)) is None


def test_runs_that_cannot_guide(teacher, guide, tmp_path):
    student = changed(
        guide, tmp_path / "student", "config", objective="cd", consistency={"student_steps": (2,)}
    )
    larger = changed(guide, tmp_path / "larger", "dataset", resolution=16)
    for guided, by, message in (
        (teacher, student, "student is a student of few steps"),
        (student, guide, "student is a student of few steps"),
        (teacher, larger, "larger was trained on folder/tiny at 16x16, which differs"),
    ):
        with pytest.raises(InputError, match=message):
            load_run(guided).guided_by(load_run(by))
    with pytest.raises(InputError, match="guide has no effect without guidance"):
        load_run(teacher).guided_by(load_run(guide)).sample(1)
