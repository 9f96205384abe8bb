"""Checks whether images can be compared with a reference at all: image size and class numbering."""

import dataclasses
import itertools

import numpy as np
from jaxtyping import Int

from mcm_jax.data import layout
from mcm_jax.evaluation import published
from mcm_jax.system.errors import InputError
from mcm_jax.system.paths import Path

# Each side needs enough images of a class for a covariance.
_MIN_CLASS_IMAGES = 2
# Images are counted per class up to the highest label.
_MAX_CLASSES = 1_000_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReferenceImages:
    """What is known about a reference's images before any features are computed; None if unknown.

    Attributes:
      size: height and width of the images.
      class_names: names of the classes, in the order of their numbers.
      class_counts: number of images per class.
    """

    size: tuple[int, int] | None = None
    class_names: tuple[str, ...] | None = None
    class_counts: tuple[int, ...] | None = None

    def require_size(self, size: tuple[int, int], *, what: str) -> None:
        """Raises InputError unless images of this height and width can be compared with the reference's."""
        if self.size not in (None, size):
            raise InputError(
                f"{what} has images of {_pixels(size)} but --reference has images of {_pixels(self.size)}; "
                "use a reference of the same size, or resize the images"
            )

    def require_class_names(self, class_names: tuple[str, ...], *, what: str) -> None:
        """Raises InputError if the reference has other classes, or numbers them in another order."""
        for number, (ours, theirs) in enumerate(itertools.zip_longest(class_names, self.class_names or ())):
            if self.class_names is not None and ours != theirs:
                raise InputError(
                    f"--metrics=class_fid: class {number} is {_named(ours)} for {what} but {_named(theirs)} "
                    "for --reference; use a reference with the same classes, or omit class_fid"
                )

    def require_labels(self, labels: Int[np.ndarray, " N"], *, what: str) -> None:
        """Raises InputError if a label is not one of the reference's, or if no class can be compared."""
        if self.class_counts is None:
            return
        classes = len(self.class_counts)
        outside = labels[(labels < 0) | (labels >= classes)]
        if outside.size:
            raise InputError(
                f"--metrics=class_fid: {what} has an image of class {outside[0]}, but --reference has only "
                f"classes 0 to {classes - 1}; number the classes from 0, as the reference does"
            )
        counts = np.bincount(labels, minlength=classes)
        if not np.any(np.minimum(counts, self.class_counts) >= _MIN_CLASS_IMAGES):
            raise InputError(
                f"--metrics=class_fid: no class has {_MIN_CLASS_IMAGES} images or more both in {what} and "
                "in --reference; provide more images, or omit class_fid"
            )


def reference_images(path: Path | None, *, split: str = "train") -> ReferenceImages:
    """Reads what the reference at `path` states about its images, without computing features.

    All fields are None if `path` is None or is a directory without a prepared data set; the evaluation
    reports the latter.

    Args:
      path: a file of statistics or images, or the directory of a prepared data set.

    Raises:
      InputError: the file is damaged.
    """
    if path is None:
        return ReferenceImages()
    if path.is_dir():
        try:
            info = layout.read_summary(path)
        except (OSError, ValueError):
            return ReferenceImages()
        size = (info.resolution, info.resolution)
        counts = info.class_counts.get(split)
        return ReferenceImages(size=size, class_names=info.class_names, class_counts=counts)
    arrays = published.load_arrays(path)
    images, labels = (np.asarray(arrays.get(name, ())) for name in ("arr_0", "arr_1"))
    counts = None
    if labels.ndim == 1 and labels.dtype.kind in "iu" and labels.size and labels.min() >= 0:
        if labels.max() >= _MAX_CLASSES:
            raise InputError(
                f"--reference={path}: arr_1 has the label {labels.max()}, but at most {_MAX_CLASSES:,} "
                "classes are supported; number the classes from 0"
            )
        counts = tuple(np.bincount(labels).tolist())
    return ReferenceImages(size=images.shape[1:3] if images.ndim == 4 else None, class_counts=counts)


def _pixels(size: tuple[int, int]) -> str:
    height, width = size
    return f"{width}x{height} pixels"


def _named(name: str | None) -> str:
    return "missing" if name is None else repr(name)
