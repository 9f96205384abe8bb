"""Avatars as a TFDS data set: captioned drawings whose every attribute is known, as many as wanted.

An avatar is a style and a value for each of its attributes (see `avatar_styles`). `dicebear-core` makes an
SVG of it from exact options, `resvg-py` draws that, and the caption names all attributes. Nothing is
downloaded.
"""

import dataclasses
import functools
import hashlib
import importlib.resources
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import dicebear
import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import UInt8

from mcm_jax.data import drawing, layout, splits
from mcm_jax.data.avatar_styles import STYLES, Options
from mcm_jax.data.shards import Shard
from mcm_jax.system import versions

NAME = "avatars"
SPLITS = (*layout.SPLITS, layout.HELD_OUT)
NUM_TRAIN = 50_000
# The other splits have as many images as the train split, and at most this number.
_MOST_OTHERS = 2_000
_SHARD_EXAMPLES = 1_000
_HELD_OUT_FRACTION = 0.04
_LEAST_PIXELS = 64  # The shapes are simple.
# The library's seed only moves parts of a drawing, such as hills and moons.
_SEEDS = 1_000

# An attribute's name and one of its values.
Value = tuple[str, str]

_DESCRIPTION = """\
Drawings with captions that name every attribute, from exact options of DiceBear's avatar styles Critters,
Landscape, Moods, Pixel Art, Planets and Sprouts. In split `heldout` each image has at least one pair of
attribute values that never occurs together in the splits `train` and `test`.

Designed by DiceBear (https://www.dicebear.com).
License: CC0 1.0 (https://creativecommons.org/publicdomain/zero/1.0/). Changed here: other colors, and reduced
to the resolution."""

# Further fields of TFDS's metadata.
INFO = {"description": _DESCRIPTION, "homepage": "https://www.dicebear.com", "license": "CC0 1.0"}


@dataclasses.dataclass(frozen=True)
class Avatar:
    """One drawing: its style, the value of each attribute, and the values of the options it doesn't name.

    Avatar("planets", {"surface": "striped", "color": "red", "ring": "a ring", "moon": "no moon", "sky":
    "black"}) has the caption 'a striped red planet with a ring and no moon in a black sky'.
    """

    style: str
    attributes: Mapping[str, str]
    free: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def caption(self) -> str:
        """The sentence that names all attributes; `parse` is its inverse."""
        style = STYLES[self.style]
        phrases = {name: style.attributes[name].phrase.format(word) for name, word in self.attributes.items()}
        return re.sub(r"\ba(?= [aeiou])", "an", style.sentence.format(**phrases))

    def is_held_out(self) -> bool:
        """Whether two of its values form a held-out pair."""
        pairs = itertools.combinations(self.attributes.items(), 2)
        return not held_out_pairs(self.style).isdisjoint(pairs)

    def split(self) -> str:
        """The split that it belongs to: 'heldout', or 'test' or 'train' by a hash.

        The hash is of all options but the seed: most drawings don't change much with it, some not at all.
        """
        if self.is_held_out():
            return layout.HELD_OUT
        unmoved = {option: value for option, value in self.free.items() if option != "seed"}
        key = json.dumps([self.style, dict(self.attributes), unmoved])
        return "test" if splits.position(key) < splits.TEST_FRACTION else "train"


@functools.cache
def held_out_pairs(style: str) -> frozenset[tuple[Value, Value]]:
    """The pairs of values of two attributes, in the style's order, that no image of train or test has.

    A hash of the pair selects about 4% of them, the same on every machine. Of the values of another attribute
    each value misses at most one and keeps at least two, because something must tell the values apart: if
    every green planet had a ring, 'green' and 'with a ring' would mean the same.
    """
    attributes = [
        [(name, word) for word in attribute.values] for name, attribute in STYLES[style].attributes.items()
    ]
    chosen = []
    for first, second in itertools.combinations(attributes, 2):
        if min(len(first), len(second)) > 2:
            chosen += _selected(style, list(itertools.product(first, second)))
    return frozenset(chosen)


def _selected(style: str, pairs: list[tuple[Value, Value]]) -> list[tuple[Value, Value]]:
    """Those pairs of two attributes with the lowest hashes that share no value."""
    positions = {pair: splits.position(f"{style}: {pair[0]}, {pair[1]}") for pair in pairs}
    chosen: list[tuple[Value, Value]] = []
    for pair in sorted(pairs, key=positions.__getitem__):
        if positions[pair] < _HELD_OUT_FRACTION and not any(set(pair) & set(one) for one in chosen):
            chosen.append(pair)
    return chosen


def random_avatar(rng: np.random.Generator, style: str) -> Avatar:
    """Draws each attribute and each other option uniformly; the result may be held out."""
    described = STYLES[style]
    named = {name: list(attribute.values) for name, attribute in described.attributes.items()}
    choices: dict[str, Sequence[str]] = {**named, **described.free}
    picked: list[int] = rng.integers([*map(len, choices.values()), _SEEDS]).tolist()
    words = {name: choices[name][index] for name, index in zip(choices, picked, strict=False)}
    free = {option: words[option] for option in described.free} | {"seed": str(picked[-1])}
    return Avatar(style, {name: words[name] for name in named}, free)


def draw(split: str, index: int) -> Avatar:
    """The avatar number `index` of a split, from a random generator of its own.

    Its style is uniform, and it is the first random avatar of that style that belongs to the split. So no
    drawing of the test split is in the train split, and `heldout` has the distribution of all avatars of a
    style, given at least one held-out pair; train and test have it given none.
    """
    rng = np.random.default_rng((SPLITS.index(split), index))
    style = list(STYLES)[int(rng.integers(len(STYLES)))]
    while (avatar := random_avatar(rng, style)).split() != split:
        pass
    return avatar


def parse(caption: str) -> tuple[str, dict[str, str]] | None:
    """The style of a caption or prompt and the attributes that it names; None without a style's noun.

    parse("a purple critter with one eye") is ("critters", {"color": "purple", "eyes": "one eye"}), and
    parse(avatar.caption) is (avatar.style, avatar.attributes) for each avatar.
    """
    for name, style in STYLES.items():
        if re.search(rf"\b{style.noun}\b", caption):
            found = {key: _named(caption, key, name) for key in style.attributes}
            return name, {key: word for key, word in found.items() if word is not None}
    return None


def _named(caption: str, attribute: str, style: str) -> str | None:
    """The value of an attribute that a caption names, or None."""
    described = STYLES[style].attributes[attribute]
    words = "|".join(map(re.escape, described.values))
    found = re.search(rf"\b{described.phrase.format(f'({words})')}\b", caption)
    return found[1] if found else None


def options(avatar: Avatar) -> Options:
    """All options of an avatar for dicebear, each with one value; its seed only moves parts."""
    style = STYLES[avatar.style]
    chosen: Options = {f"{component}Probability": 0 for component in style.off}
    chosen |= {**style.fixed, **avatar.free}
    for name, word in avatar.attributes.items():
        chosen |= style.attributes[name].values[word]
    return chosen


def svg(avatar: Avatar) -> str:
    """The avatar as an SVG document.

    Raises:
      KeyError: the style has no such attribute or value.
    """
    given: dict[str, Any] = dict(options(avatar))
    return dicebear.Avatar(_definition(avatar.style), given).to_string()


def definition(style: str) -> dict[str, Any]:
    """The style's definition in `dicebear-styles`, with its licence in `meta`."""
    path = importlib.resources.files("dicebear_styles") / f"{style}.json"
    return json.loads(path.read_text(encoding="utf-8"))


@functools.cache
def _definition(style: str) -> dicebear.Style:
    return dicebear.Style(definition(style))


def render(avatar: Avatar, *, resolution: int) -> UInt8[np.ndarray, "r r 3"]:
    """Draws an avatar, antialiased; see `drawing.draw`."""
    return drawing.draw(svg(avatar), resolution=resolution, least=_LEAST_PIXELS)


def source(num: int) -> str:
    """What the images are made from: their number, the package with the styles, and a hash of their table."""
    table = hashlib.sha256(json.dumps([dataclasses.asdict(style) for style in STYLES.values()]).encode())
    package = f"dicebear-styles {versions.installed('dicebear-styles')}"
    return f"{num} avatars of {package}, table {table.hexdigest()[:12]}"


def preprocessing(resolution: int) -> str:
    """Describes the preprocessing in results: the drawing libraries, and the downsampling."""
    styles, core = (versions.installed(name) for name in ("dicebear-styles", "dicebear-core"))
    return f"dicebear-styles {styles} drawn by dicebear-core {core} and {drawing.described(resolution)}"


def features(resolution: int) -> tfds.features.FeaturesDict:
    """image uint8 [r, r, 3], label (the style), caption, and the attributes as JSON with the style."""
    return tfds.features.FeaturesDict(
        {
            "image": layout.image_feature(resolution),
            "label": tfds.features.ClassLabel(names=list(STYLES)),
            "caption": tfds.features.Text(),
            "attributes": tfds.features.Text(),
        }
    )


def shards(num: int, *, resolution: int) -> list[Shard]:
    """The shards of all splits: `num` images in train, as many in the others but at most 2,000 in each.

    An image depends only on its split and index: a smaller data set is the beginning of a larger one.
    """
    result = []
    for split in SPLITS:
        count = num if split == "train" else min(num, _MOST_OTHERS)
        starts = range(0, count, _SHARD_EXAMPLES)
        for number, start in enumerate(starts):
            indices = range(start, min(start + _SHARD_EXAMPLES, count))
            examples = functools.partial(_examples, split, indices, resolution=resolution)
            result.append(Shard(split, number, len(starts), examples))
    return result


def _examples(split: str, indices: range, *, resolution: int) -> Iterator[layout.Example]:
    for index in indices:
        avatar = draw(split, index)
        yield {
            "image": render(avatar, resolution=resolution),
            "label": avatar.style,
            "caption": avatar.caption,
            "attributes": json.dumps({"style": avatar.style, **avatar.attributes}),
        }
