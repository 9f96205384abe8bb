"""Arrays come out as they went in, and nothing in a pickle is run."""

import pickle

import numpy as np
import pytest

from mcm_jax.evaluation import pickles
from mcm_jax.system.errors import InputError

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
