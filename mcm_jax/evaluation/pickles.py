"""Reads dictionaries, lists, numbers, text and NumPy arrays from a pickle without running any code from it.

A pickle may call any function that it names. This unpickler resolves only the names that NumPy's arrays need,
and maps them to functions of this module.
"""

import io
import math
import pickle
from typing import Any, Literal

import numpy as np

from mcm_jax.system.errors import InputError

# What a pickle may hold here: nested dictionaries, lists, numbers, text and arrays.
Plain = Any


def read(content: bytes, *, name: str) -> Plain:
    """Returns the content of the pickle.

    Args:
      name: the file's name, for the error message.

    Raises:
      InputError: the pickle holds anything else, whether malicious or merely damaged.
    """
    try:
        return _plain(_Unpickler(io.BytesIO(content), encoding="latin1").load())
    # A malicious or truncated pickle can raise any exception; in every case the file is unusable.
    except Exception as error:
        raise InputError(f"{name}: not a pickle of plain arrays ({' '.join(str(error).split())})") from error


class _Array:
    """Placeholder for an array during unpickling: NumPy's pickles create it empty and then set its state."""

    def __init__(self) -> None:
        self.value: np.ndarray | None = None

    def __setstate__(self, state: tuple[Plain, ...]) -> None:
        *_, shape, dtype, is_fortran, data = state
        self.value = _from_buffer(data, dtype, shape, "F" if is_fortran else "C")


def _from_buffer(
    data: bytes | bytearray | str, dtype: object, shape: tuple[int, ...], order: Literal["C", "F"] = "C"
) -> np.ndarray:
    """Replaces numpy._core.numeric._frombuffer; numbers and text only."""
    if not isinstance(dtype, np.dtype) or dtype.kind not in "biufSU":
        raise pickle.UnpicklingError(f"an array of {dtype}")
    data = data.encode("latin1") if isinstance(data, str) else data
    if min(shape, default=0) < 0 or len(data) != math.prod(shape) * dtype.itemsize:
        raise pickle.UnpicklingError("an array is truncated")
    return np.frombuffer(data, dtype).reshape(shape, order=order)


def _empty(*_: object) -> _Array:
    """Replaces numpy._core.multiarray._reconstruct."""
    return _Array()


def _scalar(dtype: object, data: bytes | str) -> Plain:
    """Replaces numpy._core.multiarray.scalar."""
    return _from_buffer(data, dtype, ())[()]


def _encode(text: str, encoding: str) -> bytes:
    """Replaces _codecs.encode, which Python 3 uses to write bytes in pickles for Python 2."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"text as {encoding}")
    return text.encode(encoding)


def _no_bytes() -> bytes:
    """Replaces the call of `bytes` that such pickles use for b""."""
    return b""


_KNOWN = {
    ("__builtin__", "bytes"): _no_bytes,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): _encode,
} | {
    (f"numpy.{core}.{module}", name): function
    for core in ("core", "_core")
    for module, name, function in (
        ("multiarray", "_reconstruct", _empty),
        ("multiarray", "scalar", _scalar),
        ("numeric", "_frombuffer", _from_buffer),
    )
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> object:
        if (module, name) not in _KNOWN:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}, which no array needs")
        return _KNOWN[module, name]


def _plain(value: object) -> Plain:
    """`value` with each `_Array` replaced by its array."""
    if isinstance(value, _Array):
        if value.value is None:
            raise pickle.UnpicklingError("an array without numbers")
        return value.value
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_plain(part) for part in value)
    if value is None or isinstance(value, bool | int | float | str | bytes | np.generic | np.ndarray):
        return value
    raise pickle.UnpicklingError(f"a {type(value).__name__}")
