import dataclasses
import errno
import json
import os
import pathlib

import numpy as np
import pytest
from PIL import Image

from mcm_jax.data import folder, layout, preparation
from mcm_jax.evaluation import inception_weights
from mcm_jax.system.errors import InputError
from tests import forks
from tests.evaluation import test_inception_weights


@pytest.fixture
def images(tmp_path):
    """Six tiny images in two classes."""
    rng = np.random.default_rng(0)
    for index in range(6):
        path = tmp_path / "my pets" / f"class {index % 2}" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (5, 5, 3), np.uint8)).save(path)
    return tmp_path / "my pets"


def chosen(images, name="pets"):
    return preparation.plan(dataset="folder", resolution=4, manual_dir=str(images), name=name)


def everything_in(directory):
    """Path and content of all files below, hidden ones too."""
    return {path.relative_to(directory): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_complete_data_is_reused(images, tmp_path):
    data_dir = tmp_path / "data"
    first, built = preparation.prepare(chosen(images), data_dir=data_dir)
    before = everything_in(data_dir)
    second, built_again = preparation.prepare(chosen(images), data_dir=data_dir)
    assert (built, built_again) == (True, False) and first == second
    assert everything_in(data_dir) == before


def test_overwriting_gives_the_same_data_and_leaves_nothing_else(images, tmp_path):
    data_dir = tmp_path / "data"
    first, _ = preparation.prepare(chosen(images), data_dir=data_dir)
    (first.path / "stale").touch()
    second, built = preparation.prepare(chosen(images), data_dir=data_dir, overwrite=True)
    assert built and first == second and not (first.path / "stale").exists()
    assert os.listdir(data_dir) == ["folder"]


def test_fingerprint_follows_a_single_pixel(images, tmp_path):
    first, _ = preparation.prepare(chosen(images), data_dir=tmp_path / "data")
    for path in images.rglob("*.png"):
        with Image.open(path) as image:
            pixels = np.array(image)
        pixels[2, 2, 0] ^= 64
        Image.fromarray(pixels).save(path)
    second, _ = preparation.prepare(chosen(images), data_dir=tmp_path / "data", overwrite=True)
    assert all(first.fingerprints[split] != second.fingerprints[split] for split in layout.SPLITS)


@pytest.mark.parametrize("fault", [KeyboardInterrupt, InputError("bad.png: not readable"), MemoryError])
def test_interrupted_run_changes_nothing(images, tmp_path, monkeypatch, fault):
    """Neither the first time, when nothing may look complete, nor over a complete data set."""
    data_dir, load_image, calls = tmp_path / "data", folder.load_image, []

    def failing(path, *, resolution):
        calls.append(path)
        if len(calls) == 3:
            raise fault
        return load_image(path, resolution=resolution)

    with monkeypatch.context() as patch:
        patch.setattr(folder, "load_image", failing)
        with pytest.raises(fault if isinstance(fault, type) else type(fault)):
            preparation.prepare(chosen(images), data_dir=data_dir)
    assert everything_in(data_dir) == {}
    preparation.prepare(chosen(images), data_dir=data_dir)
    before = everything_in(data_dir)
    calls.clear()
    monkeypatch.setattr(folder, "load_image", failing)
    with pytest.raises(fault if isinstance(fault, type) else type(fault)):
        preparation.prepare(chosen(images), data_dir=data_dir, overwrite=True)
    assert everything_in(data_dir) == before


def test_failed_rename_brings_the_old_data_back(images, tmp_path, monkeypatch):
    data_dir = tmp_path / "data"
    preparation.prepare(chosen(images), data_dir=data_dir)
    before = everything_in(data_dir)
    rename = pathlib.Path.rename

    def failing(self, target):
        if self.name == layout.VERSION and ".incomplete" in str(self) and "retired" not in str(target):
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(pathlib.Path, "rename", failing)
    with pytest.raises(KeyboardInterrupt):
        preparation.prepare(chosen(images), data_dir=data_dir, overwrite=True)
    assert everything_in(data_dir) == before


def test_killed_run_is_not_taken_for_complete(images, tmp_path):
    """What a killed process leaves is a hidden directory, even with everything but the rename done."""
    data_dir = tmp_path / "data"
    info, _ = preparation.prepare(chosen(images), data_dir=data_dir)
    info.path.parent.rename(data_dir / ".incomplete-pets_4-abc")
    with pytest.raises(InputError, match="prepare it with"):
        layout.describe(data_dir=data_dir, dataset="folder/pets", resolution=4)
    assert preparation.prepare(chosen(images), data_dir=data_dir)[1]


def test_other_images_under_the_same_name_are_refused(images, tmp_path):
    data_dir = tmp_path / "data"
    preparation.prepare(chosen(images), data_dir=data_dir)
    before = everything_in(data_dir)
    next(images.rglob("*.png")).unlink()
    with pytest.raises(InputError, match=r"made from other files .*--overwrite.*--name"):
        preparation.prepare(chosen(images), data_dir=data_dir)
    assert everything_in(data_dir) == before
    assert preparation.prepare(chosen(images, name="fewer"), data_dir=data_dir)[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"dataset": "cifar"},
            r"--dataset=cifar: it must be openmoji, avatars, emoji, coco, imagenet, .* or folder",
        ),
        ({"resolution": 0}, r"--resolution=0: it must be from 1 to"),
        ({"resolution": 4096}, r"--resolution=4096: it must be from 1 to"),
        ({"name": "x"}, "applies only to --dataset=folder"),
        ({"dataset": "folder"}, "needs --manual_dir=PATH"),
        ({"dataset": "folder", "manual_dir": "/no/where"}, "no such folder"),
        ({"dataset": "folder", "manual_dir": "IMAGES"}, "--name=my pets: .* only letters"),
        ({"dataset": "folder", "manual_dir": "IMAGES", "name": "../x"}, "--name=../x: .* only letters"),
    ],
)
def test_bad_input_is_named(images, options, message):
    options = {"dataset": "openmoji", "resolution": 4} | options
    if options.get("manual_dir") == "IMAGES":
        options["manual_dir"] = str(images)
    with pytest.raises(InputError, match=message):
        preparation.plan(**options)


@pytest.mark.parametrize("place", ["a file", "a file/below", "/proc/nowhere"])
def test_data_dir_that_cannot_be_made_is_named(images, tmp_path, place):
    (tmp_path / "a file").touch()
    with pytest.raises(InputError, match=f"--data_dir=.*{place}: cannot write there"):
        preparation.prepare(chosen(images), data_dir=tmp_path / place)


@pytest.mark.parametrize("error", [PermissionError(errno.EACCES, "denied"), OSError(errno.ENOSPC, "full")])
def test_write_failure_on_the_way_is_named(images, tmp_path, monkeypatch, error):
    def failing(*args, **kwargs):
        raise error

    monkeypatch.setattr(layout, "write_summary", failing)
    with pytest.raises(InputError, match=rf"--data_dir=.*cannot write there \({error.strerror}\)"):
        preparation.prepare(chosen(images), data_dir=tmp_path / "data")
    assert everything_in(tmp_path / "data") == {}


def test_other_failures_are_not_blamed_on_the_user(images, tmp_path, monkeypatch):
    def failing(*args, **kwargs):
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(layout, "write_summary", failing)
    with pytest.raises(OSError, match="broken"):
        preparation.prepare(chosen(images), data_dir=tmp_path / "data")


def run(*arguments, cwd):
    return forks.program("prepare", *arguments, cwd=cwd)


def test_program_reports_and_names_the_next_command(images, tmp_path):
    done = run("--dataset=folder", f"--manual_dir={images}", "--name=pets", "--resolution=4", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("folder/pets at 4x4: prepared\n")
    info = layout.describe(data_dir=tmp_path / "data", dataset="folder/pets", resolution=4)
    assert all(digest in done.stdout for digest in info.fingerprints.values())
    assert all(name in done.stdout for name in ("class 0", "class 1", "prepared", "preview.png"))
    assert done.stdout.endswith(
        "next: python -m mcm_jax.train --config=folder:teacher --config.data.dataset=folder/pets "
        "--config.data.resolution=4 --workdir=runs/teacher\n"
    )
    assert (info.path / "preview.png").exists()
    assert sum(json.loads((info.path / "summary.json").read_text())["num_examples"].values()) == 6


def test_data_is_not_prepared_among_its_images(images):
    """The preview of one resolution would be an image of the next."""
    with pytest.raises(
        InputError, match=r"--data_dir=.*/data lies inside --manual_dir=.*choose a directory outside"
    ):
        preparation.prepare(chosen(images), data_dir=images / "data")
    assert not (images / "data").exists()


def test_program_notes_what_it_passes_over(images, tmp_path):
    (images / "class 1" / "photo.heic").touch()
    done = run("--dataset=folder", f"--manual_dir={images}", "--name=pets", "--resolution=4", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "note: skipped: 1 .heic\n")


def test_many_classes_are_counted_and_their_numbering_shown(images, tmp_path):
    info, _ = preparation.prepare(chosen(images), data_dir=tmp_path / "data")
    names = tuple(f"c{n}" for n in range(120))
    counts = {"train": (1,) * 119 + (0,), "test": (0,) * 120}
    many = dataclasses.replace(info, class_names=names, class_counts=counts)
    report = preparation.report(many, built=True, data_dir="data")
    assert "120 classes: 0 is c0, 1 is c1, ..., 119 is c119\n" in report
    assert "without training images, so never sampled: c119\n" in report and "ILSVRC" not in report


def test_inceptions_weights_are_converted(tmp_path):
    weights = test_inception_weights.random_layers()
    source = tmp_path / "weights.pickle"
    source.write_bytes(test_inception_weights.as_pickle(weights))
    done = run(f"--inception={source}", f"--data_dir={tmp_path / 'data'}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    target = tmp_path / "data" / "inception-2015-12-05.safetensors"
    assert f"{inception_weights.load(target).sha256}\n  {target}\n" in done.stdout
    assert "--features=inception" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--inception=none.pth"], "none.pth: there are no Inception weights; get pt_inception"),
        (["--inception=x", "--dataset=openmoji"], "give --dataset=NAME for a data set or --inception=FILE"),
    ],
)
def test_bad_weights_are_one_line(arguments, message, tmp_path):
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("arguments", [["--resolution=4"], ["--dataset=openmoji", "--resolution=big"]])
def test_program_exits_2_with_one_line(tmp_path, arguments):
    failed = run(*arguments, cwd=tmp_path)
    assert (failed.returncode, failed.stdout, failed.stderr.count("\n")) == (2, "", 1)
    assert failed.stderr.startswith("error: ") and list(tmp_path.iterdir()) == []


def test_program_names_an_unreadable_image(images, tmp_path):
    broken = next(images.rglob("*.png"))
    broken.write_bytes(b"no image")
    failed = run("--dataset=folder", f"--manual_dir={images}", "--name=pets", "--resolution=4", cwd=tmp_path)
    assert failed.returncode == 2 and failed.stderr.startswith(f"error: {broken}: not a readable image")
    assert failed.stderr.count("\n") == 1 and everything_in(tmp_path / "data") == {}
