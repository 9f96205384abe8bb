"""COCO with captions, from the data set `coco_captions/2014` that TFDS has prepared.

Split `train` has COCO 2014's training images; `test` has its validation images, of which the paper's FID-30k
takes 30,000. TFDS stores those as its splits val, test and restval. Each image has five captions or more;
the first one is used.
"""

import functools
from collections.abc import Iterator
from typing import Any

import tensorflow_datasets as tfds

from mcm_jax.data import images, layout
from mcm_jax.data.resizing import square_area
from mcm_jax.data.shards import Shard
from mcm_jax.data.stored import Stored
from mcm_jax.system import versions

NAME = "coco_captions/2014"
_SPLITS = {"train": ("train",), "test": ("val", "test", "restval")}
_CLASS = "image"  # A data set has at least one class.


def open_source(manual_dir: str) -> Stored:
    """Opens TFDS's data set; raises InputError if it is not there."""
    return Stored(manual_dir, NAME, splits=[name for names in _SPLITS.values() for name in names])


def features(resolution: int) -> tfds.features.FeaturesDict:
    """The features of a record; `file` is the image's name in COCO."""
    return layout.captioned_features(resolution, class_name=_CLASS)


def preprocessing(resolution: int) -> str:
    """Describes the preprocessing in results."""
    pillow = versions.installed("pillow")
    return f"central square crop, area resize to {resolution}x{resolution}, RGB, by Pillow {pillow}"


def shards(source: Stored, *, resolution: int) -> list[Shard]:
    """One shard for each file of TFDS's data set."""
    result = []
    for split, names in _SPLITS.items():
        parts = [(name, part) for name in names for part in source.parts(name)]
        for number, (name, part) in enumerate(parts):
            examples = functools.partial(_examples, source, name, part, resolution)
            result.append(Shard(split, number, len(parts), examples))
    return result


def _examples(source: Stored, name: str, part: range, resolution: int) -> Iterator[layout.Example]:
    for example in source.read(name, part):
        file = example["image/filename"].decode(errors="backslashreplace")
        rgb = images.rgb(file, example["image"], remedy="prepare coco_captions again with TFDS")
        yield {
            "image": square_area(rgb, resolution),
            "label": _CLASS,
            "caption": _first_caption(example),
            "file": file,
        }


def _first_caption(example: dict[str, Any]) -> str:
    """The first caption on one line; empty if there is none."""
    captions = example["captions"]["text"]
    return " ".join(captions[0].decode(errors="backslashreplace").split()) if len(captions) else ""
