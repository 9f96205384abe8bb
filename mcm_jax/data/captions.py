"""Captions of the images in a folder: captions.jsonl, or a text file beside each image."""

import dataclasses
import pathlib
from collections.abc import Iterable, Mapping, Sequence

from mcm_jax.system import json_text
from mcm_jax.system.errors import InputError, printable, reason
from mcm_jax.system.files import read_if_exists
from mcm_jax.system.paths import Path

FILE = "captions.jsonl"
_FORM = '{"file": "a.png", "caption": "a cat on a sofa"}'
_MAX_CHARACTERS = 10_000
# Up to this many broken lines and images without a caption are named.
_FEW = 5


@dataclasses.dataclass(frozen=True)
class Captions:
    """Maps each image to its caption, which is empty if it has none.

    `used` counts the files that hold captions by suffix; `notes` are one-line messages to the user.
    """

    texts: Mapping[str, str]
    used: Mapping[str, int]
    notes: tuple[str, ...]


def read(root: Path, images: Sequence[str], *, text_files: bool) -> Captions | None:
    """Reads the captions of the images in `root`; None if there are none.

    Args:
      images: paths relative to `root`.
      text_files: whether to look for a text file beside each image if there is no captions.jsonl.

    Raises:
      InputError: captions.jsonl has no usable line.
    """
    content = read_if_exists(root / FILE)
    if content is not None:
        texts, broken = _of_lines(content.splitlines(), images)
        if not texts:
            example = f" (line {broken[0]})" if broken else ""
            raise InputError(
                f"{printable(root / FILE)}: no line has a caption of an image{example}; write lines like "
                f"{_FORM}, or remove the file"
            )
        used, kind = {".jsonl": 1}, f"lines of {FILE}"
    else:
        texts, broken, count = _of_files(root, images) if text_files else ({}, [], 0)
        used, kind = {".txt": count}, "text files"
        if not count:
            return None
    missing = [printable(name) for name in images if name not in texts]
    notes = [
        f"{len(broken)} {kind} are skipped: {first(broken)}" if broken else "",
        f"{len(missing)} images without a caption get an empty one: {first(missing)}" if missing else "",
    ]
    return Captions({name: texts.get(name, "") for name in images}, used, tuple(filter(None, notes)))


def _of_lines(lines: Iterable[bytes], images: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """The captions by image, and 'NUMBER: REASON' for each broken line."""
    known, texts, broken = frozenset(images), {}, []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            name, text = _of_line(line)
            if name not in known:
                raise ValueError(f"there is no image {printable(name)}")
            if name in texts:
                raise ValueError(f"a second caption of {printable(name)}")
            texts[name] = text
        except ValueError as error:
            broken.append(f"{number}: {reason(error)}")
    return texts, broken


def _of_line(line: bytes) -> tuple[str, str]:
    entry = json_text.loads(line)
    if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) for key in ("file", "caption")):
        raise ValueError(f"not of the form {_FORM}")
    return entry["file"].removeprefix("./"), checked(entry["caption"])


def _of_files(root: Path, images: Sequence[str]) -> tuple[dict[str, str], list[str], int]:
    """The captions by image, 'FILE: REASON' for each broken text file, and the number of text files."""
    texts, broken = {}, {}
    files = {name: str(pathlib.PurePosixPath(name).with_suffix(".txt")) for name in images}
    for name, file in files.items():
        try:
            content = read_if_exists(root / file)
            if content is not None:
                texts[name] = checked(content.decode("utf-8-sig"))
        except ValueError as error:
            broken[file] = f"{printable(file)}: {reason(error)}"
    # Images of one name but different suffixes share a text file.
    return texts, list(broken.values()), len({files[name] for name in texts} | set(broken))


def checked(text: str) -> str:
    """The caption on one line; ValueError if it is empty, too long or no Unicode."""
    text = " ".join(text.split())
    text.encode()
    if not text:
        raise ValueError("an empty caption")
    if len(text) > _MAX_CHARACTERS:
        raise ValueError(f"a caption of {len(text):,} characters, more than {_MAX_CHARACTERS:,}")
    return text


def first(names: Sequence[str]) -> str:
    """The first few names, and the number of the others."""
    more = f"; and {len(names) - _FEW} more" if len(names) > _FEW else ""
    return "; ".join(names[:_FEW]) + more
