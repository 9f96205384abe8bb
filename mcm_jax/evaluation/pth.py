"""Reads the tensors of a .pth file without torch and without running any code from it.

There are two layouts. Since torch 1.6 a .pth is a zip archive with the state dict in ARCHIVE/data.pkl and
the raw numbers of each storage in ARCHIVE/data/KEY. Before that it was a sequence of five pickles (magic
number, protocol version, system info, state dict, storage keys), followed for each key by a little-endian
int64 count and the raw numbers. A pickle may call any function that it names; this unpickler resolves only
the names that a state dict needs.
"""

import io
import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from mcm_jax.system.errors import InputError

_MAGIC = 0x1950A86A20F9469CFC6C
_STORAGES = {
    "FloatStorage": "<f4",
    "DoubleStorage": "<f8",
    "HalfStorage": "<f2",
    "LongStorage": "<i8",
    "IntStorage": "<i4",
}


class _Storage(NamedTuple):
    key: str
    dtype: np.dtype
    length: int


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def recognises(content: bytes) -> bool:
    """Whether `content` begins like one of the two layouts."""
    return content.startswith((b"PK\x03\x04", pickle.dumps(_MAGIC, protocol=2)))


def read(content: bytes, *, name: str) -> dict[str, np.ndarray]:
    """Reads the state dict in `content` as a dict of independent C-order arrays.

    Args:
      name: the file's name, for the error message.

    Raises:
      InputError: the content is not a plain state dict, whether malicious or merely damaged.
    """
    file = io.BytesIO(content)
    try:
        return _read_archive(file) if zipfile.is_zipfile(file) else _read_legacy(file)
    # A malicious or truncated pickle can raise any exception; in every case the file is unusable.
    except Exception as error:
        raise InputError(f"{name}: not a .pth of plain tensors ({' '.join(str(error).split())})") from error


def _read_archive(file: io.BytesIO) -> dict[str, np.ndarray]:
    with zipfile.ZipFile(file) as archive:
        (pickled,) = [name for name in archive.namelist() if name.split("/")[1:] == ["data.pkl"]]
        folder = pickled.removesuffix("data.pkl")
        if f"{folder}byteorder" in archive.namelist() and archive.read(f"{folder}byteorder") != b"little":
            raise ValueError("big-endian numbers are not supported")
        tensors = _tensors(_Unpickler(io.BytesIO(archive.read(pickled))).load())
        storages = {
            key: _numbers(archive.read(f"{folder}data/{key}"), storage)
            for key, storage in _storages(tensors).items()
        }
    return _arrays(tensors, storages)


def _read_legacy(file: io.BytesIO) -> dict[str, np.ndarray]:
    file.seek(0)
    if _Unpickler(file).load() != _MAGIC:
        raise ValueError("wrong magic number")
    for _ in ("protocol version", "system info"):
        _Unpickler(file).load()
    tensors, keys = _tensors(_Unpickler(file).load()), _Unpickler(file).load()
    wanted = _storages(tensors)
    storages = {}
    for key in keys:
        count = int.from_bytes(file.read(8), "little", signed=True)
        if count != wanted[key].length:
            raise ValueError("truncated")
        storages[key] = _numbers(file.read(count * wanted[key].dtype.itemsize), wanted[key])
    return _arrays(tensors, storages)


def _tensors(state: Mapping[str, object]) -> dict[str, _Tensor]:
    return {name: value for name, value in state.items() if isinstance(value, _Tensor)}


def _storages(tensors: dict[str, _Tensor]) -> dict[str, _Storage]:
    return {tensor.storage.key: tensor.storage for tensor in tensors.values()}


def _numbers(data: bytes, storage: _Storage) -> np.ndarray:
    if len(data) != storage.length * storage.dtype.itemsize:
        raise ValueError("truncated")
    return np.frombuffer(data, storage.dtype)


def _arrays(tensors: dict[str, _Tensor], storages: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: _as_array(tensor, storages[tensor.storage.key]) for name, tensor in tensors.items()}


class _Unpickler(pickle.Unpickler):
    """Resolves OrderedDict, torch's tensor rebuilding and its storage classes; refuses every other name."""

    def find_class(self, module: str, name: str) -> object:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild_tensor
        if module == "torch" and name in _STORAGES:
            return np.dtype(_STORAGES[name])
        raise pickle.UnpicklingError(f"it refers to {module}.{name}, which no state dict needs")

    def persistent_load(self, reference: tuple[Any, ...]) -> _Storage:
        # The legacy layout has a sixth entry, which describes a view.
        kind, dtype, key, _, count, *view = reference
        if kind != "storage" or view not in ([], [None]):
            raise pickle.UnpicklingError("storage views are not supported")
        return _Storage(key, dtype, count)


def _rebuild_tensor(
    storage: _Storage, offset: int, shape: Iterable[int], strides: Iterable[int], *_: object
) -> _Tensor:
    return _Tensor(storage, offset, tuple(shape), tuple(strides))


def _as_array(tensor: _Tensor, numbers: np.ndarray) -> np.ndarray:
    """Copies a strided view of the storage; raises ValueError if the view would leave the storage."""
    sizes = (tensor.offset, *tensor.shape, *tensor.strides)
    last = tensor.offset + sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.strides, strict=True)
    )
    if min(sizes) < 0 or 0 in tensor.shape or last >= len(numbers) or math.prod(tensor.shape) > len(numbers):
        raise ValueError("a tensor reaches outside its storage")
    steps = [stride * numbers.itemsize for stride in tensor.strides]
    return np.lib.stride_tricks.as_strided(numbers[tensor.offset :], tensor.shape, steps).copy()
