"""Any folder of images as a TFDS data set; class subfolders are optional."""

import dataclasses
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Integer, UInt8
from PIL import Image, ImageOps

from mcm_jax.data import layout, splits
from mcm_jax.system import progress, versions
from mcm_jax.system.errors import InputError

SUFFIXES = frozenset(".avif .bmp .gif .jp2 .jpeg .jpg .pbm .pgm .png .ppm .tif .tiff .webp".split())


@dataclasses.dataclass(eq=False, kw_only=True)
class FolderConfig(tfds.core.BuilderConfig):
    """A listed folder at one resolution; `name` is '<data set>_<resolution>', as in 'pets_32'."""

    resolution: int = 0
    listing: "Listing | None" = None
    test_fraction: float = splits.TEST_FRACTION


@dataclasses.dataclass(frozen=True)
class Listing:
    """The images of a folder: the class names in order; `files` maps a path in the folder to its class."""

    root: Path
    class_names: tuple[str, ...]
    files: dict[str, int]

    def fingerprint(self) -> str:
        """SHA-256 of names, classes and sizes: tells a changed folder without reading its images."""
        digest = hashlib.sha256("\0".join(self.class_names).encode("utf-8", "surrogateescape"))
        for name, label in self.files.items():
            size = (self.root / name).stat().st_size
            digest.update(f"\0{name}\0{label}\0{size}".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()


def list_images(root: Path, *, single_class: str) -> Listing:
    """Finds the images: directly in `root` (then one class, `single_class`), or in one subfolder per class.

    Class folders are searched to any depth. Hidden files and folders, and files without an image suffix,
    are passed over.

    Raises:
      InputError: no such folder; fewer than two images; images both in `root` and in subfolders.
    """
    if not root.is_dir():
        raise InputError(f"--manual_dir={root}: there is no such folder, name the one that holds the images")
    loose = [path.name for path in _visible(root) if path.is_file() and _is_image(path.name)]
    classes = {path.name: _search(path) for path in _visible(root) if path.is_dir()}
    classes = {name: found for name, found in classes.items() if found}
    if loose and classes:
        raise InputError(
            f"--manual_dir={root}: images lie both in it ({loose[0]}) and in its subfolders "
            f"({', '.join(list(classes)[:3])}), move them all into class subfolders or none"
        )
    names = tuple(map(_readable, classes)) if classes else (single_class,)
    found = list(classes.values()) if classes else [loose]
    files = {name: label for label, group in enumerate(found) for name in group}
    if len(files) < 2:
        raise InputError(
            f"--manual_dir={root}: {len(files)} images found, at least 2 are needed (one to train on, one to "
            f"test on); suffixes read: {' '.join(sorted(SUFFIXES))}"
        )
    return Listing(root, names, files)


def _visible(directory: Path) -> list[Path]:
    return sorted(path for path in directory.iterdir() if not path.name.startswith("."))


def _is_image(name: str) -> bool:
    return not name.startswith(".") and Path(name).suffix.lower() in SUFFIXES


def _readable(name: str) -> str:
    """The name as valid Unicode; bytes that are none are shown as escapes."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _search(class_dir: Path) -> list[str]:
    """The images below a class folder, as paths in the folder's parent, sorted."""
    found = []
    for directory, subdirectories, names in os.walk(class_dir):
        subdirectories[:] = [name for name in subdirectories if not name.startswith(".")]
        inside = Path(directory).relative_to(class_dir.parent)
        found += [(inside / name).as_posix() for name in names if _is_image(name)]
    return sorted(found)


def load_image(path: Path, *, resolution: int) -> UInt8[np.ndarray, "r r 3"]:
    """Central square crop, then area resize (SPEC 7), in RGB.

    The camera's orientation mark is applied, transparency goes on white, 16-bit grey keeps its 8 high
    bits, of an animation the first frame is taken.

    Raises:
      InputError: the file is no image that Pillow can decode to the end.
    """
    try:
        with Image.open(path) as image:
            image = _to_rgb(ImageOps.exif_transpose(image))
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: not a readable image ({reason}), replace or remove the file") from error
    return square_area(image, resolution)


def square_area(image: Image.Image, resolution: int) -> UInt8[np.ndarray, "r r 3"]:
    """Central square crop, then area resize: each pixel is the mean over its part of the square, rounded."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    pixels = np.asarray(image)[top : top + side, left : left + side]
    exact = np.int32 if 255 * side**2 < 2**31 else np.int64
    rows = _sums_over_cells(pixels, resolution, exact)
    # In this order of axes (column, channel, row) the copy is the fastest.
    columns = _sums_over_cells(np.ascontiguousarray(rows.transpose(1, 2, 0)), resolution, exact)
    return np.rint(columns.transpose(2, 0, 1) / side**2).astype(np.uint8)


def _sums_over_cells(
    values: Integer[np.ndarray, "size *rest"], count: int, dtype: type[np.signedinteger]
) -> Integer[np.ndarray, "count *rest"]:
    """`count` times the sums over `count` equal cells of the first axis: integers of `dtype`.

    A pixel counts by the part of it in the cell. Pillow's box filter is no substitute: it takes a pixel whole
    or not at all, by its centre.
    """
    size = len(values)
    whole, part = np.divmod(np.arange(count + 1) * size, count)
    lengths, column = np.diff(whole), (-1, *[1] * (values.ndim - 1))
    shortest, longest = lengths.min(), lengths.max()
    # Half as wide, a third faster.
    fits = values.dtype == np.uint8 and 255 * longest < 2**16
    pixels = values.astype(np.uint16 if fits else dtype, copy=False)
    sums = np.zeros((count, *values.shape[1:]), pixels.dtype)
    for k in range(longest):
        kth = pixels[np.minimum(whole[:-1] + k, size - 1)]
        if k >= shortest:
            kth *= (k < lengths).astype(kth.dtype).reshape(column)
        sums += kth
    # Each sum holds all of the pixel in which its cell begins and nothing of the one in which it ends.
    cut = values[np.minimum(whole, size - 1)] * part.astype(dtype).reshape(column)
    return sums * dtype(count) + (cut[1:] - cut[:-1])


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
    """One sentence for results: crop, resize, by what."""
    return (
        f"central square crop, area resize to {resolution}x{resolution}, RGB on white, "
        f"by Pillow {versions.installed('pillow')}"
    )


class Folder(tfds.core.GeneratorBasedBuilder):
    """image uint8 [r, r, 3], label, file (path in the folder); splits train and test by a hash of the path.

    Raw bytes rather than PNG for the reason given in `openmoji.OpenMoji`.
    """

    name = "folder"
    VERSION = tfds.core.Version(layout.VERSION)

    def _info(self) -> tfds.core.DatasetInfo:
        config = self.builder_config
        if not isinstance(config, FolderConfig) or config.resolution < 1 or config.listing is None:
            raise ValueError(
                "Folder needs a config: FolderConfig(name=..., resolution=..., listing=list_images(...))"
            )
        return tfds.core.DatasetInfo(
            builder=self,
            description=f"Images of a folder. {preprocessing(config.resolution)}.",
            license="That of the images.",
            features=tfds.features.FeaturesDict(
                {
                    "image": layout.image_feature(config.resolution),
                    "label": tfds.features.ClassLabel(names=config.listing.class_names),
                    "file": tfds.features.Text(),
                }
            ),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        config = self.builder_config
        test = splits.test_keys(config.listing.files, test_fraction=config.test_fraction)
        train = [name for name in config.listing.files if name not in test]
        return {"train": self._generate_examples(train), "test": self._generate_examples(sorted(test))}

    def _generate_examples(self, files: list[str]) -> Iterator[tuple[str, dict]]:
        config = self.builder_config
        for name in progress.bar(files, "reading"):
            readable = _readable(name)
            image = load_image(config.listing.root / name, resolution=config.resolution)
            yield readable, {"image": image, "label": config.listing.files[name], "file": readable}
