"""Reads tar files header by header.

Python's own reader trusts headers: with damaged ones it can loop, recurse or read any number of bytes.
"""

import gzip
import io
import tarfile
import zlib
from collections.abc import Collection

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
