"""What is written to a bucket is whole, read back at once by others, and survives failing requests."""

import contextlib
import errno
import json
import threading
import time

import fsspec
import pytest

from mcm_jax.system import files, locks, paths
from mcm_jax.system.errors import InputError
from tests import forks


@pytest.fixture
def place(bucket, request):
    """An empty directory in the bucket."""
    return bucket.path / request.node.name.replace("[", "-").replace("]", "")


@pytest.mark.parametrize("content", ["né", "né".encode(), lambda file: file.write("né".encode())])
def test_any_content_replaces_the_old_one(content, place):
    for _ in range(2):
        files.write_whole(str(place / "new" / "x"), content)
        assert [path.name for path in (place / "new").iterdir()] == ["x"]
        assert files.read_bytes(place / "new" / "x") == "né".encode()
        assert files.size(place / "new" / "x") == 3


def test_a_failed_write_leaves_the_old_content(place):
    files.write_whole(place / "x", "old")

    def fail(file):
        file.write(b"half")
        raise ValueError("no array")

    with pytest.raises(ValueError, match="no array"):
        files.write_whole(place / "x", fail)
    assert files.read_bytes(place / "x") == b"old"


def test_lines_are_appended_in_order_and_none_is_lost(place):
    writers = [
        threading.Thread(
            target=lambda n=n: [files.append_line(place / "r.jsonl", {"n": n}) for _ in range(3)]
        )
        for n in range(4)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    files.append_line(place / "r.jsonl", {"n": "last"})
    found = [json.loads(line)["n"] for line in files.read_lines(place / "r.jsonl") if line]
    assert sorted(found[:-1]) == [n for n in range(4) for _ in range(3)] and found[-1] == "last"


def test_lines_that_were_copied_from_a_bucket_are_read_and_continued(place, tmp_path):
    for n in range(2):
        files.append_line(place / "r.jsonl", {"n": n})
    (tmp_path / "r.jsonl").mkdir()
    for part in (place / "r.jsonl").iterdir():
        (tmp_path / "r.jsonl" / part.name).write_bytes(part.read_bytes())
    files.append_line(tmp_path / "r.jsonl", {"n": 2})
    assert b"".join(files.read_lines(tmp_path / "r.jsonl")) == b'{"n": 0}{"n": 1}{"n": 2}'


def test_lines_of_a_file_that_was_copied_to_a_bucket_come_first(place):
    files.write_whole(place / "r.jsonl", '{"n": 0}\n')
    files.append_line(place / "r.jsonl", {"n": 1})
    assert b"".join(files.read_lines(place / "r.jsonl")) == b'{"n": 0}{"n": 1}'


def test_objects_that_mark_directories_are_no_files(place, bucket):
    files.write_whole(place / "a" / "x", "x")
    for name in ("", "a/", "empty/"):
        fsspec.filesystem("gcs").pipe_file(f"{place}/{name}", b"")
    assert {path.name for path in files.entries(place)} == {"a", "empty"}
    assert files.names_below(place) == ["/a/x"] and files.entries(place / "a" / "x") == []


def test_a_directory_that_cannot_be_listed_is_not_empty(place, bucket):
    files.append_line(place / "r.jsonl", {"n": 0})
    for read in (files.entries, files.read_lines):
        with bucket.proxy.refusing("GET"), pytest.raises(PermissionError):
            read(place / "r.jsonl")


def test_what_is_missing_is_not_found(place):
    assert files.read_if_exists(place / "x") is None
    for read in (files.read_bytes, files.read_lines, files.size):
        with pytest.raises(FileNotFoundError) as error:
            read(place / "x")
        assert (error.value.errno, error.value.filename) == (errno.ENOENT, str(place / "x"))
    files.remove_tree(place)
    assert files.find(place, "x") == [] and files.free_bytes(place) is None


def test_paths_are_found_at_any_depth(place):
    for name in ("a/e/r.jsonl", "a/b/e/r.jsonl", "e/r.jsonl", "a/e/r.jsonl.txt", "ae/r.jsonl"):
        files.write_whole(place / name, "x")
    files.append_line(place / "lines" / "e" / "r.jsonl", {})
    found = [str(path.relative_to(place)) for path in files.find(place, "e/r.jsonl")]
    assert found == ["a/b/e/r.jsonl", "a/e/r.jsonl", "e/r.jsonl", "lines/e/r.jsonl"]


@pytest.mark.parametrize("local", [True, False])
def test_a_directory_is_published_with_its_mark_last(local, place, tmp_path, bucket):
    source = tmp_path if local else place / "source"
    for name in ("a", "summary", "sub/b"):
        files.write_whole(source / name, name)
    files.write_whole(place / "target" / "old", "x")
    files.write_whole(place / "target" / "summary", "old")
    # Nothing is complete while requests fail.
    with bucket.proxy.refusing("POST", after=1), pytest.raises(OSError):
        files.publish_tree(source, place / "target", last="summary")
    assert not (place / "target" / "summary").exists()
    files.publish_tree(source, place / "target", last="summary")
    names = files.names_below(place / "target")
    assert (
        names == ["/a", "/sub/b", "/summary"] and files.read_bytes(place / "target" / "summary") == b"summary"
    )


def test_a_bucket_that_does_not_exist_is_named():

    with pytest.raises(
        InputError, match=r"^--workdir=gs://no-bucket/run: cannot write there \(there is no such"
    ):
        files.require_writable(paths.as_path("gs://no-bucket/run"), "--workdir")


def test_a_request_is_repeated_while_the_storage_is_busy(place, bucket):
    bucket.proxy.fail(2)
    files.write_whole(place / "x", "new")
    bucket.proxy.fail(1)
    assert files.read_bytes(place / "x") == b"new"


def test_a_refused_request_is_an_error_of_the_storage(place, bucket):
    files.write_whole(place / "x", "old")
    with bucket.proxy.refusing("POST", status=403), pytest.raises(OSError) as error:
        files.write_whole(place / "x", "new")
    assert (error.value.errno, error.value.filename) == (errno.EACCES, str(place / "x"))
    assert files.read_bytes(place / "x") == b"old"


def test_an_answer_that_is_cut_off_is_no_content(place, bucket):
    content = bytes(range(256)) * 40
    files.write_whole(place / "x", content)
    bucket.proxy.cut(1)
    with contextlib.suppress(OSError):
        assert files.read_bytes(place / "x") == content
    assert files.read_bytes(place / "x") == content


def test_a_log_grows_and_a_failed_upload_is_repeated(place, bucket, monkeypatch, capsys):
    monkeypatch.setattr(files.GrowingObject, "UPLOAD_SECONDS", 0.0)
    with files.GrowingObject(place / "log") as log:
        log.write(b"a")
        log.flush()
        assert files.read_bytes(place / "log") == b"a"
        log.write(b"b")
        with bucket.proxy.refusing("POST", status=403):
            log.flush()
        assert "could not be written" in capsys.readouterr().err
    assert files.read_bytes(place / "log") == b"ab"


def test_a_lease_is_held_once_and_its_process_is_named(place, monkeypatch):
    monkeypatch.setattr(locks, "_RENEWAL_SECONDS", 0.2)
    monkeypatch.setattr(locks, "_POLL_SECONDS", 0.05)
    with locks.locked(place / "lock", "--workdir=run"):
        with pytest.raises(InputError, match=r"^--workdir=run is in use by process \d+ on \S+ since 20"):
            with locks.locked(place / "lock", "--workdir=run"):
                pass
    with locks.locked(place / "lock", "--workdir=run"):
        pass
    assert not (place / "lock").exists()


@pytest.mark.parametrize("elsewhere", ["", "machine", "container"])
def test_the_lease_of_a_killed_process_is_taken_over(elsewhere, place, monkeypatch):
    """At once if it ran on this machine, after a while otherwise."""
    monkeypatch.setattr(locks, "LEASE_SECONDS", 1.0)
    monkeypatch.setattr(locks, "_POLL_SECONDS", 0.05)
    code = (
        "import json, os; from mcm_jax.system import locks; print(json.dumps(locks._identity(os.getpid())))"
    )
    ended = json.loads(forks.run(code).stdout)
    if elsewhere:
        ended[elsewhere] = "another"
    content = {"process": ended, "holder": "it", "token": "t"}
    files.write_whole(place / "lock", json.dumps(content))
    start = time.monotonic()
    with locks.locked(place / "lock", "--workdir=run"):
        assert (time.monotonic() - start > 1.0) == bool(elsewhere)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"process": "x"}'])
def test_a_damaged_lease_is_taken_over(content, place, monkeypatch):
    monkeypatch.setattr(locks, "LEASE_SECONDS", 0.2)
    monkeypatch.setattr(locks, "_POLL_SECONDS", 0.05)
    files.write_whole(place / "lock", content)
    with locks.locked(place / "lock", "--workdir=run"):
        pass


def test_a_process_with_the_number_of_a_killed_one_is_another(place, monkeypatch):
    """As in a container that was started again."""
    monkeypatch.setattr(locks, "LEASE_SECONDS", 100.0)
    killed = locks._identity(locks.os.getpid()) | {"started": "1"}
    files.write_whole(place / "lock", json.dumps({"process": killed, "holder": "it", "token": "t"}))
    with locks.locked(place / "lock", "--workdir=run"):
        pass


LOSE = """
import sys, time
from mcm_jax.system import files, locks, paths
locks._RENEWAL_SECONDS = 0.1
path = paths.as_path(sys.argv[1])
with locks.locked(path, "--workdir=run"):
    files.write_whole(path, '{"token": "other", "holder": "process 7 on other"}')
    time.sleep(60)
"""


def test_who_has_lost_its_lease_ends_at_once(place):
    result = forks.run(LOSE, place / "lock")
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1] == "error: --workdir=run was taken over by process 7 on other"
    assert json.loads(files.read_bytes(place / "lock"))["token"] == "other"
