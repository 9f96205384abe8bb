"""Paths that users name: `~` is expanded, other URLs than gs:// are refused, and no flag is forgotten."""

import ast
import dataclasses
import typing
from pathlib import Path

import pytest
from absl import flags

from mcm_jax.config import settings, validation
from mcm_jax.config.settings import without_none
from mcm_jax.data import preparation
from mcm_jax.runs import workdirs
from mcm_jax.runs.run import load_run
from mcm_jax.system import command_line, paths
from mcm_jax.system.errors import InputError

PACKAGE = Path(paths.__file__).parents[1]
PROGRAMS = ("train", "sample", "evaluate", "export", "prepare", "plan", "report", "findings")
# gs:/ is what pathlib makes of gs://.
URLS = ("s3://bucket/run", "file:///tmp/run", "gs:/bucket/run", "gs://")

# Flags with text that names no path. prepare checks its manual_dir itself.
TEXTS = {
    "evaluate": {"steps", "guidance", "captions", "checkpoint_step", "metrics", "noise_grid"},
    "prepare": {"dataset", "encoder", "host", "name", "manual_dir"},
    "sample": {"prompt", "noise_grid"},
    "train": {"profile"},
    "plan": {"topology"},
    "findings": {"methods", "problems", "studies"},
}
PATHS = {
    "train": {"workdir"},
    "sample": {"workdir", "guide", "out", "data_dir", "prompts", "text_encoder"},
    "evaluate": {
        *("workdir", "guide", "images", "results", "data_dir", "inception", "reference", "cache_dir", "clip"),
        "dinov2",
    },
    "export": {"workdir", "out", "data_dir"},
    "prepare": {"inception", "data_dir", "teacher", "workdir"},
    "plan": {"json", "hlo", "table", "scaling"},
    "report": {"runs", "out", "prompts", "text_encoder", "demo"},
    "findings": {"out"},
}


def defined(program, *functions):
    """Names of the flags that a program defines by these functions."""
    return {
        node.args[0].value
        for node in ast.walk(ast.parse((PACKAGE / f"{program}.py").read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in functions
    }


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_flag_with_text_is_a_path_or_known_to_be_none(program):
    assert defined(program, "define_path", "define_paths") == PATHS[program]
    assert defined(program, "DEFINE_string", "DEFINE_list", "DEFINE_multi_string", "DEFINE") == TEXTS.get(
        program, set()
    )


def test_every_program_is_looked_at():
    found = {path.stem for path in PACKAGE.glob("*.py") if "command_line.run(main)" in path.read_text()}
    assert found == set(PROGRAMS)


@pytest.fixture
def values(monkeypatch):
    """A set of flags of its own, in place of the process's."""
    found = flags.FlagValues()
    define = flags.DEFINE
    monkeypatch.setattr(flags, "DEFINE", lambda *given, **named: define(*given, flag_values=found, **named))
    return found


def test_a_flag_expands_the_home_directory(values, monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    paths.define_path("out", None, "")
    paths.define_path("data_dir", "data", "")
    paths.define_paths("workdir", None, "")
    values(["program", "--out=~/x.png", "--workdir=~/runs/a,runs/b"])
    assert values.out == Path("/home/ada/x.png") and values.data_dir == Path("data")
    assert values.workdir == [Path("/home/ada/runs/a"), Path("runs/b")]
    assert values["out"].serialize() == "--out=/home/ada/x.png"
    assert values["workdir"].serialize() == "--workdir=/home/ada/runs/a,runs/b"


@pytest.mark.parametrize("url", URLS)
def test_a_flag_refuses_a_url_in_one_line(url, values):
    paths.define_path("out", None, "")
    paths.define_paths("workdir", None, "")
    for argument, flag in ((f"--out={url}", "--out"), (f"--workdir=a,{url}", "--workdir")):
        with pytest.raises(flags.Error) as error:
            values(["program", argument])
        refused = command_line._input_error_within(error.value)
        assert str(refused) == (
            f"{flag}={url} is a URL that can't be opened; use a local path or gs://BUCKET/PATH"
        )


@pytest.mark.parametrize("local", ["runs/a:b", "./gs:/x", "C:/runs", "/gs://x", "2024-01-01T10:/x"])
def test_other_colons_are_local(local):
    assert paths.checked_path(local, "--out") == Path(local)


def test_a_path_that_is_none():
    with pytest.raises(InputError, match=r"^--workdir is empty; specify a file or directory"):
        paths.checked_path("", "--workdir")
    with pytest.raises(InputError, match=r"^--out=~nobody-has-this-name/x: there is no such user's home"):
        paths.checked_path("~nobody-has-this-name/x", "--out")


# Settings with text.
PATH_SETTINGS = {"teacher_checkpoint", "guide_checkpoint", "data.data_dir"}
TEXT_SETTINGS = {"data.dataset", "data.encoder"}


def text_settings(kind, prefix=""):
    for name, hint in typing.get_type_hints(kind).items():
        if dataclasses.is_dataclass(hint):
            yield from text_settings(hint, f"{prefix}{name}.")
        elif hint is str or (type(None) in typing.get_args(hint) and without_none(hint) is str):
            yield prefix + name


def test_every_setting_with_text_is_a_path_or_known_to_be_none():
    assert set(text_settings(settings.Config)) == PATH_SETTINGS | TEXT_SETTINGS


def configured(name, value):
    config = settings.default_config()
    config.update(objective="cd", teacher_checkpoint="teacher")
    config.consistency.update(student_steps=(2,), teacher_guidance=1.0)
    section, _, field = name.rpartition(".")
    (config[section] if section else config)[field] = value
    found = validation.validate(config)
    return getattr(getattr(found, section) if section else found, field)


@pytest.mark.parametrize("name", sorted(PATH_SETTINGS))
def test_a_setting_is_a_path(name, monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    assert configured(name, "~/x") == "/home/ada/x"
    for url in URLS:
        with pytest.raises(InputError, match=rf"^config\.{name}={url} is a URL"):
            configured(name, url)


def test_what_else_takes_a_path(monkeypatch):
    with pytest.raises(InputError, match=r"^workdir=s3://b/r is a URL"):
        load_run("s3://b/r")
    with pytest.raises(InputError, match=r"^data_dir=s3://b/d is a URL"):
        load_run("run", data_dir="s3://b/d")
    with pytest.raises(InputError, match=r"^--manual_dir=s3://b/images is a URL"):
        preparation.plan(dataset="folder", resolution=8, manual_dir="s3://b/images")
    with pytest.raises(InputError, match=r"^--manual_dir=s3://b/images is a URL"):
        preparation.plan(dataset="imagenet", resolution=8, manual_dir="s3://b/images")
    monkeypatch.setenv("MCM_COMPILATION_CACHE", "s3://b/cache")
    with pytest.raises(InputError, match=r"^MCM_COMPILATION_CACHE=s3://b/cache is a URL"):
        workdirs.compilation_cache(Path("run"))


@pytest.mark.parametrize("name", ["gs://bucket", "gs://bucket/", "gs://bucket/a b/c.npz"])
def test_a_path_in_a_bucket(name, values):
    paths.define_path("out", None, "")
    paths.define_paths("workdir", None, "")
    values(["program", f"--out={name}", f"--workdir=a,{name}"])
    assert str(values.out) == name.rstrip("/") and paths.is_in_bucket(values.out)
    assert values.workdir == [Path("a"), values.out]
    assert values["out"].serialize() == f"--out={name.rstrip('/')}"
    assert configured("data.data_dir", name) == name.rstrip("/")


@pytest.mark.parametrize("character", "*?[")
def test_a_path_in_a_bucket_stands_for_one_object(character):
    with pytest.raises(
        InputError, match=r"contains one of \*\?\[, which stand for several objects; rename it"
    ):
        paths.checked_path(f"gs://bucket/a{character}b", "--out")


def test_a_bucket_needs_its_client(monkeypatch):
    monkeypatch.setattr(paths.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError) as error:
        paths.checked_path("gs://bucket/run", "--workdir")
    assert str(error.value) == (
        "--workdir=gs://bucket/run needs the package gcsfs; install it: pip install 'mcm_jax[gcs]'"
    )


def test_no_current_directory_enters_a_path_in_a_bucket():
    """epath's own methods would make /current/directory/gs:/bucket/run of it."""
    path = paths.as_path("gs://bucket/a/b")
    assert paths.absolute(path) == path and paths.as_path(path) is path
    assert str(paths.resolved(path / ".." / "c")) == "gs://bucket/a/c"
    assert str(paths.resolved("gs://bucket/../../x")) == "gs://x"
    assert str(paths.resolved("gs://bucket")) == "gs://bucket"
    assert paths.resolved("/a/../b") == paths.absolute("/b") == Path("/b")
