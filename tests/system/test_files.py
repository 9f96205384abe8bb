"""A file is its old content or all of the new one, and what failed is named."""

import errno
import io
import os
from pathlib import Path

import pytest

from mcm_jax.system import files
from mcm_jax.system.errors import InputError


def text_of(directory):
    return {path.name: path.read_text() for path in directory.iterdir()}


@pytest.mark.parametrize("content", ["né", "né".encode(), lambda file: file.write("né".encode())])
def test_any_content_replaces_the_old_one(content, tmp_path):
    path = tmp_path / "new" / "x"
    for _ in range(2):
        files.write_whole(str(path), content)
        assert {name: text.encode() for name, text in text_of(path.parent).items()} == {"x": "né".encode()}


def fail_to(operation, number, monkeypatch):
    """As the operating system reports it of an open file: without its name."""

    def fail(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, operation, fail)


@pytest.mark.parametrize("operation", ["fsync", "replace"])
@pytest.mark.parametrize("old", [{}, {"x": "old"}])
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_a_failed_write_leaves_everything_as_it_was_and_names_the_file(
    operation, old, number, tmp_path, monkeypatch
):
    for name, text in old.items():
        (tmp_path / name).write_text(text)
    with monkeypatch.context() as patch:
        fail_to(operation, number, patch)
        with pytest.raises(OSError) as error:
            files.write_whole(tmp_path / "x", "new")
    assert (error.value.errno, error.value.filename) == (number, str(tmp_path / "x"))
    assert text_of(tmp_path) == old


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt(), ValueError("no array")])
def test_whatever_ends_the_writing_leaves_the_old_file(error, tmp_path):
    (tmp_path / "x").write_text("old")

    def fail(file):
        file.write(b"half")
        raise error

    with pytest.raises(type(error)) as raised:
        files.write_whole(tmp_path / "x", fail)
    assert raised.value is error
    assert text_of(tmp_path) == {"x": "old"}


def test_the_content_is_on_disk_before_the_name_is(tmp_path, monkeypatch):
    """Else a power cut may leave the name with nothing behind it."""
    seen = []

    def fsync(descriptor):
        seen.append((os.fstat(descriptor).st_size, (tmp_path / "x").exists()))

    monkeypatch.setattr(os, "fsync", fsync)
    files.write_whole(tmp_path / "x", "1234567")
    assert seen == [(7, False)]


def test_a_place_that_is_none_is_the_users_to_change(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"/file/x: cannot write there \(.+\); choose another path"):
        files.write_output(tmp_path / "file" / "x", "content")


def test_a_failure_without_a_number_is_told_by_its_words(tmp_path):
    def fail(file):
        raise OSError("the array is too large")

    with pytest.raises(InputError, match=r"/x: cannot write there \(the array is too large\)"):
        files.write_output(tmp_path / "x", fail)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_not(number, tmp_path, monkeypatch):
    fail_to("fsync", number, monkeypatch)
    with pytest.raises(OSError) as error:
        files.write_output(tmp_path / "x", "content")
    assert not isinstance(error.value, InputError) and files.is_full(error.value)
    assert not text_of(tmp_path)


def test_directories_are_made_and_tried(tmp_path):
    files.require_writable(tmp_path / "a" / "b", "--dir")
    assert (tmp_path / "a" / "b").is_dir() and not text_of(tmp_path / "a" / "b")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"^--dir=.*/file/b: cannot write there \(.+\); choose another"):
        files.require_writable(tmp_path / "file" / "b", "--dir")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_directory_on_a_full_disk_is_told(tmp_path, monkeypatch):
    """Where a file can still be made, but nothing be put into it."""
    monkeypatch.setattr("tempfile.TemporaryFile", lambda dir: io.FileIO("/dev/full", "w"))
    with pytest.raises(InputError, match="cannot write there"):
        files.require_writable(tmp_path, "--dir")


def chain(*errors):
    """The last of these errors, each raised while the one before was handled."""
    for before, error in zip(errors, errors[1:], strict=False):
        error.__context__ = before
    return errors[-1]


def test_a_full_disk_is_found_in_what_led_to_an_error():
    full = OSError(errno.ENOSPC, "No space left on device", "x")
    assert files.full_disk_within(chain(full, ValueError("closed"), RuntimeError("closed"))) is full
    wrapped = RuntimeError("could not save")
    wrapped.__cause__ = full
    assert files.full_disk_within(chain(ValueError("x"), wrapped)) is full
    told = files.full_disk_within(ValueError("RESOURCE_EXHAUSTED: No space left on device [28]"))
    assert files.is_full(told) and told.strerror == "No space left on device" and told.filename is None
    assert files.full_disk_within(chain(ValueError("x"), OSError(errno.EIO, "Input/output error"))) is None
    assert files.full_disk_within(None) is None


def test_failed_storage_is_found_in_what_led_to_an_error():
    failed = OSError(errno.EIO, "the server is busy", "gs://bucket/x")
    assert files.failed_storage_within(chain(failed, ValueError("x"))) == "gs://bucket/x: the server is busy"
    client = type("HttpError", (Exception,), {"__module__": "gcsfs.retry"})("503: busy")
    assert files.failed_storage_within(chain(client, ValueError("x"))) == "503: busy"
    assert files.failed_storage_within(OSError("Forbidden: b/bucket/o\nno")) == "Forbidden: b/bucket/o no"
    tensorstore = ValueError("UNAVAILABLE: Error reading gs://bucket/x: CURL error")
    assert files.failed_storage_within(tensorstore) == str(tensorstore)
    assert (
        files.failed_storage_within(OSError(errno.EIO, "Input/output error", "/x"))
        == "/x: Input/output error"
    )
    for other in (ValueError("NOT_FOUND: gs://bucket/x"), OSError(errno.ENOENT, "x", "/local"), None):
        assert files.failed_storage_within(other) is None


def test_a_number_that_is_none_is_not_added(tmp_path):
    path = tmp_path / "results.jsonl"
    with pytest.raises(ValueError):
        files.append_line(path, {"metrics": {"fd": float("nan")}})
    assert not path.exists()
