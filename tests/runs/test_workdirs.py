"""What a run's directory says: whose it is, and whether another run may use it."""

import dataclasses
import json
from pathlib import Path

import pytest

from mcm_jax.config import validation
from mcm_jax.data.layout import DatasetInfo
from mcm_jax.runs import workdirs
from mcm_jax.system.errors import InputError
from tests import tiny

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
    trained_on = workdirs.started(workdir, settings)
    workdirs.claim(workdir, settings, dataset, trained_on=trained_on, needed_bytes=needed_bytes)
    return trained_on


def test_it_reads_what_it_wrote(tmp_path):
    assert start(tmp_path / "new" / "run") is None
    assert workdirs.read(tmp_path / "new" / "run") == (config(), DATASET)
    assert [path.name for path in (tmp_path / "new" / "run").iterdir()] == ["run.json"]
    assert start(tmp_path / "new" / "run") == DATASET


def test_the_data_may_be_elsewhere_now(tmp_path):
    start(tmp_path)
    found, _ = workdirs.read(tmp_path, data_dir="/elsewhere")
    assert found == config(data__data_dir="/elsewhere")


FREE = {
    "data__data_dir": "elsewhere",
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
    assert workdirs.read(tmp_path)[0] == changed


NOT_FREE = {
    "seed": 1,
    "optimizer__learning_rate": 0.5,
    "training__batch_size": 32,
    "model__widths": (8, 24),
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
        f"holds a run with config.{name.replace('__', '.')}={getattr(old, field)!r}, now it is "
        f"{getattr(new, field)!r}; rerun"
    ) in str(error.value)
    assert workdirs.read(tmp_path)[0] == config()


def test_a_longer_run_is_another_where_the_learning_rate_depends_on_it(tmp_path):
    start(tmp_path, config(optimizer__decay="linear"))
    with pytest.raises(InputError, match=r"config.training.num_steps=4, now it is 99"):
        start(tmp_path, config(optimizer__decay="linear", training__num_steps=99))


def test_a_teacher_is_the_same_by_any_path_and_no_other(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    start(tmp_path / "run", config(objective="cd", teacher=Path("teacher")))
    start(tmp_path / "run", config(objective="cd", teacher=tmp_path / "x" / ".." / "teacher"))
    with pytest.raises(InputError, match=r"config.teacher_checkpoint=.*now it is 'other'"):
        start(tmp_path / "run", config(objective="cd", teacher=Path("other")))


def test_other_images_under_the_same_name(tmp_path):
    start(tmp_path)
    start(tmp_path, dataset=dataclasses.replace(DATASET, path=Path("elsewhere"), source="other files"))
    other = dataclasses.replace(DATASET, fingerprints=DATASET.fingerprints | {"train": "c" * 64})
    with pytest.raises(InputError, match="was trained on other images than those in data/folder/tiny_8"):
        start(tmp_path, dataset=other)
    assert workdirs.read(tmp_path)[1].fingerprints == DATASET.fingerprints


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
    with pytest.raises(InputError, match=r"has 0.002 GB free and its checkpoints need 0.003 GB"):
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
