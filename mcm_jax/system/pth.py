"""Reads the tensors of a .pth file without torch and without running any code from it.

There are two layouts. Since torch 1.6 a .pth is a zip archive with the state dict in ARCHIVE/data.pkl and
the raw numbers of each storage in ARCHIVE/data/KEY. Before that it was a sequence of five pickles (magic
number, protocol version, system info, state dict, storage keys), followed for each key by a little-endian
int64 count and the raw numbers. `pickles` executes the pickles; of all names it knows only those that a state
dict needs.
"""

import dataclasses
import io
import math
import pickle
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np

from mcm_jax.system import archives, pickles
from mcm_jax.system.errors import InputError, reason

_MAGIC = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)
# Tensors may share storages. Together they may take this many times the bytes of the storages.
_MAX_COPIES = 10
_STORAGES = {
    "FloatStorage": "<f4",
    "DoubleStorage": "<f8",
    "HalfStorage": "<f2",
    "LongStorage": "<i8",
    "IntStorage": "<i4",
}


# These have no equality of their own: comparing nested tuples can take any time.
@dataclasses.dataclass(frozen=True, eq=False)
class _Storage:
    key: str
    dtype: np.dtype
    length: int


@dataclasses.dataclass(frozen=True, eq=False)
class _Tensor:
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def recognises(content: bytes) -> bool:
    """Whether `content` begins like one of the two layouts."""
    return content.startswith((b"PK\x03\x04", _MAGIC))


def read(content: bytes, *, name: str) -> dict[str, np.ndarray]:
    """Reads the state dict in `content` as a dict of independent C-order arrays.

    Args:
      name: the file's name, for the error message.

    Raises:
      InputError: the content is not a plain state dict or exceeds a limit, whether malicious or merely
        damaged.
    """
    file = io.BytesIO(content)
    try:
        return _read_archive(file) if zipfile.is_zipfile(file) else _read_legacy(file)
    # A malicious or truncated file can raise any exception; in every case it is unusable.
    except Exception as error:
        raise InputError(
            f"{name}: not a .pth of plain tensors ({reason(error)}); get the file from its source again"
        ) from error


def read_storage(content: bytes) -> np.ndarray:
    """Reads a storage that was saved alone, in the older layout.

    Raises:
      Exception: of any class; the content is not that, or damaged.
    """
    file = io.BytesIO(content)
    # A file may contain thousands of storages, each with pickles of its own: these take few instructions.
    storage, keys = _legacy_content(file, max_instructions=200)
    if not isinstance(storage, _Storage) or keys != [storage.key]:
        raise ValueError("not one storage")
    return _legacy_numbers(file, storage)


def _read_archive(file: io.BytesIO) -> dict[str, np.ndarray]:
    with archives.open_zip(file) as archive:
        (pickled,) = [name for name in archive.namelist() if name.split("/")[1:] == ["data.pkl"]]
        folder = pickled.removesuffix("data.pkl")
        if f"{folder}byteorder" in archive.namelist() and archive.read(f"{folder}byteorder") != b"little":
            raise ValueError("big-endian numbers are not supported")
        tensors = _tensors(_unpickled(io.BytesIO(archive.read(pickled))))
        storages = {
            key: _numbers(archive.read(f"{folder}data/{key}"), storage)
            for key, storage in _storages(tensors).items()
        }
    return _arrays(tensors, storages)


def _read_legacy(file: io.BytesIO) -> dict[str, np.ndarray]:
    state, keys = _legacy_content(file)
    tensors = _tensors(state)
    wanted = _storages(tensors)
    storages = {}
    for key in keys:
        if not isinstance(key, str):
            raise ValueError("the key of a storage is not text")
        storages[key] = _legacy_numbers(file, wanted[key])
    return _arrays(tensors, storages)


def _legacy_content(file: io.BytesIO, max_instructions: int = pickles.MAX_INSTRUCTIONS) -> tuple[Any, Any]:
    """(what was saved, keys of its storages); leaves the position before the first storage's numbers."""
    file.seek(0)
    if file.read(len(_MAGIC)) != _MAGIC:
        raise ValueError("wrong magic number")
    for _ in ("protocol version", "system info"):
        _unpickled(file, max_instructions)
    return _unpickled(file, max_instructions), _unpickled(file, max_instructions)


def _legacy_numbers(file: io.BytesIO, storage: _Storage) -> np.ndarray:
    count = int.from_bytes(file.read(8), "little", signed=True)
    if count != storage.length:
        raise ValueError("truncated")
    return _numbers(file.read(count * storage.dtype.itemsize), storage)


def _tensors(state: Mapping[str, object]) -> dict[str, _Tensor]:
    return {name: value for name, value in state.items() if isinstance(value, _Tensor)}


def _storages(tensors: dict[str, _Tensor]) -> dict[str, _Storage]:
    return {tensor.storage.key: tensor.storage for tensor in tensors.values()}


def _numbers(data: bytes, storage: _Storage) -> np.ndarray:
    if len(data) != storage.length * storage.dtype.itemsize:
        raise ValueError("truncated")
    return np.frombuffer(data, storage.dtype)


def _arrays(tensors: dict[str, _Tensor], storages: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    views = {
        name: strided(storages[tensor.storage.key], tensor.offset, tensor.shape, tensor.strides)
        for name, tensor in tensors.items()
    }
    stored = sum(numbers.nbytes for numbers in storages.values())
    if sum(view.nbytes for view in views.values()) > _MAX_COPIES * stored:
        raise ValueError(f"its tensors take more than {_MAX_COPIES} times the memory of their storages")
    return {name: view.copy() for name, view in views.items()}


def _unpickled(file: io.BytesIO, max_instructions: int = pickles.MAX_INSTRUCTIONS) -> Any:
    return pickles.run(file, _KNOWN, _storage, max_instructions=max_instructions)


def _storage(reference: tuple[Any, ...]) -> _Storage:
    # The legacy layout has a sixth entry, which describes a view.
    kind, dtype, key, _, count, *view = reference
    if kind != "storage" or view not in ([], [None]):
        raise pickle.UnpicklingError("storage views are not supported")
    if not (isinstance(dtype, np.dtype) and isinstance(key, str) and isinstance(count, int)):
        raise pickle.UnpicklingError("the description of a storage is damaged")
    return _Storage(key, dtype, count)


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: object) -> _Tensor:
    """Replaces torch._utils._rebuild_tensor_v2."""
    if not (isinstance(storage, _Storage) and isinstance(shape, tuple) and isinstance(strides, tuple)):
        raise pickle.UnpicklingError("the description of a tensor is damaged")
    if not all(isinstance(one, int) for one in (offset, *shape, *strides)) or len(shape) > 64:
        raise pickle.UnpicklingError("the description of a tensor is damaged")
    return _Tensor(storage, offset, shape, strides)


_KNOWN = {
    ("collections", "OrderedDict"): pickles.dictionary_of_pairs,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
} | {("torch", name): np.dtype(code) for name, code in _STORAGES.items()}


def strided(numbers: np.ndarray, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> np.ndarray:
    """A strided view of a storage; raises ValueError if the view would leave the storage."""
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    outside = min((offset, *shape, *strides)) < 0 or last >= len(numbers)
    if outside or 0 in shape or math.prod(shape) > len(numbers):
        raise ValueError("a tensor reaches outside its storage")
    steps = [stride * numbers.itemsize for stride in strides]
    return np.lib.stride_tricks.as_strided(numbers[offset:], shape, steps)
