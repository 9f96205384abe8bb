"""Reads tensors from a .safetensors file one at a time, so that the file may be larger than the memory.

The file consists of the length of a header (little-endian uint64), the header (JSON: each tensor's dtype,
shape and place in the data) and the data. Everything that the header declares is compared with the size of
the file before memory is allocated. The library `safetensors` would need a local file or all bytes at once;
this reads from buckets and archives too.
"""

import dataclasses
import io
import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from mcm_jax.system import json_text
from mcm_jax.system.errors import shortened

# A tensor takes about 110 bytes of it; the largest CLIP has 1,300 tensors.
_MAX_HEADER_BYTES = 2**20
_MAX_DIMENSIONS = 32
_DTYPES = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(jnp.bfloat16),
    "F64": np.dtype("<f8"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
}


@dataclasses.dataclass(frozen=True)
class _Entry:
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class TensorFile:
    """The tensors of an open file.

    Attributes:
      metadata: the texts that the writer added, by name.
      shapes: the shape of each tensor by name, as declared; `read` compares it with the data.

    Examples:
      >>> import io, numpy as np, safetensors.numpy
      >>> content = safetensors.numpy.save({"a": np.arange(3.0)}, {"format": "pt"})
      >>> file = TensorFile(io.BytesIO(content))
      >>> file.shapes, file.metadata
      ({'a': (3,)}, {'format': 'pt'})
      >>> file.read("a")
      array([0., 1., 2.])
    """

    metadata: dict[str, str]
    shapes: dict[str, tuple[int, ...]]

    def __init__(self, file: io.BufferedIOBase):
        """Reads the header.

        Raises:
          ValueError: the file is damaged, or its header is larger than 1 MB.
        """
        self._file = file
        size = file.seek(0, io.SEEK_END)
        file.seek(0)
        header_bytes = int.from_bytes(file.read(8), "little")
        if header_bytes > _MAX_HEADER_BYTES:
            raise ValueError(f"a header of {header_bytes:,} bytes, more than {_MAX_HEADER_BYTES:,}")
        self._start = 8 + header_bytes
        if self._start > size:
            raise ValueError(f"truncated: the file has {size:,} bytes")
        header = json_text.loads(file.read(header_bytes))
        if not isinstance(header, dict):
            raise ValueError("the header is not a JSON object")
        self.metadata = _metadata(header.pop("__metadata__", {}))
        self._entries = {name: _entry(name, value) for name, value in header.items()}
        _check_places(self._entries, size - self._start)
        self.shapes = {name: entry.shape for name, entry in self._entries.items()}

    def read(self, name: str) -> np.ndarray:
        """Reads one tensor in its stored dtype; the array is read-only.

        Raises:
          KeyError: there is no tensor of this name.
          ValueError: its dtype is unknown, or its shape does not fit its data.
        """
        entry = self._entries[name]
        if entry.dtype not in _DTYPES:
            known = ", ".join(_DTYPES)
            raise ValueError(f"{shortened(name)} has the dtype {shortened(entry.dtype)}, not one of {known}")
        dtype, stored = _DTYPES[entry.dtype], entry.end - entry.begin
        if math.prod(entry.shape) * dtype.itemsize != stored:
            raise ValueError(
                f"{shortened(name)} declares {entry.dtype} {entry.shape} but has {stored:,} bytes"
            )
        self._file.seek(self._start + entry.begin)
        data = self._file.read(stored)
        if len(data) != stored:
            raise ValueError(f"truncated within {shortened(name)}")
        return np.frombuffer(data, dtype).reshape(entry.shape)


def _metadata(value: Any) -> dict[str, str]:
    if not (isinstance(value, dict) and all(isinstance(text, str) for text in value.values())):
        raise ValueError("the metadata are not texts by name")
    return value


def _entry(name: str, value: Any) -> _Entry:
    if not (isinstance(value, dict) and set(value) == {"dtype", "shape", "data_offsets"}):
        raise ValueError(f"the description of {shortened(name)} is damaged")
    dtype, shape, place = value["dtype"], value["shape"], value["data_offsets"]
    lists = isinstance(shape, list) and isinstance(place, list) and len(place) == 2
    if not (lists and isinstance(dtype, str) and len(shape) <= _MAX_DIMENSIONS):
        raise ValueError(f"the description of {shortened(name)} is damaged")
    # A bool is an int for isinstance.
    if not all(type(number) is int and number >= 0 for number in (*shape, *place)):
        raise ValueError(f"the description of {shortened(name)} is damaged")
    return _Entry(dtype, tuple(shape), place[0], place[1])


def _check_places(entries: dict[str, _Entry], size: int) -> None:
    """Raises ValueError unless the tensors fill the data without gaps and overlaps."""
    end = 0
    for entry in sorted(entries.values(), key=lambda entry: (entry.begin, entry.end)):
        if entry.begin != end or entry.end < entry.begin:
            raise ValueError("its tensors overlap, or have gaps between them")
        end = entry.end
    if end != size:
        raise ValueError(
            f"truncated or damaged: its tensors take {end:,} bytes, but {size:,} follow the header"
        )
