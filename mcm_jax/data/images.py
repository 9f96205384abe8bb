"""Which files of a folder are images, and how one is decoded: the same for `prepare` and for `evaluate`."""

import collections
import contextlib
import dataclasses
import hashlib
import os
import struct
import warnings
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path

from PIL import ExifTags, Image

from mcm_jax.system.errors import InputError

# The formats of pictures that Pillow decodes by itself. Others are left out: icons and textures hold several
# sizes, and Ghostscript would run for EPS.
FORMATS = tuple(
    name
    for name in "JPEG PNG WEBP AVIF GIF BMP DIB JPEG2000 PCX PPM QOI SGI TGA TIFF".split()
    if name in Image.registered_extensions().values() and name in Image.OPEN
)
SUFFIXES = frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS)

# What Pillow's decoders raise on damaged files. They document less: mutated files show it.
DAMAGE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    Image.DecompressionBombError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    struct.error,
    SyntaxError,
    TypeError,
    ValueError,
)

# How many kinds of other files a note lists.
_FEW_KINDS = 10

# EXIF's orientation -> what turns the stored pixels upright.
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
    """The images below a folder, as sorted paths in it, and how many other files there are of each kind."""

    files: tuple[str, ...]
    passed_over: Mapping[str, int]

    def note(self) -> str:
        """'passed over: 3 .heic, 1 hidden'; empty if every file is an image."""
        kinds = sorted(self.passed_over.items(), key=lambda item: (-item[1], item[0]))
        named = [f"{count} {kind}" for kind, count in kinds[:_FEW_KINDS]]
        if len(kinds) > _FEW_KINDS:
            named.append(f"{sum(count for _, count in kinds[_FEW_KINDS:])} others")
        return f"passed over: {', '.join(named)}" if named else ""

    def what_else(self) -> str:
        """Explains why there are no images: what the folder holds, and which suffixes are read."""
        return f"{self.note() or 'it holds nothing else'}; suffixes read: {' '.join(sorted(SUFFIXES))}"


def find(root: Path) -> Found:
    """Lists the images below a folder, at any depth, by their suffixes.

    Links are followed. Hidden files and folders, whose names begin with a dot, are passed over.

    Raises:
      InputError: a folder cannot be read.
    """
    files, passed_over = [], collections.Counter()
    try:
        for name, kind in _walk(root, "", frozenset()):
            if kind:
                passed_over[kind] += 1
            else:
                files.append(name)
    except OSError as error:
        raise InputError(f"cannot read {shown(error.filename)} ({error.strerror})") from error
    return Found(tuple(sorted(files)), passed_over)


def _walk(directory: Path, inside: str, above: frozenset[tuple[int, int]]) -> Iterator[tuple[str, str]]:
    """(path, why it is passed over) of each file below; the reason is empty for an image.

    inside: the path of `directory` in the folder; above: the identities of the folders that it lies in.
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
                yield from _walk(Path(entry.path), f"{name}/", above | {identity})
            else:
                yield name, _why_not(entry)


def _why_not(entry: os.DirEntry[str]) -> str:
    suffix = Path(entry.name).suffix.lower()
    broken = entry.is_symlink() and not os.path.exists(entry.path)
    # A broken link with an image's suffix is a damaged image: reading it will fail and name it.
    if suffix in SUFFIXES and (entry.is_file() or broken):
        return ""
    return "broken link" if broken else shown(suffix) or "without a suffix"


def shown(name: str | Path) -> str:
    """The name for a message: on one line, with escapes for characters that cannot be printed."""
    printable = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(name))
    return "".join(printable)


@contextlib.contextmanager
def naming(path: str | Path, *, remedy: str = "replace or remove the file") -> Generator[None, None, None]:
    """Turns whatever Pillow raises on a damaged file into one line that names the file.

    Its warnings, about odd metadata, name no file and are dropped.
    """
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    except DAMAGE as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{shown(path)}: not a readable image ({reason}); {remedy}") from error


def turn(image: Image.Image) -> Image.Transpose | None:
    """What the camera's orientation mark asks for; None if nothing, or if the mark cannot be read.

    Pillow's `exif_transpose` also writes all other EXIF tags anew, and fails on odd ones.
    """
    try:
        # The base class's method: PNG's own decodes all pixels to find a mark behind them.
        return _TURNS.get(Image.Image.getexif(image).get(ExifTags.Base.Orientation, 0))
    except DAMAGE:
        return None


def upright(image: Image.Image) -> Image.Image:
    """Decodes an opened image, and turns it by its orientation mark."""
    image.load()
    method = turn(image)
    return image if method is None else image.transpose(method)


def content_hash(path: Path) -> str:
    """SHA-256 of a file; raises InputError if it cannot be read."""
    with naming(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
