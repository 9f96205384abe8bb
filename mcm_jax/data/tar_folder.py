"""Captioned images in tar files, as WebDataset stores them: KEY.jpg beside KEY.txt or KEY.json.

A key is a path up to the first dot of its last part. A .json has the caption in its field "caption". Each tar
becomes a shard of each split. A hash of an image's file assigns it to a split, so identical copies share one.
"""

import collections
import dataclasses
import functools
import hashlib
import io
import pathlib
import sys
from collections.abc import Iterator

from mcm_jax.data import captions, folder, images, layout, splits, tars
from mcm_jax.data.shards import Shard
from mcm_jax.system import files, json_text, progress
from mcm_jax.system.errors import InputError, printable, reason
from mcm_jax.system.paths import Path

_SUFFIX = ".tar"
_MAX_MEMBERS = 1_000_000
_MAX_CAPTION_BYTES = 2**20


@dataclasses.dataclass(frozen=True)
class Item:
    """An image in a tar, and its caption, which is empty if it has none."""

    image: tars.Member
    caption: str


@dataclasses.dataclass(frozen=True)
class Listing:
    """The images of each tar; `fingerprint` identifies them, `notes` are one-line messages to the user."""

    items: dict[Path, list[Item]]
    fingerprint: str
    notes: tuple[str, ...]


def find(root: Path) -> list[Path]:
    """The tar files in a directory, in order of their names."""
    found = [path for path in files.entries(root) if path.suffix == _SUFFIX] if root.is_dir() else []
    return sorted(found, key=lambda path: path.name)


def list_tars(paths: list[Path]) -> Listing:
    """Lists images and reads captions of tar files.

    Raises:
      InputError: a tar is damaged, or there are fewer than two images.
    """
    items, digest, found = {}, hashlib.sha256(), _Notes()
    for path in progress.bar(paths, "listing"):
        with files.reading(path) as file:
            items[path] = list(_items(file, path, found))
        for item in items[path]:
            identity = f"{path.name}/{item.image.name}\0{item.image.size}\0{item.caption}\0"
            digest.update(identity.encode("utf-8", "surrogateescape"))
    if sum(map(len, items.values())) < 2:
        raise InputError(f"--manual_dir: its {len(paths)} tar files hold fewer than two images")
    return Listing(items, digest.hexdigest(), found.lines())


@dataclasses.dataclass
class _Notes:
    """What the user should know about the content of the tars."""

    others: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    broken: list[str] = dataclasses.field(default_factory=list)
    missing: list[str] = dataclasses.field(default_factory=list)

    def lines(self) -> tuple[str, ...]:
        """One line for each kind."""
        kinds = (f"{count} {printable(kind) or 'without a suffix'}" for kind, count in self.others.items())
        broken, missing = captions.first(self.broken), captions.first(self.missing)
        notes = [
            f"skipped, as no image belongs to them: {', '.join(kinds)}" if self.others else "",
            f"{len(self.broken)} captions are skipped: {broken}" if broken else "",
            f"{len(self.missing)} images without a caption get an empty one: {missing}" if missing else "",
        ]
        return tuple(filter(None, notes))


def _items(file: io.BufferedIOBase, path: Path, notes: _Notes) -> Iterator[Item]:
    """The images of a tar with their captions."""
    keys: dict[str, dict[str, tars.Member]] = collections.defaultdict(dict)
    for member in tars.members(file, str(path), most=_MAX_MEMBERS):
        key, suffix = _split(member.name)
        keys[key][suffix] = member
    for key, parts in keys.items():
        image = next((member for suffix, member in parts.items() if suffix in images.SUFFIXES), None)
        if image is None:
            notes.others.update(parts.keys())
            continue
        caption = ""
        try:
            caption = _caption(file, parts)
            if not caption:
                notes.missing.append(f"{path.name}/{image.name}")
        except ValueError as error:
            notes.broken.append(f"{path.name}/{key}: {reason(error)}")
        yield Item(image, caption)


def _split(name: str) -> tuple[str, str]:
    """'a/b.c.jpg' -> ('a/b', '.jpg'), as in WebDataset but for the last suffix only."""
    path = pathlib.PurePosixPath(name)
    return str(path.with_name(path.name.partition(".")[0])) if path.name else name, path.suffix.lower()


def _caption(file: io.BufferedIOBase, parts: dict[str, tars.Member]) -> str:
    """The caption in a .txt or .json; empty without one; ValueError if it is damaged."""
    if (member := parts.get(".txt")) is not None:
        return captions.checked(_read(file, member).decode("utf-8-sig"))
    if (member := parts.get(".json")) is not None:
        content = json_text.loads(_read(file, member))
        text = content.get("caption") if isinstance(content, dict) else None
        if not isinstance(text, str):
            raise ValueError("it has no caption")
        return captions.checked(text)
    return ""


def _read(file: io.BufferedIOBase, member: tars.Member) -> bytes:
    if member.size > _MAX_CAPTION_BYTES:
        raise ValueError(f"{member.size:,} bytes")
    file.seek(member.offset)
    return file.read(member.size)


def shards(listing: Listing, *, resolution: int, label: str) -> list[Shard]:
    """A shard for each split of each tar."""
    return [
        Shard(
            split,
            number,
            len(listing.items),
            functools.partial(_examples, path, items, split, resolution, label),
        )
        for split in layout.SPLITS
        for number, (path, items) in enumerate(listing.items.items())
    ]


def _examples(
    path: Path, items: list[Item], split: str, resolution: int, label: str
) -> Iterator[layout.Example]:
    """The images of one split; one that can't be decoded is reported and left out."""
    with files.reading(path) as file:
        for item in items:
            file.seek(item.image.offset)
            content, name = file.read(item.image.size), f"{path.name}/{item.image.name}"
            is_test = splits.position(hashlib.sha256(content).hexdigest()) < splits.TEST_FRACTION
            if is_test != (split == "test"):
                continue
            try:
                pixels = folder.decode(content, name=name, resolution=resolution)
            except InputError as error:
                print(f"note: skipped: {error}", file=sys.stderr, flush=True)
                continue
            yield {"image": pixels, "label": label, "caption": item.caption, "file": name}
