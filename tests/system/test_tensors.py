"""Tensors are read as the library `safetensors` reads them; what a header says is checked before."""

import io
import json

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from mcm_jax.system.tensors import TensorFile

TENSORS = {
    "matrix": np.arange(6, dtype=np.float32).reshape(2, 3),
    "half": np.array([1.5, -2], np.float16),
    "bfloat16": np.array([[0.5, 3]], jnp.bfloat16),
    "number": np.array(7.0),
    "empty": np.zeros((0, 4), np.float32),
    "long": np.arange(3),
    "int": np.arange(3, dtype=np.int32),
}


def file_of(header, data=b"", size=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return io.BytesIO((len(text) if size is None else size).to_bytes(8, "little") + text + data)


def entry(shape=(2,), dtype="F32", place=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(place)}


def test_read_as_the_library_wrote_them():
    file = TensorFile(io.BytesIO(safetensors.numpy.save(TENSORS, {"format": "pt"})))
    assert file.metadata == {"format": "pt"}
    assert file.shapes == {name: value.shape for name, value in TENSORS.items()}
    for name, value in TENSORS.items():
        found = file.read(name)
        assert found.dtype == value.dtype
        np.testing.assert_array_equal(found, value)
    with pytest.raises(KeyError):
        file.read("another")


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ([], "the header is not a JSON object"),
        (b"{", "Expecting"),
        ({"__metadata__": []}, "the metadata are not texts"),
        ({"__metadata__": {"a": 1}}, "the metadata are not texts"),
        ({"a": {"dtype": "F32", "shape": [2]}}, "the description of a is damaged"),
        ({"a": entry(shape=[-2])}, "the description of a is damaged"),
        ({"a": entry(shape=[True])}, "the description of a is damaged"),
        ({"a": entry(shape=[1] * 40)}, "the description of a is damaged"),
        ({"a": entry(place=[0, "8"])}, "the description of a is damaged"),
        ({"a": entry(place=[0, 8, 8])}, "the description of a is damaged"),
        ({"a": entry(place=(0, 10**15))}, "its tensors take 1,000,000,000,000,000 bytes, but 8 follow"),
        ({"a": entry(place=(1, 8))}, "overlap, or have gaps"),
        ({"a": entry(), "b": entry()}, "overlap, or have gaps"),
        ({"a": entry(), "b": entry(place=(8, 4))}, "overlap, or have gaps"),
        ({"a": entry(place=(0, 4))}, "its tensors take 4 bytes, but 8 follow"),
    ],
)
def test_damaged_headers(header, message):
    with pytest.raises(ValueError, match=message):
        TensorFile(file_of(header, bytes(8)))


def test_sizes_of_headers():
    with pytest.raises(ValueError, match="a header of 1,048,577 bytes, more than 1,048,576"):
        TensorFile(file_of(b" " * (2**20 + 1)))
    with pytest.raises(ValueError, match="truncated: the file has 10 bytes"):
        TensorFile(file_of(b"{}", size=3))
    with pytest.raises(ValueError, match="a header of 18,446,744,073,709,551,615 bytes"):
        TensorFile(file_of(b"{}", size=2**64 - 1))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (entry(shape=(3,)), r"a declares F32 \(3,\) but has 8 bytes"),
        (entry(shape=(10**15, 10**15)), "but has 8 bytes"),
        (entry(dtype="F8_E4M3", shape=(8,)), "a has the dtype F8_E4M3, not one of F32, F16, BF16"),
    ],
)
def test_a_tensor_that_cannot_be_read_does_not_hide_the_others(given, message):
    file = TensorFile(
        file_of({"a": given, "b": entry(place=(8, 16))}, bytes(8) + np.float32([1, 2]).tobytes())
    )
    np.testing.assert_array_equal(file.read("b"), [1, 2])
    with pytest.raises(ValueError, match=message):
        file.read("a")
