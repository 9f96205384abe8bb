"""Arrays come out as they went in, and nothing in a pickle is run."""

import pickle

import numpy as np
import pytest

from mcm_jax.system import pickles
from mcm_jax.system.errors import InputError
from tests.limits import refusal

ARRAYS = {
    "floats": np.arange(6.0).reshape(2, 3),
    "columns": np.asfortranarray(np.arange(6.0, dtype=np.float32).reshape(2, 3)),
    "bytes": np.arange(256, dtype=np.uint8),
    "empty": np.zeros((0, 4)),
    "big-endian": np.arange(3, dtype=">i4"),
    "point": np.array(2.5),
}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_arrays_as_they_went_in(protocol):
    value = {"a": ARRAYS, "b": [1, 2.5, "text", None, True, (3,)], "c": np.float32(1.5), "d": b"\xff\x00"}
    found = pickles.read(pickle.dumps(value, protocol=protocol), name="x")
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(found["a"][name], array)
        assert found["a"][name].dtype == array.dtype
    assert found["b"] == value["b"] and found["c"] == np.float32(1.5) and found["d"] == value["d"]


class Evil:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def touch(path):
    open(path, "w").close()


@pytest.mark.parametrize("wrap", [lambda evil: evil, lambda evil: {"mu": [evil]}])
def test_nothing_is_run(wrap, tmp_path):
    marker = tmp_path / "marker"
    calls = ((touch, str(marker)), (eval, f"open({str(marker)!r}, 'w')"), (open, str(marker), "w"))
    for evil in (Evil(*call) for call in calls):
        content = pickle.dumps(wrap(evil))
        with pytest.raises(InputError, match=r"x: not a pickle of plain arrays .*which no array needs"):
            pickles.read(content, name="x")
        assert not marker.exists()
        pickle.loads(content)
        assert marker.exists()
        marker.unlink()


STRANGE = (np.array([{}], object), np.zeros(2, [("a", "f4")]), np.array(["2020-01-01"], "datetime64[D]"))


@pytest.mark.parametrize("value", [*STRANGE, {1, 2}])
def test_other_things_are_refused(value):
    with pytest.raises(InputError, match="not a pickle of plain arrays"):
        pickles.read(pickle.dumps(value), name="x")


def test_cut_off_or_no_pickle():
    content = pickle.dumps(ARRAYS)
    for damaged in (content[:-1], content[:30], b"", b"text"):
        with pytest.raises(InputError, match="not a pickle"):
            pickles.read(damaged, name="x")


def doubled(empty: bytes, pair: bytes, times: int = 60) -> bytes:
    """A pickle of nested pairs; both parts of each pair are the same object."""
    body = b"".join(b"q%c" % n + b"h%c" % n + pair for n in range(times))
    return b"\x80\x02" + empty + body + b"."


def repeated(value: bytes, times: int) -> bytes:
    """A pickle of a list that refers to one object again and again."""
    return b"\x80\x02](" + value + b"q\x00" + b"h\x00" * times + b"e."


LONG_TEXT = b"X" + (10**6).to_bytes(4, "little") + b"a" * 10**6
ENCODED = b"c_codecs\nencode\nq\x01" + LONG_TEXT + b"q\x02X\x06\0\0\0latin1q\x03"
BOMBS = {
    "tuples of tuples": (doubled(b")", b"\x86"), "values"),
    "lists": (b"\x80\x02]" + b"".join(b"q%c](h%ch%ce" % (n, n, n) for n in range(60)) + b".", "values"),
    "a key of tuples": (b"\x80\x02}" + doubled(b")", b"\x86")[2:-1] + b"K\x01s.", "tuple in place of a str"),
    "a set of tuples": (b"\x80\x04\x8f(" + doubled(b")", b"\x86")[2:-1] + b"\x90.", "ADDITEMS"),
    "duplicates": (b"\x80\x02)" + b"2\x86" * 60 + b".", "DUP"),
    "a list in itself": (b"\x80\x02]q\x00h\x00a.", "levels"),
    "deep lists": (b"\x80\x02" + b"]" * 1000 + b"a" * 999 + b".", "levels"),
    "deep tuples": (b"\x80\x02)" + b"\x85" * 90_000 + b".", "levels"),
    "instructions": (b"\x80\x02](" + b"N" * 10**7 + b"e.", "100,000 instructions"),
    "one text many times": (repeated(LONG_TEXT, 50_000), "10 copies"),
    "one text encoded many times": (
        b"\x80\x02](" + ENCODED + b"h\x01h\x02h\x03\x86R" * 30_000 + b"e.", "copied more than 10"
    ),
    "one array many times": (pickle.dumps([np.zeros(10**6)] * 1000), "10 copies"),
    "arguments many times": (
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\nq\x01("
        + b"N" * 40_000 + b"tq\x02](" + b"h\x01h\x02R" * 15_000 + b"e.", "copied more than 10"
    ),
    "a long key": (b"\x80\x02}" + LONG_TEXT + b"K\x01s.", "a key of more than 1,000"),
    "a memo of gigabytes": (b"\x80\x02Nr\xff\xff\xff\x7f.", None),
    "bytes of terabytes": (b"\x80\x04\x8e" + (10**13).to_bytes(8, "little") + b"ab.", "expected"),
    "a frame of terabytes": (b"\x80\x04\x95" + (10**13).to_bytes(8, "little") + b"N.", None),
    "a long integer": (b"\x80\x02\x8b" + (10**6).to_bytes(4, "little") + b"1" * 10**6 + b".", "64 bits"),
    "an array made by its class": (
        b"\x80\x02cnumpy\nndarray\n" + b"\x8a\x06" + (10**13).to_bytes(6, "little") + b"\x85R.", "NoneType"
    ),
    "a shape of a terabyte": (
        pickle.dumps(np.zeros((3, 5)), 2).replace(b"K\x03K\x05\x86", 2 * b"J\xff\xff\xff\x7f" + b"\x86"),
        "truncated",
    ),
    "a dtype with fields": (pickle.dumps(np.zeros(2, "V4"), 2), "an array of V4"),
}  # fmt: skip


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_is_one_line(bomb):
    content, message = BOMBS[bomb]
    found = refusal(lambda: pickles.read(content, name="x.pkl"))
    if message is None:  # There is nothing wrong with what it holds.
        assert found is None
    else:
        assert found is not None and message in found and "x.pkl: not a pickle of plain arrays" in found


def test_a_part_may_be_used_several_times():
    shared = (3, "text")
    array = np.arange(5.0)
    found = pickles.read(pickle.dumps([shared, shared, {"a": array, "b": array}]), name="x")
    assert found[0] == found[1] == shared
    np.testing.assert_array_equal(found[2]["b"], array)
