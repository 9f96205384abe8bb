"""What a run's directory says: whose it is, and whether another run may use it."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest

from mcm_jax.config import validation
from mcm_jax.data.layout import DatasetInfo
from mcm_jax.records import RUN_FILE
from mcm_jax.runs import workdirs
from mcm_jax.runs.workdirs import RunRecord
from mcm_jax.system.errors import InputError
from tests import tiny
from tests.limits import refusal

DATASET = DatasetInfo(
    dataset="folder/tiny",
    resolution=8,
    class_names=("even", "odd"),
    num_examples={"train": 3, "test": 1},
    class_counts={"train": (2, 1), "test": (1, 0)},
    fingerprints={"train": "a" * 64, "test": "b" * 64},
    preprocessing="cut",
    source="files",
    path=Path("data/folder/tiny_8/1.0.0"),
)


def config(**changes):
    """objective and teacher, and other settings as section__name."""
    raw = tiny.config(Path("data"), changes.pop("objective", "diffusion"), changes.pop("teacher", None))
    for name, value in changes.items():
        section, _, field = name.rpartition("__")
        (raw[section] if section else raw)[field] = value
    return validation.validate(raw)


def start(workdir, settings=None, dataset=DATASET, needed_bytes=0):
    """As trainer.train does, in a later process."""
    settings = settings or config()
    existing = workdirs.existing_run(workdir, settings)
    run = RunRecord(
        config=settings, dataset=dataset, teacher=workdirs.newest_identity(settings.teacher_checkpoint)
    )
    with workdirs.claim(workdir, run, existing=existing, needed_bytes=needed_bytes):
        return existing


def test_it_reads_what_it_wrote(tmp_path):
    assert start(tmp_path / "new" / "run") is None
    assert workdirs.read(tmp_path / "new" / "run") == RunRecord(config=config(), dataset=DATASET)
    assert {path.name for path in (tmp_path / "new" / "run").iterdir()} == {"run.json", "lock"}
    assert start(tmp_path / "new" / "run") == RunRecord(config=config(), dataset=DATASET)


FREE = {
    "data__data_dir": "elsewhere",
    "data__in_memory_gb": 2.0,
    "data__max_corrupt_records": 0,
    "mesh__fsdp": 2,
    "mesh__data": 4,
    "sampling__sampler": "ddim",
    "sampling__teacher_steps": 7,
    "sampling__label_rule": "train_frequency",
    "sampling__batch_per_device": 1,
    "training__log_every_steps": 3,
    "training__checkpoint_every_steps": 3,
    "training__keep_checkpoints": 3,
    "training__sample_every_steps": 3,
    "training__num_steps": 99,
}


@pytest.mark.parametrize("name", FREE)
def test_what_does_not_change_what_is_learned_may_change_and_is_kept(name, tmp_path):
    start(tmp_path, config())
    changed = config(**{name: FREE[name]})
    assert changed != config()
    start(tmp_path, changed)
    assert workdirs.read(tmp_path).config == changed


NOT_FREE = {
    "seed": 1,
    "optimizer__learning_rate": 0.5,
    "training__batch_size": 32,
    "model__widths": (24,),
    "schedule__noise_resolution_low": 4,
    "data__horizontal_flip": False,
}


@pytest.mark.parametrize("name", NOT_FREE)
def test_anything_else_is_another_run(name, tmp_path):
    start(tmp_path)
    changed = config(**{name: NOT_FREE[name]})
    with pytest.raises(InputError) as error:
        start(tmp_path, changed)
    section, _, field = name.rpartition("__")
    old, new = (getattr(c, section) if section else c for c in (config(), changed))
    assert (
        f"contains a run with config.{name.replace('__', '.')}={getattr(old, field)!r}, now it is "
        f"{getattr(new, field)!r}; rerun"
    ) in str(error.value)
    assert workdirs.read(tmp_path).config == config()


def test_a_longer_run_is_another_where_the_learning_rate_depends_on_it(tmp_path):
    start(tmp_path, config(optimizer__decay="linear"))
    with pytest.raises(InputError, match=r"config.training.num_steps=4, now it is 99"):
        start(tmp_path, config(optimizer__decay="linear", training__num_steps=99))


def test_a_teacher_that_is_gone_is_known_by_its_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    start(tmp_path / "run", config(objective="cd", teacher=Path("teacher")))
    start(tmp_path / "run", config(objective="cd", teacher=tmp_path / "x" / ".." / "teacher"))
    with pytest.raises(InputError, match=r"config.teacher_checkpoint=.*now it is 'other'"):
        start(tmp_path / "run", config(objective="cd", teacher=Path("other")))


def checkpoint(workdir, step, metadata):
    """A checkpoint as far as its identity goes; returns its run's directory."""
    directory = workdir / "checkpoints" / str(step)
    directory.mkdir(parents=True)
    (directory / "_CHECKPOINT_METADATA").write_text(metadata)
    return workdir


def test_a_teacher_is_known_by_its_checkpoint_under_any_path(tmp_path, monkeypatch):
    teacher = checkpoint(tmp_path / "home" / "teacher", 4, "of Monday")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    start(tmp_path / "run", config(objective="cd", teacher=teacher))
    assert workdirs.read(tmp_path / "run").teacher == workdirs.checkpoint_identity(teacher, 4)
    (tmp_path / "link").symlink_to(teacher)
    shutil.copytree(teacher, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "home")
    for path in ("teacher", "~/teacher", str(tmp_path / "link"), str(tmp_path / "copy")):
        start(tmp_path / "run", config(objective="cd", teacher=path))
        assert workdirs.read(tmp_path / "run").config.teacher_checkpoint.endswith(path.lstrip("~"))
    teacher.rename(tmp_path / "moved")
    start(tmp_path / "run", config(objective="cd", teacher=tmp_path / "moved"))


def test_a_teacher_that_was_replaced_is_refused(tmp_path, monkeypatch):
    """Retrained in place, trained longer, or another one under the same relative path."""
    monkeypatch.chdir(tmp_path)
    settings = config(objective="cd", teacher="teacher")
    teacher = checkpoint(tmp_path / "teacher", 4, "of Monday")
    start(tmp_path / "run", settings)
    before = (tmp_path / "run" / "run.json").read_bytes()
    refused = "^config.teacher_checkpoint=teacher contains another checkpoint than the one that the run in"
    checkpoint(teacher, 9, "trained longer")
    with pytest.raises(InputError, match=refused):
        start(tmp_path / "run", settings)
    shutil.rmtree(teacher)
    checkpoint(teacher, 4, "of Tuesday")
    with pytest.raises(InputError, match=refused):
        start(tmp_path / "run", settings)
    checkpoint(tmp_path / "elsewhere" / "teacher", 4, "another one")
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=refused):
        start(tmp_path / "run", settings)
    assert (tmp_path / "run" / "run.json").read_bytes() == before


def test_an_older_versions_run_continues_and_its_teacher_is_recorded(tmp_path):
    settings = config(objective="cd", teacher=tmp_path / "teacher")
    checkpoint(tmp_path / "teacher", 4, "of Monday")
    start(tmp_path / "run", settings)
    file = tmp_path / "run" / "run.json"
    content = json.loads(file.read_text())
    identity = content.pop("teacher")
    file.write_text(json.dumps(content))
    start(tmp_path / "run", settings)
    assert workdirs.read(tmp_path / "run").teacher == identity


def test_a_run_that_started_before_a_rule_was_made_stays_readable(tmp_path):
    """Such as the rule that the warm-up is shorter than the run."""
    start(tmp_path)
    file = tmp_path / "run.json"
    content = json.loads(file.read_text())
    content["config"]["optimizer"]["warmup_steps"] = 100
    file.write_text(json.dumps(content))
    assert workdirs.read(tmp_path).config.optimizer.warmup_steps == 100
    with pytest.raises(InputError, match="warmup_steps=100"):
        config(optimizer__warmup_steps=100)


def test_other_images_under_the_same_name(tmp_path):
    start(tmp_path)
    start(tmp_path, dataset=dataclasses.replace(DATASET, path=Path("elsewhere"), source="other files"))
    other = dataclasses.replace(DATASET, fingerprints=DATASET.fingerprints | {"train": "c" * 64})
    with pytest.raises(InputError, match="was trained on other images than those in data/folder/tiny_8"):
        start(tmp_path, dataset=other)
    assert workdirs.read(tmp_path).dataset.fingerprints == DATASET.fingerprints


def test_checkpoints_of_nobody_are_not_touched(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(InputError, match=r"has checkpoints but no run.json"):
        start(tmp_path)
    assert not (tmp_path / "run.json").exists()


def test_a_place_that_can_not_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"--workdir=.*/file/run: cannot write there"):
        start(tmp_path / "file" / "run")


def test_room_is_asked_for_first(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 2_000_000})())
    start(tmp_path, needed_bytes=2_000_000)
    with pytest.raises(InputError, match=r"has 0.002 GB free, but its checkpoints need 0.003 GB"):
        start(tmp_path, needed_bytes=3_000_000)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "3", "{}", '{"config": {}}', '{"config": 3, "dataset": {}}']
)
def test_a_damaged_file_is_named(content, tmp_path):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(InputError, match=r"(?s)run\.json is damaged .*; restore it"):
        workdirs.read(tmp_path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda fields: fields.pop("path"),
        lambda fields: fields.pop("class_counts"),
        lambda fields: fields.update(class_counts=[]),
        lambda fields: fields.update(colour="red"),
    ],
)
def test_a_damaged_description_of_the_data_is_named(damage, tmp_path):
    start(tmp_path)
    content = json.loads((tmp_path / "run.json").read_text())
    damage(content["dataset"])
    (tmp_path / "run.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"(?s)run\.json is damaged .*; restore it"):
        workdirs.read(tmp_path)


def test_a_file_that_can_not_be_read_is_named(tmp_path):
    (tmp_path / "run.json").mkdir()
    with pytest.raises(InputError, match=r"run\.json can't be read \(Is a directory\)"):
        workdirs.read(tmp_path)


def test_compiled_programs_are_kept_in_the_run_or_where_the_user_says(tmp_path, monkeypatch):
    monkeypatch.delenv("MCM_COMPILATION_CACHE", raising=False)
    monkeypatch.chdir(tmp_path)
    assert workdirs.compilation_cache(Path("run")) == tmp_path / "run" / "xla_cache"
    monkeypatch.setenv("MCM_COMPILATION_CACHE", "shared")
    assert workdirs.compilation_cache(Path("run")) == tmp_path / "shared"


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("config", "data"), "text", r"config\.data='text' must be a section"),
        (("config", "a\nb"), 1, r"config\.a\\nb|config\.a b"),
        (("dataset", "num_examples"), 5, "num_examples is 5, not an object"),
        (("dataset", "class_counts"), {"train": [1, "2"]}, r"class_counts\.train is '2', not a whole number"),
        (("dataset", "class_names"), "ab", "class_names is 'ab', not a list"),
    ],
)
def test_a_value_of_another_type_is_one_line(tmp_path, place, value, message):
    start(tmp_path)
    content = json.loads((tmp_path / RUN_FILE).read_text())
    content[place[0]][place[1]] = value
    (tmp_path / RUN_FILE).write_text(json.dumps(content))
    found = refusal(lambda: workdirs.read(tmp_path))
    assert found is not None and RUN_FILE in found and re.search(message, found), found
