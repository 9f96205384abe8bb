"""Opens zip archives from outside (.npz, .pth); no limit is exceeded before it is checked.

A few kilobytes of zip can inflate to any number of gigabytes, and a header of an array can declare any shape.
Both are compared with the size of the file before memory is allocated.
"""

import io
import math
import zipfile
from collections.abc import Collection
from typing import Any

import numpy as np

from mcm_jax.system.errors import reason

# A member takes about 70 bytes of the directory. Inception's .pth has 500 members.
_MAX_DIRECTORY_BYTES = 2**20
# Deflate shrinks zeros to 1/1,032, but photos to a half and flat drawings to a fiftieth. Most .npz files are
# stored without compression: 50,000 images of 256x256 take 9.8 GB, in the archive as in memory.
_MAX_RATIO = 100
# Small files may have any ratio.
_UNLIMITED_BYTES = 10**8
# NumPy evaluates a header as Python. Numbers and text take 120 characters; nested brackets take memory.
_MAX_HEADER_CHARACTERS = 500
_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def read_npz(file: io.BufferedIOBase, names: Collection[str] | None = None) -> dict[str, np.ndarray]:
    """Reads arrays from an .npz file.

    Args:
      file: the file, open in binary mode.
      names: reads only these arrays, those of them that exist; None: all.

    Raises:
      ValueError: the file is damaged or not an .npz, holds Python objects, or exceeds a limit.
    """
    try:
        with open_zip(file) as archive:
            members = {
                info.filename.removesuffix(".npy"): info
                for info in archive.infolist()
                if info.filename.endswith(".npy")
            }
            wanted = members if names is None else [name for name in names if name in members]
            return {name: _read_npy(archive, members[name]) for name in wanted}
    # A damaged file can raise any exception of the zip and npy readers; all mean the same.
    except Exception as error:
        raise ValueError(reason(error)) from error


def open_zip(file: io.BufferedIOBase) -> zipfile.ZipFile:
    """Opens a zip archive whose members together inflate to a reasonable size.

    While a member is read, `zipfile` returns no more bytes than the directory declares.

    Raises:
      ValueError, zipfile.BadZipFile: the archive is damaged or exceeds a limit.
    """
    size = file.seek(0, io.SEEK_END)
    limited: Any = _LimitedReads(file)
    archive = zipfile.ZipFile(limited)
    limited.max_bytes = None
    infos = archive.infolist()
    if len({info.filename for info in infos}) != len(infos):
        raise ValueError("two members have the same name")
    # Python's readers of other compressions inflate without a limit.
    if any(info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for info in infos):
        raise ValueError("a member is compressed with another method than deflate")
    if sum(info.compress_size for info in infos) > size:
        raise ValueError("its members overlap")
    inflated, limit = sum(info.file_size for info in infos), max(_UNLIMITED_BYTES, _MAX_RATIO * size)
    if inflated > limit:
        raise ValueError(f"its {size:,} bytes inflate to {inflated:,}, more than {_MAX_RATIO} times as many")
    return archive


def _read_npy(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    """Reads one array, after a comparison of the size in its header with the size of the member."""
    with archive.open(info) as member:
        version = np.lib.format.read_magic(member)
        if version not in _HEADERS:
            raise ValueError(f"{info.filename} has version {version} of the format .npy")
        shape, _, dtype = _HEADERS[version](member, _MAX_HEADER_CHARACTERS)
        declared, stored = math.prod(shape) * dtype.itemsize, info.file_size - member.tell()
    if min(shape, default=0) < 0 or dtype.itemsize == 0 or (declared != stored and not dtype.hasobject):
        raise ValueError(f"{info.filename} declares {dtype} {shape} but has {stored:,} bytes")
    with archive.open(info) as member:
        return np.lib.format.read_array(member, allow_pickle=False)


class _LimitedReads:
    """A file that refuses to read more than `max_bytes` at once: `zipfile` reads a directory of any size."""

    def __init__(self, file: io.BufferedIOBase):
        self._file = file
        self.max_bytes: int | None = _MAX_DIRECTORY_BYTES

    def read(self, size: int = -1) -> bytes:
        if self.max_bytes is not None and size > self.max_bytes:
            raise ValueError(f"its directory has more than {self.max_bytes:,} bytes")
        return self._file.read(size)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)
