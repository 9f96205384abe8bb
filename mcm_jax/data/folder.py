"""Any folder of images as a TFDS data set; class subfolders and captions are optional."""

import dataclasses
import hashlib
import os
import re
import sys
import unicodedata
from collections.abc import Iterator, Mapping

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import UInt8
from PIL import Image

from mcm_jax.data import captions, images, layout, splits
from mcm_jax.data.resizing import square_area
from mcm_jax.system import progress, versions
from mcm_jax.system.errors import InputError
from mcm_jax.system.files import read_bytes, size
from mcm_jax.system.paths import Path

# Folder names that denote splits of a data set, not classes.
_TRAIN_NAMES = frozenset({"train", "training"})
_TEST_NAMES = frozenset({"dev", "eval", "evaluation", "test", "testing", "val", "valid", "validation"})

# (key, example) pairs.
Examples = Iterator[tuple[bytes, layout.Example]]


@dataclasses.dataclass(eq=False, kw_only=True)
class FolderConfig(tfds.core.BuilderConfig):
    """A listed folder at one resolution; `name` is '<data set>_<resolution>', as in 'pets_32'."""

    resolution: int = 0
    listing: "Listing | None" = None
    test_fraction: float = splits.TEST_FRACTION


@dataclasses.dataclass(frozen=True)
class Listing:
    """The images of a folder: `class_names` in order, and `files`, which maps relative paths to labels.

    `captions` maps relative paths to captions; None if the folder has none. `notes` are one-line messages to
    the user about the folder's other content.
    """

    root: Path
    class_names: tuple[str, ...]
    files: dict[str, int]
    captions: Mapping[str, str] | None = None
    notes: tuple[str, ...] = ()

    def fingerprint(self) -> str:
        """SHA-256 of names, labels, sizes and captions; shows a changed folder without reading its images."""
        digest = hashlib.sha256("\0".join(self.class_names).encode("utf-8", "surrogateescape"))
        for name, label in self.files.items():
            identity = f"\0{name}\0{label}\0{size(self.root / name)}"
            if self.captions is not None:
                identity += f"\0{self.captions[name]}"
            digest.update(identity.encode("utf-8", "surrogateescape"))
        return digest.hexdigest()


def list_images(root: Path, *, single_class: str) -> Listing:
    """Finds the images, either directly in `root` (one class, `single_class`) or in one subfolder per class.

    Class folders are searched to any depth (see `images.find`) and numbered in natural order: 2 before 10.

    Raises:
      InputError: the folder does not exist or has fewer than two images; images lie both in `root` and in
        subfolders; subfolders are splits, not classes; a folder name cannot be a class name; or no line of
        captions.jsonl can be used.
    """
    if not root.is_dir():
        raise InputError(f"--manual_dir={root}: there is no such folder; give the one that holds the images")
    found = images.find(root)
    folders = [name.partition("/")[0] for name in found.files if "/" in name]
    classes = sorted(set(folders), key=_natural)
    loose = next((name for name in found.files if "/" not in name), None)
    if loose and classes:
        raise InputError(
            f"--manual_dir={root}: images lie both directly in it ({images.printable(loose)}) and in its "
            f"subfolders ({_listed(classes)}); move either all or none into class subfolders"
        )
    if len(found.files) < 2:
        raise InputError(
            f"--manual_dir={root}: {len(found.files)} images found, at least 2 are needed (one for training, "
            f"one for testing); {found.why_none()}"
        )
    _refuse_splits(root, classes)
    names = tuple(_class_name(root, name) for name in classes) or (single_class,)
    if len(set(names)) < len(names):
        raise InputError(f"--manual_dir={root}: two subfolders have the same name once escaped; rename one")
    labels = {name: label for label, name in enumerate(classes)}
    ordered = sorted(found.files, key=lambda name: labels.get(name.partition("/")[0], 0))
    files = {name: labels.get(name.partition("/")[0], 0) for name in ordered}
    return _with_captions(Listing(root, names, files), found, classes)


def _with_captions(listing: Listing, found: images.Found, classes: list[str]) -> Listing:
    """Adds the captions, if there are any, and the notes."""
    read = captions.read(listing.root, list(listing.files), text_files=".txt" in found.skipped)
    if read is None:
        return dataclasses.replace(listing, notes=_notes(listing.root, found, classes))
    skipped = {kind: count - read.used.get(kind, 0) for kind, count in found.skipped.items()}
    found = dataclasses.replace(found, skipped={kind: count for kind, count in skipped.items() if count})
    notes = (*_notes(listing.root, found, classes), *read.notes)
    return dataclasses.replace(listing, captions=read.texts, notes=notes)


def _natural(name: str) -> tuple[list[str | int], str]:
    """Sort key that compares numbers in names by value; names with equal numbers ('2', '02') sort as text."""
    # Text and digits alternate, so text is always compared with text and numbers with numbers.
    parts = re.split(r"([0-9]+)", name)
    return [int(part) if index % 2 else part for index, part in enumerate(parts)], name


def _refuse_splits(root: Path, classes: list[str]) -> None:
    """Raises InputError if the subfolders are splits such as train and val rather than classes."""
    lower = {name.lower() for name in classes}
    train, test = lower & _TRAIN_NAMES, lower & _TEST_NAMES
    if (train and test) or (lower and lower <= _TRAIN_NAMES | _TEST_NAMES):
        parts = [name for name in classes if name.lower() in train | test]
        raise InputError(
            f"--manual_dir={root}: its subfolders ({_listed(parts)}) are splits, not classes; give one of "
            f"them, --manual_dir={images.printable(root / parts[0])}, or merge them (a tenth of the "
            "images becomes the test split)"
        )


def _class_name(root: Path, name: str) -> str:
    """The folder's name as valid Unicode.

    Raises:
      InputError: the name would change when stored. TFDS stores one class name per line and strips outer
        spaces.
    """
    if name != name.strip() or any(unicodedata.category(c) in ("Cc", "Zl", "Zp") for c in name):
        raise InputError(
            f"--manual_dir={root}: the subfolder '{images.printable(name)}' cannot be a class name: class "
            "names have no control characters such as line breaks and no spaces at either end; rename it"
        )
    return _readable(name)


def _notes(root: Path, found: images.Found, classes: list[str]) -> tuple[str, ...]:
    """Notes to the user about possibly unexpected content of the folder."""
    subfolders = {path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")}
    empty = sorted(subfolders - set(classes), key=_natural)
    notes = [found.note()]
    if empty:
        notes.append(f"subfolders without images, which do not become classes: {_listed(empty)}")
    if len(classes) == 1 and all(name.count("/") > 1 for name in found.files):
        notes.append(
            f"one class, {images.printable(classes[0])}; if the folders in it are the classes, pass "
            f"--manual_dir={root / classes[0]}"
        )
    return tuple(note for note in notes if note)


def _listed(names: list[str]) -> str:
    """Lists up to five names, and the number of remaining ones."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(map(images.printable, names[:5])) + more


def _readable(name: str) -> str:
    """The name as valid Unicode; invalid bytes appear as escapes."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def load_image(path: Path, *, resolution: int) -> UInt8[np.ndarray, "r r 3"]:
    """Loads an image in RGB, crops its central square, then area-resizes it (SPEC 7).

    The EXIF orientation is applied, transparent images are composited on white, 16-bit grey is reduced to its
    8 high bits, and only the first frame of an animation is used.

    Raises:
      InputError: Pillow cannot decode the file completely.
    """
    with images.naming(path):
        content = read_bytes(path)
    return decode(content, name=path, resolution=resolution)


def decode(content: bytes, *, name: str | Path, resolution: int) -> UInt8[np.ndarray, "r r 3"]:
    """Decodes the content of an image's file as `load_image` does; `name` is for messages."""
    with images.naming(name), images.opened(content) as image:
        rgb = _to_rgb(images.upright(image))
    return square_area(rgb, resolution)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        grey = np.asarray(image).astype(np.int64).clip(0, 65535) // 256
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def preprocessing(resolution: int) -> str:
    """Describes the preprocessing in results: crop, resize, and the decoding library."""
    return (
        f"central square crop, area resize to {resolution}x{resolution}, RGB on white, "
        f"by Pillow {versions.installed('pillow')}"
    )


class Folder(tfds.core.GeneratorBasedBuilder):
    """Features: image uint8 [r, r, 3], label, file (relative path), and caption if the folder has captions.

    Splits by content hash: train, test.
    Identical copies of a file are in the same split, so no test image is also a training image. The image is
    stored as raw bytes rather than as a PNG for the reason given in `openmoji.OpenMoji`.
    """

    name = "folder"
    VERSION = tfds.core.Version(layout.VERSION)

    def _given(self) -> tuple[FolderConfig, Listing]:
        """The config and its listing; raises ValueError if the config is incomplete."""
        config = self.builder_config
        if not isinstance(config, FolderConfig) or config.resolution < 1 or config.listing is None:
            raise ValueError(
                "Folder needs a config: FolderConfig(name=..., resolution=..., listing=list_images(...))"
            )
        return config, config.listing

    def _info(self) -> tfds.core.DatasetInfo:
        config, listing = self._given()
        features = {
            "image": layout.image_feature(config.resolution),
            "label": tfds.features.ClassLabel(names=listing.class_names),
            "file": tfds.features.Text(),
        }
        if listing.captions is not None:
            features["caption"] = tfds.features.Text()
        return tfds.core.DatasetInfo(
            builder=self,
            description=f"Images of a folder. {preprocessing(config.resolution)}.",
            license="That of the images.",
            features=tfds.features.FeaturesDict(features),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Examples]:
        config, listing = self._given()
        root, files = listing.root, listing.files
        contents = {name: images.content_hash(root / name) for name in progress.bar(files, "comparing")}
        distinct = set(contents.values())
        if len(distinct) < 2:
            raise InputError(f"--manual_dir={root}: its {len(files)} images are identical; add other images")
        if copies := len(files) - len(distinct):
            print(f"note: {copies} images are copies of others; copies share a split", file=sys.stderr)
        classes = [set() for _ in listing.class_names]
        for name, content in contents.items():
            classes[files[name]].add(content)
        test = splits.test_keys(distinct, test_fraction=config.test_fraction, classes=classes)
        parts = {"train": [], "test": []}
        for name, content in contents.items():
            parts["test" if content in test else "train"].append(name)
        return {split: self._generate_examples(names) for split, names in parts.items()}

    def _generate_examples(self, files: list[str]) -> Examples:
        config, listing = self._given()
        for name in progress.bar(files, "reading"):
            image = load_image(listing.root / name, resolution=config.resolution)
            example = {"image": image, "label": listing.files[name], "file": _readable(name)}
            if listing.captions is not None:
                example["caption"] = listing.captions[name]
            yield os.fsencode(name), example
