import gzip
import io
import tarfile

import pytest

from mcm_jax.data import tars
from tests.tars import tar

FILES = {"a": b"1" * 700, "deep/b": b"2" * 512, "c": b""}


def read(content, names, max_bytes=1000):
    return tars.read_gzipped(io.BytesIO(gzip.compress(content)), names, max_bytes=max_bytes)


def test_the_named_files_are_read():
    assert read(tar(FILES), ["deep/b", "c", "nowhere"]) == {"deep/b": FILES["deep/b"], "c": b""}
    assert read(tar(FILES), FILES) == FILES


def test_links_have_no_content():
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:") as made:
        link = tarfile.TarInfo("link")
        link.type, link.linkname, link.size = tarfile.SYMTYPE, "a", 9000
        made.addfile(link)
    after = tar({"a": b"x"})
    assert read(content.getvalue()[:512] + after, ["a"]) == {"a": b"x"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (tar(FILES)[:900], "ends .* bytes early"),
        (tar(FILES)[:1536], "header"),
        (b"x" * 600, "header"),
        (tar({"b": bytes(1001)}), "1,001 bytes in one file"),
    ],
)
def test_damage_and_large_files_are_errors(content, message):
    with pytest.raises(ValueError, match=message):
        read(content, ["b"])


def test_limits_hold_for_files_that_are_not_wanted(monkeypatch):
    monkeypatch.setattr(tars, "_MAX_INFLATED_BYTES", 1200)
    with pytest.raises(ValueError, match="512 bytes in one file"):
        read(tar(FILES), ["c"])
    monkeypatch.setattr(tars, "_MAX_GZIPPED_MEMBERS", 1)
    with pytest.raises(ValueError, match="more than 1 files"):
        read(tar(FILES), ["c"])


def test_a_damaged_compression_is_an_error():
    whole = bytearray(gzip.compress(tar(FILES)))
    whole[20] ^= 255
    with pytest.raises(ValueError):
        tars.read_gzipped(io.BytesIO(bytes(whole)), ["c"], max_bytes=10)
