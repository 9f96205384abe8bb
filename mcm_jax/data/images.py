"""Finds and decodes the images in a folder, for both `prepare` and `evaluate`."""

import collections
import contextlib
import dataclasses
import hashlib
import io
import os
import pathlib
import struct
import warnings
from collections.abc import Generator, Iterator, Mapping

from etils import epath
from PIL import ExifTags, Image

from mcm_jax.system.errors import InputError, printable, reason
from mcm_jax.system.files import names_below, read_bytes
from mcm_jax.system.paths import Path

# Image formats that Pillow decodes by itself. Others are excluded: icons and textures hold several sizes, and
# EPS would run Ghostscript.
FORMATS = tuple(
    name
    for name in "JPEG PNG WEBP AVIF GIF BMP DIB JPEG2000 PCX PPM QOI SGI TGA TIFF".split()
    if name in Image.registered_extensions().values() and name in Image.OPEN
)
SUFFIXES = frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS)

# Exceptions that Pillow's decoders raise on damaged files, some undocumented but found by mutating files.
DAMAGE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    struct.error,
    SyntaxError,
    TypeError,
    ValueError,
)

# Maximum number of kinds of other files that a note lists.
_FEW_KINDS = 10

# EXIF orientation -> the transpose that turns the stored pixels upright.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclasses.dataclass(frozen=True)
class Found:
    """The images in a folder, as sorted relative paths, and the number of other files by kind."""

    files: tuple[str, ...]
    skipped: Mapping[str, int]

    def note(self) -> str:
        """A line such as 'skipped: 3 .heic, 1 hidden'; empty if every file is an image."""
        kinds = sorted(self.skipped.items(), key=lambda item: (-item[1], item[0]))
        named = [f"{count} {kind}" for kind, count in kinds[:_FEW_KINDS]]
        if len(kinds) > _FEW_KINDS:
            named.append(f"{sum(count for _, count in kinds[_FEW_KINDS:])} others")
        return f"skipped: {', '.join(named)}" if named else ""

    def why_none(self) -> str:
        """Explains why no images were found: what the folder holds, and which suffixes are supported."""
        return f"{self.note() or 'it holds nothing else'}; supported suffixes: {' '.join(sorted(SUFFIXES))}"


def find(root: Path) -> Found:
    """Lists the images in a folder, at any depth, by their suffixes.

    Links are followed. Hidden files and folders, whose names begin with a dot, are skipped.

    Raises:
      InputError: a folder cannot be read.
    """
    files, skipped = [], collections.Counter()
    try:
        names = _in_bucket(root) if isinstance(root, epath.Path) else _walk(root, "", frozenset())
        for name, kind in names:
            if kind:
                skipped[kind] += 1
            else:
                files.append(name)
    except OSError as error:
        raise InputError(f"cannot read {printable(error.filename)} ({error.strerror})") from error
    return Found(tuple(sorted(files)), skipped)


def _in_bucket(root: epath.Path) -> Iterator[tuple[str, str]]:
    """Yields the same as `_walk`."""
    for name in names_below(root):
        suffix = pathlib.PurePosixPath(name).suffix.lower()
        if "/." in name:
            yield name[1:], "hidden"
        else:
            yield name[1:], "" if suffix in SUFFIXES else printable(suffix) or "without a suffix"


def _walk(
    directory: pathlib.Path, inside: str, above: frozenset[tuple[int, int]]
) -> Iterator[tuple[str, str]]:
    """Yields (path, reason for skipping it) for each file in `directory`; the reason is empty for an image.

    Args:
      inside: the path of `directory` relative to the listed folder.
      above: (device, inode) of each folder above `directory`.
    """
    status = directory.stat()
    identity = (status.st_dev, status.st_ino)
    if identity in above:
        yield inside, "looping link"
        return
    with os.scandir(directory) as entries:
        for entry in entries:
            name = f"{inside}{entry.name}"
            if entry.name.startswith("."):
                yield name, "hidden"
            elif entry.is_dir():
                yield from _walk(pathlib.Path(entry.path), f"{name}/", above | {identity})
            else:
                yield name, _why_not(entry)


def _why_not(entry: os.DirEntry[str]) -> str:
    suffix = pathlib.Path(entry.name).suffix.lower()
    broken = entry.is_symlink() and not os.path.exists(entry.path)
    # A broken link with an image suffix counts as a damaged image: reading it fails with its name.
    if suffix in SUFFIXES and (entry.is_file() or broken):
        return ""
    return "broken link" if broken else printable(suffix) or "without a suffix"


@contextlib.contextmanager
def naming(path: str | Path, *, remedy: str = "replace or remove the file") -> Generator[None, None, None]:
    """Converts any exception that Pillow raises on a damaged file into a one-line error that names the file.

    Pillow's warnings about odd metadata are dropped, as they do not name the file. Its warning about images
    of more than `Image.MAX_IMAGE_PIXELS` is an error here: a few kilobytes can declare them.
    """
    try:
        with warnings.catch_warnings(action="ignore"):
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    except DAMAGE as error:
        raise InputError(f"{printable(path)}: not a readable image ({reason(error)}); {remedy}") from error


def opened(content: bytes) -> Image.Image:
    """Opens an image by its content; from a file, Pillow reads as many bytes at once as a header declares."""
    return Image.open(io.BytesIO(content), formats=FORMATS)


def rgb(name: str, content: bytes, *, remedy: str) -> Image.Image:
    """Decodes an image of a published data set in RGB. Its EXIF orientation is ignored.

    Raises:
      InputError: it cannot be decoded completely.
    """
    with naming(name, remedy=remedy), opened(content) as image:
        image.load()
        return image if image.mode == "RGB" else image.convert("RGB")


def turn(image: Image.Image) -> Image.Transpose | None:
    """The transpose for the EXIF orientation; None if none is needed or the tag cannot be read.

    Pillow's `exif_transpose` is not used because it also rewrites all other EXIF tags and fails on odd ones.
    """
    try:
        # Call the base class's method: PNG's own decodes all pixels to find a tag stored after them.
        return _TURNS.get(Image.Image.getexif(image).get(ExifTags.Base.Orientation, 0))
    except DAMAGE:
        return None


def upright(image: Image.Image) -> Image.Image:
    """Decodes an opened image and applies its EXIF orientation."""
    image.load()
    method = turn(image)
    return image if method is None else image.transpose(method)


def content_hash(path: Path) -> str:
    """SHA-256 of a file; raises InputError if it cannot be read."""
    with naming(path):
        return hashlib.sha256(read_bytes(path)).hexdigest()
