"""Archives are read as NumPy reads them; one that inflates to or declares too much is refused before."""

import io
import re
import struct
import zipfile

import numpy as np
import pytest

from mcm_jax.evaluation.image_files import open_images
from mcm_jax.evaluation.published import load_arrays
from mcm_jax.system import archives
from tests.limits import refusal

ARRAYS = {
    "images": np.arange(24, dtype=np.uint8).reshape(2, 4, 3),
    "columns": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "part/name": np.array(2.5),
    "empty": np.zeros((0, 3)),
    "text": np.array(["a", "bc"]),
}


def npy(header: str, data: bytes = b"", version=1) -> bytes:
    text = header.encode("latin1")
    length = struct.pack("<H" if version == 1 else "<I", len(text))
    return b"\x93NUMPY" + bytes([version, 0]) + length + text + data


def header(shape: str, descr: str = "'<f8'") -> str:
    return f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}\n"


def zipped(members: dict[str, bytes], method=zipfile.ZIP_DEFLATED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as made:
        for name, content in members.items():
            made.writestr(name, content)
    return file.getvalue()


def with_bytes(content: bytes, place: int, value: bytes) -> bytes:
    return content[:place] + value + content[place + len(value) :]


def declaring(size: int, data: bytes = bytes(1000)) -> bytes:
    """An archive whose directory and header declare another size of its member than it has."""
    content = zipped({"arr_0.npy": data})
    for signature, place in ((b"PK\x01\x02", 24), (b"PK\x03\x04", 22)):
        content = with_bytes(content, content.index(signature) + place, struct.pack("<I", size))
    return content


def overlapping(copies: int) -> bytes:
    """All entries of the directory point at the same member."""
    content = zipped({"0.npy": bytes(10**6)})
    start = content.index(b"PK\x01\x02")
    end = content.index(b"PK\x05\x06")
    entry = content[start:end]
    name = entry.index(b"0.npy")
    entries = b"".join(with_bytes(entry, name, bytes([48 + n])) for n in range(copies))
    counts = struct.pack("<HHII", copies, copies, len(entries), start)
    return content[:start] + entries + with_bytes(content[end:], 8, counts)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_as_numpy_wrote_them(save):
    file = io.BytesIO()
    save(file, **ARRAYS)
    found = archives.read_npz(file)
    assert list(found) == list(ARRAYS)
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == array.dtype and found[name].flags.fnc == array.flags.fnc
    assert list(archives.read_npz(file, ["text", "missing"])) == ["text"]


def test_compressed_drawings_are_read():
    """Flat colours shrink to a fiftieth and more."""
    file = io.BytesIO()
    np.savez_compressed(file, arr_0=np.full((20, 64, 64, 3), 255, np.uint8))
    assert archives.read_npz(file)["arr_0"].shape == (20, 64, 64, 3)


BOMBS = {
    "a shape of terabytes": (zipped({"arr_0.npy": npy(header("(1000000000000,)"))}), "declares"),
    "a shape without bytes": (zipped({"arr_0.npy": npy(header("(1000000000000,)", "'<U0'"))}), "declares"),
    "a negative shape": (zipped({"arr_0.npy": npy(header("(-1,)"), bytes(8))}), "declares"),
    "a long header": (zipped({"arr_0.npy": npy(header("(1,)") + " " * 999, bytes(8))}), "header"),
    "a nested header": (zipped({"arr_0.npy": npy("-" * 9000 + "1")}), "damaged|complete"),
    "a version of the future": (zipped({"arr_0.npy": npy(header("(1,)"), bytes(8), version=9)}), "version"),
    "objects": (zipped({"arr_0.npy": npy(header("(1,)", "'|O'"), b"N.")}), "Object arrays"),
    "zeros": (zipped({"arr_0.npy": bytes(2 * 10**8)}), "inflate to 200,000,000"),
    "a declared size too large": (declaring(4 * 10**9), "inflate to 4,000,000,000"),
    "a declared size too small": (declaring(10), "CRC|magic|EOF"),
    "overlapping members": (overlapping(10), "overlap"),
    "LZMA, without a limit in Python": (zipped({"arr_0.npy": b"0"}, zipfile.ZIP_LZMA), "deflate"),
    "two members of one name": (zipped({"0.npy": b"1", "1.npy": b""}).replace(b"1.npy", b"0.npy"), "same"),
    "many members": (zipped({f"{n:0200}.npy": b"" for n in range(5000)}), "directory"),
}  # fmt: skip


@pytest.mark.parametrize("bomb", BOMBS)
@pytest.mark.parametrize("read", [load_arrays, open_images])
def test_a_bomb_is_one_line(bomb, read, tmp_path):
    content, message = BOMBS[bomb]
    path = tmp_path / "bomb.npz"
    path.write_bytes(content)
    found = refusal(lambda: read(path))
    assert found is not None and str(path) in found and re.search(message, found), found


def test_the_sum_of_a_member_is_checked():
    content = zipped({"arr_0.npy": npy(header("(1,)"), bytes(8))}, zipfile.ZIP_STORED)
    damaged = bytearray(content)
    damaged[content.index(b"\n") + 3] ^= 1
    with pytest.raises(ValueError, match="CRC"):
        archives.read_npz(io.BytesIO(bytes(damaged)))
