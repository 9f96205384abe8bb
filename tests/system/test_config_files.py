"""Configs by name or path, from a checkout and from a wheel."""

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import mcm_jax
from mcm_jax.system import config_files
from mcm_jax.system.errors import InputError

ROOT = Path(__file__).parents[2]


def test_a_name_is_a_file_of_this_package():
    assert config_files.names() == [
        "avatars",
        "emoji",
        "folder",
        "imagenet128",
        "imagenet64",
        "openmoji",
        "text_to_image",
    ]
    assert (
        config_files.locate("imagenet64:small,cd,steps=8") == f"{ROOT}/configs/imagenet64.py:small,cd,steps=8"
    )
    assert config_files.locate("folder") == f"{ROOT}/configs/folder.py"


def test_a_path_is_any_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    Path("openmoji.py").touch()
    assert config_files.locate("openmoji.py:teacher") == "openmoji.py:teacher"
    assert config_files.locate("~/openmoji.py:a:b") == f"{tmp_path}/openmoji.py:a:b"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            "imagnet64:small,teacher",
            "--config=imagnet64:small,teacher: there is no config named imagnet64; use ",
        ),
        (
            "configs/none.py:teacher",
            "--config=configs/none.py:teacher: there is no file configs/none.py; use ",
        ),
        ("gs://b/x.py:teacher", "--config=gs://b/x.py:teacher is in a bucket; copy the file"),
        ("", "--config is empty"),
    ],
)
def test_a_config_that_is_none(value, message):
    with pytest.raises(InputError, match=f"^{re.escape(message)}") as error:
        config_files.locate(value)
    if "there is no" in message:
        assert str(error.value).endswith(
            "a name: avatars, emoji, folder, imagenet128, imagenet64, openmoji, text_to_image"
        )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The contents of a wheel of this checkout, as an installation has them."""
    source, built = (tmp_path_factory.mktemp(name) for name in ("source", "built"))
    # A copy: setuptools leaves its build/ and a directory of metadata beside setup.py.
    archive = source / "source.tar"
    with tarfile.open(archive, "w") as tar:
        for name in ("mcm_jax", "configs", "setup.py", "setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
            tar.add(ROOT / name, name)
    with tarfile.open(archive) as tar:
        tar.extractall(source, filter="data")
    code = f"from setuptools import build_meta; build_meta.build_wheel({str(built)!r})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=source, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (path,) = built.glob(f"mcm_jax-{mcm_jax.__version__}-*.whl")
    with zipfile.ZipFile(path) as content:
        content.extractall(built)
    return built


def test_a_wheel_has_every_file_of_the_package(wheel):
    def files(directory):
        return {
            str(path.relative_to(directory))
            for path in directory.rglob("*")
            if path.is_file() and "__pycache__" not in path.parts
        }

    configs = {f"configs/{name}" for name in files(ROOT / "configs")}
    assert files(wheel / "mcm_jax") == files(ROOT / "mcm_jax") | configs
    assert {"py.typed", "reporting/paper.json", "configs/imagenet64.py"} <= files(wheel / "mcm_jax")


def test_an_installed_config_is_found_from_any_directory(wheel, tmp_path):
    code = (
        "import sys; from absl import flags; from mcm_jax.system import config_files\n"
        "config = config_files.define_flag(''); flags.FLAGS(sys.argv)\n"
        "print(config.value.consistency.student_steps, config_files.directory())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "--config=imagenet64:small,cd,steps=8"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(wheel)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, f"(8,) {wheel}/mcm_jax/configs\n"), done.stderr
