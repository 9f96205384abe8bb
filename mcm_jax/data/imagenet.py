"""Reads ImageNet (ILSVRC2012) from its original tar files or from TFDS, in independent units.

    manual_dir/ILSVRC2012_img_train.tar    1,000 inner tars, one per class, with that class's images
    manual_dir/ILSVRC2012_img_val.tar      50,000 images, here the split `test`

or a data set that TFDS has prepared: `imagenet2012`, or `imagenet_resized`, whose images are already small.
Class names and the labels of the validation images come with TFDS. A unit is the source of one output shard
and can be read independently: the tar of a class, at a known offset in the outer tar, or a range of the
validation images or of a prepared data set.
"""

import abc
import dataclasses
import functools
import hashlib
import importlib.resources
import io
import itertools
import re
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Literal

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import UInt8
from PIL import Image

from mcm_jax.data import images, layout, tars
from mcm_jax.data.resizing import square_area
from mcm_jax.data.shards import Shard
from mcm_jax.data.stored import Stored
from mcm_jax.system import versions
from mcm_jax.system.errors import InputError
from mcm_jax.system.files import reading
from mcm_jax.system.paths import Path, checked_path

TRAIN_TAR, TEST_TAR = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
# Number of images in the complete ILSVRC2012.
COUNTS = {"train": 1_281_167, "test": 50_000}
_TEST_UNIT = 1000
_MAX_MEMBERS = 60_000  # The largest tar of ILSVRC2012 has 50,000 files.

# area: central square crop, then the mean over areas (SPEC 7).
# adm: as for ADM's published references (Dhariwal & Nichol, arXiv:2105.05233): halve with a box filter while
# both sides are at least twice the resolution, then resize bicubically, then crop the centre.
# resized: unchanged from TFDS's `imagenet_resized`, the downsampled ImageNet of Chrabaszcz et al.
# (arXiv:1707.08819).
Preparation = Literal["area", "adm", "resized"]
RESIZED_TO = (8, 16, 32, 64)
# Data set name -> preparation.
PREPARATIONS: dict[str, Preparation] = {
    "imagenet": "area",
    "imagenet/adm": "adm",
    "imagenet/resized": "resized",
}


@dataclasses.dataclass(frozen=True)
class Unit:
    """The source of one shard; `place` is meaningful only to the class that created the unit."""

    split: str
    place: Any
    count: int | None  # number of images; None: unknown before reading


@dataclasses.dataclass(frozen=True)
class Encoded:
    """An image file: its name, content and class."""

    name: str
    content: bytes
    label: int


class Source(abc.ABC):
    """A source of images; picklable, so that other processes can read from it.

    Attributes:
      fingerprint: identifies the files.
    """

    fingerprint: str

    @abc.abstractmethod
    def units(self) -> list[Unit]:
        """All units, in the order of their shards."""

    @abc.abstractmethod
    def read(self, unit: Unit) -> Iterator[Encoded]:
        """The images of one unit."""


@functools.cache
def class_names() -> tuple[str, ...]:
    """WordNet ids of the 1,000 classes in ascending order, which is the usual numbering."""
    return tuple(_tfds_text("labels.txt"))


def _tfds_text(name: str) -> list[str]:
    path = importlib.resources.files("tensorflow_datasets") / "datasets" / "imagenet2012" / name
    return path.read_text().split()


class Tars(Source):
    """The original tar files, read in place."""

    def __init__(self, manual_dir: Path):
        """Reads the index of both tar files, but not the images.

        Raises:
          InputError: a file is missing or truncated, or is not a tar of ILSVRC2012.
        """
        self._paths = {"train": manual_dir / TRAIN_TAR, "test": manual_dir / TEST_TAR}
        for path in self._paths.values():
            if not path.is_file():
                raise InputError(
                    f"--manual_dir={manual_dir} has no {path.name}; get {TRAIN_TAR} and {TEST_TAR} from "
                    "https://image-net.org/download-images and put both there"
                )
        try:
            self._classes, test_images = (_members(path) for path in self._paths.values())
        except OSError as error:
            raise InputError(
                f"--manual_dir={manual_dir}: cannot read {error.filename} ({error.strerror})"
            ) from error
        self._images = sorted(test_images, key=lambda member: member.name)
        labels = {name: label for label, name in enumerate(class_names())}
        unknown = [one.name for one in self._classes if one.name.removesuffix(".tar") not in labels]
        if unknown:
            raise InputError(f"{self._paths['train']}: {unknown[0]} is not the tar of an ILSVRC2012 class")
        self._labels = labels
        test_labels = _tfds_text("validation_labels.txt")
        self._test_labels = []
        for one in self._images:
            number = _test_number(one.name)
            if number is None:
                raise InputError(f"{self._paths['test']}: {one.name} is not an ILSVRC2012 validation image")
            self._test_labels.append(labels[test_labels[number - 1]])
        listing = "".join(f"{one.name} {one.size}\n" for one in (*self._classes, *self._images))
        self.fingerprint = f"tars {hashlib.sha256(listing.encode()).hexdigest()}"

    def units(self) -> list[Unit]:
        """One unit per class, in the order of classes, then units of validation images."""
        classes = sorted(self._classes, key=lambda member: member.name)
        train = [Unit("train", (one.offset, one.size, one.name), None) for one in classes]
        starts = range(0, len(self._images), _TEST_UNIT)
        return train + [Unit("test", start, min(_TEST_UNIT, len(self._images) - start)) for start in starts]

    def read(self, unit: Unit) -> Iterator[Encoded]:
        """Yields the images of a unit, in the order of the tar.

        Raises:
          InputError: the class's tar is truncated.
        """
        path = self._paths[unit.split]
        with reading(path) as file:
            if unit.split == "train":
                offset, size, name = unit.place
                file.seek(offset)
                inner = file.read(size)
                label = self._labels[name.removesuffix(".tar")]
                for member in _members_of(io.BytesIO(inner), f"{name} in {path}"):
                    content = inner[member.offset : member.offset + member.size]
                    yield Encoded(member.name, content, label)
                return
            for index in range(unit.place, unit.place + unit.count):
                member = self._images[index]
                file.seek(member.offset)
                yield Encoded(member.name, file.read(member.size), self._test_labels[index])


def _test_number(name: str) -> int | None:
    """The number in names such as "ILSVRC2012_val_00000001.JPEG", which selects the label; otherwise None."""
    found = re.fullmatch(r"ILSVRC2012_val_([0-9]{8})\.JPEG", name)
    number = int(found.group(1)) if found else 0
    return number if 1 <= number <= COUNTS["test"] else None


def _members(path: Path) -> list[tars.Member]:
    with reading(path) as file:
        return _members_of(file, str(path))


def _members_of(file: io.BufferedIOBase, name: str) -> list[tars.Member]:
    return tars.members(file, name, most=_MAX_MEMBERS)


class Prepared(Source):
    """A data set that TFDS has prepared."""

    # Split here -> there.
    _SPLITS: ClassVar = {"train": "train", "test": "validation"}

    def __init__(self, data_dir: str, *, name: str = "imagenet2012"):
        """Opens the data set.

        Args:
          data_dir: TFDS's directory, or the data set's own directory in it.

        Raises:
          InputError: the directory holds no such data set.
        """
        instead = f"neither {TRAIN_TAR} nor a prepared" if name == "imagenet2012" else "no prepared"
        self._stored = Stored(data_dir, name, splits=list(self._SPLITS.values()), instead=instead)
        # Labels are matched by name, because imagenet_resized numbers the classes in another order.
        names = self._stored.class_names
        if sorted(names) != list(class_names()):
            raise InputError(f"--manual_dir={data_dir}: its {name} has other classes than ILSVRC2012")
        self._labels = [class_names().index(one) for one in names]
        self.fingerprint = self._stored.fingerprint

    def units(self) -> list[Unit]:
        """One unit per shard of the prepared data set."""
        return [
            Unit(split, part, len(part))
            for split, name in self._SPLITS.items()
            for part in self._stored.parts(name)
        ]

    def read(self, unit: Unit) -> Iterator[Encoded]:
        """Yields the images of a unit, still encoded as stored."""
        name = self._SPLITS[unit.split]
        for index, example in zip(unit.place, self._stored.read(name, unit.place), strict=True):
            file = (
                example["file_name"].decode(errors="backslashreplace")
                if "file_name" in example
                else f"{name}_{index:07d}"
            )
            yield Encoded(file, example["image"], self._labels[int(example["label"])])


def open_source(manual_dir: str, *, resized_to: int | None = None) -> Source:
    """Opens the tar files if present, otherwise a data set that TFDS has prepared.

    Args:
      resized_to: open `imagenet_resized` at this size instead.

    Raises:
      InputError: neither exists, the source is damaged, or there is no `imagenet_resized` of this size.
    """
    directory = checked_path(manual_dir, "--manual_dir")
    data_dir = str(directory)
    if resized_to is not None:
        if resized_to not in RESIZED_TO:
            sizes = ", ".join(map(str, RESIZED_TO))
            raise InputError(f"--resolution={resized_to}: imagenet/resized has only {sizes}")
        return Prepared(data_dir, name=f"imagenet_resized/{resized_to}x{resized_to}")
    if any((directory / name).exists() for name in (TRAIN_TAR, TEST_TAR)):
        return Tars(directory)
    return Prepared(data_dir)


def load(image: Encoded, *, resolution: int, preparation: Preparation) -> UInt8[np.ndarray, "r r 3"]:
    """Decodes and resizes an image.

    The format is detected from the content, not the name: ILSVRC2012 has one PNG named .JPEG, and some JPEGs
    are grey or CMYK. EXIF orientation is ignored, as in all published references.

    Raises:
      InputError: the image cannot be decoded completely.
    """
    rgb = images.rgb(image.name, image.content, remedy="download the tar again")
    return _PREPARATIONS[preparation](rgb, resolution)


def preprocessing(resolution: int, preparation: Preparation) -> str:
    """Describes the preprocessing in results: crop, resize, and the decoding library."""
    how = {
        "area": f"central square crop, area resize to {resolution}x{resolution}",
        "adm": f"ADM's: box halving, bicubic, central crop to {resolution}x{resolution}",
    }
    if preparation == "resized":
        return f"downsampled to {resolution}x{resolution} by Chrabaszcz et al."
    return f"{how[preparation]}, RGB, by Pillow {versions.installed('pillow')}"


def _adm(image: Image.Image, resolution: int) -> UInt8[np.ndarray, "r r 3"]:
    while min(image.size) >= 2 * resolution:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = resolution / min(image.size)
    size = (round(image.width * scale), round(image.height * scale))
    pixels = np.asarray(image.resize(size, Image.Resampling.BICUBIC))
    top, left = (pixels.shape[0] - resolution) // 2, (pixels.shape[1] - resolution) // 2
    return pixels[top : top + resolution, left : left + resolution]


def _unchanged(image: Image.Image, resolution: int) -> UInt8[np.ndarray, "r r 3"]:
    if image.size != (resolution, resolution):
        raise InputError(f"an image of imagenet_resized is {image.size}, not {resolution}x{resolution}")
    return np.asarray(image)


_PREPARATIONS: dict[Preparation, Callable[[Image.Image, int], np.ndarray]] = {
    "area": square_area,
    "adm": _adm,
    "resized": _unchanged,
}


def features(resolution: int) -> tfds.features.FeaturesDict:
    """The features of a record: image, label, and the file's name in ILSVRC2012."""
    return tfds.features.FeaturesDict(
        {
            "image": layout.image_feature(resolution),
            "label": tfds.features.ClassLabel(names=class_names()),
            "file": tfds.features.Text(),
        }
    )


def shards(source: Source, *, resolution: int, preparation: Preparation) -> list[Shard]:
    """Returns one shard to write for each unit of the source."""
    units = source.units()
    counts = {split: sum(unit.split == split for unit in units) for split in COUNTS}
    indices = {split: itertools.count() for split in COUNTS}
    return [
        Shard(
            unit.split,
            next(indices[unit.split]),
            counts[unit.split],
            functools.partial(_examples, source, unit, resolution, preparation),
        )
        for unit in units
    ]


def _examples(
    source: Source, unit: Unit, resolution: int, preparation: Preparation
) -> Iterator[layout.Example]:
    for image in source.read(unit):
        pixels = load(image, resolution=resolution, preparation=preparation)
        yield {"image": pixels, "label": image.label, "file": image.name}
