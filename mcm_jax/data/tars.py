"""Lists and reads tar files header by header.

Python's own reader trusts headers: with damaged ones it can loop, recurse or read any number of bytes.
"""

import dataclasses
import gzip
import io
import tarfile
import zlib
from collections.abc import Collection

from mcm_jax.system.errors import InputError, printable, reason

BLOCK = 512  # bytes in a block of a tar
# Types of entries: links, devices and folders; files, and attributes of the following file.
WITHOUT_CONTENT = (
    tarfile.LNKTYPE,
    tarfile.SYMTYPE,
    tarfile.CHRTYPE,
    tarfile.BLKTYPE,
    tarfile.DIRTYPE,
    tarfile.FIFOTYPE,
)
_WITH_CONTENT = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.XHDTYPE, tarfile.XGLTYPE)
# The package @iconify/json inflates to 486 MB in 255 files.
_MAX_INFLATED_BYTES = 2**31
_MAX_GZIPPED_MEMBERS = 10_000


def header(block: bytes) -> tarfile.TarInfo | None:
    """Parses the header of an entry; None for the empty block that ends an archive.

    Raises:
      tarfile.TarError, ValueError: it is no header, or one of an entry that is neither a file nor a link.
    """
    try:
        entry = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.EOFHeaderError:  # pyright: ignore[reportAttributeAccessIssue]
        return None
    if entry.type not in (*WITHOUT_CONTENT, *_WITH_CONTENT):
        raise ValueError(f"an entry of type {entry.type.decode(errors='replace')!r}")
    return entry


@dataclasses.dataclass(frozen=True)
class Member:
    """A file in a tar."""

    name: str
    offset: int  # where its data begins
    size: int


def members(file: io.BufferedIOBase, name: str, *, most: int) -> list[Member]:
    """Lists every file in a tar by its headers.

    Args:
      name: name of the tar, for messages.
      most: the largest number of files.

    Raises:
      InputError: the tar is truncated, damaged or exceeds the limit.
    """
    end, offset, found = file.seek(0, io.SEEK_END), 0, []
    try:
        while (entry := _header_at(file, offset)) is not None:
            if len(found) >= most:
                raise ValueError(f"more than {most:,} files")
            offset += BLOCK
            size = entry.size if entry.type not in WITHOUT_CONTENT else 0
            if not 0 <= size <= end - offset:
                raise ValueError(f"a file of {size:,} bytes where {end - offset:,} follow")
            if entry.type in (tarfile.REGTYPE, tarfile.AREGTYPE):
                found.append(Member(printable(entry.name), offset, size))
            offset += -(-size // BLOCK) * BLOCK
    except (tarfile.TarError, ValueError) as error:
        raise InputError(
            f"{name} is not a tar file or is truncated ({reason(error)}); download it again"
        ) from error
    return found


def _header_at(file: io.BufferedIOBase, offset: int) -> tarfile.TarInfo | None:
    """The header at an offset, as in `header`."""
    file.seek(offset)
    return header(file.read(BLOCK))


def read_gzipped(file: io.BufferedIOBase, names: Collection[str], *, max_bytes: int) -> dict[str, bytes]:
    """Reads the named files, those of them that exist, from a .tgz in one pass.

    Args:
      max_bytes: most bytes of one file.

    Raises:
      ValueError: the archive is damaged or truncated, or exceeds a limit.
    """
    found, inflated = {}, 0
    try:
        with gzip.GzipFile(fileobj=file) as tar:
            for _ in range(_MAX_GZIPPED_MEMBERS):
                if (entry := header(tar.read(BLOCK))) is None:
                    return found
                size = entry.size if entry.type not in WITHOUT_CONTENT else 0
                inflated += size
                wanted = entry.name in names
                if not 0 <= size <= inflated <= _MAX_INFLATED_BYTES or (wanted and size > max_bytes):
                    raise ValueError(f"{size:,} bytes in one file")
                content = _read(tar, size, keep=wanted)
                _read(tar, -size % BLOCK, keep=False)
                if wanted:
                    found[entry.name] = content
                if len(found) == len(names):
                    return found
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise ValueError(str(error)) from error
    raise ValueError(f"more than {_MAX_GZIPPED_MEMBERS:,} files")


def _read(tar: gzip.GzipFile, size: int, *, keep: bool) -> bytes:
    """Reads `size` bytes; returns them, or none of them if they are not to be kept.

    Raises:
      EOFError: the archive has fewer.
    """
    parts, left = [], size
    while left:
        part = tar.read(min(left, 2**20))
        if not part:
            raise EOFError(f"it ends {left:,} bytes early")
        left -= len(part)
        if keep:
            parts.append(part)
    return b"".join(parts)
