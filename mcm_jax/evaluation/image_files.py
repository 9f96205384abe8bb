"""Reads images made by any program: a folder, or an .npz with images in arr_0 (ADM's format)."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator

import numpy as np

from mcm_jax.data.images import find, naming, opened, turn, upright
from mcm_jax.evaluation.references import Blocks
from mcm_jax.records import JsonObject
from mcm_jax.system import archives
from mcm_jax.system.errors import InputError, printable, reason
from mcm_jax.system.files import read_bytes, reading
from mcm_jax.system.paths import Path


@dataclasses.dataclass(frozen=True)
class ImageFiles:
    """`num` images; `blocks(size)` yields them with labels, which are all 0 unless `has_labels`.

    Attributes:
      description: what a result must state about them.
      note: a message about other files in the folder; empty if there are none.
    """

    num: int
    has_labels: bool
    description: JsonObject
    blocks: Callable[[int], Blocks]
    note: str = ""


def open_images(path: Path) -> ImageFiles:
    """Checks every image by its header; `blocks` decodes the pixels later.

    Raises:
      InputError: there are no images, a file is not an image, or the images have several sizes.
    """
    if path.is_dir():
        return _folder(path)
    try:
        with reading(path) as file:
            arrays = archives.read_npz(file, ("arr_0", "arr_1"))
    except FileNotFoundError:
        raise InputError(f"--images={path}: there is no such file or folder") from None
    except (OSError, ValueError) as error:
        raise InputError(
            f"--images={path}: neither a complete .npz nor a folder ({reason(error)}); give one of the two"
        ) from error
    images, labels = arrays.get("arr_0"), arrays.get("arr_1")
    if images is None or images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        found = "nothing" if images is None else f"{images.dtype} {images.shape}"
        raise InputError(f"--images={path}: arr_0 must hold uint8 images [N, H, W, 3], not {found}")
    if labels is not None and (labels.shape != images.shape[:1] or labels.dtype.kind not in "iu"):
        raise InputError(
            f"--images={path}: arr_1 must hold {len(images)} labels, not {labels.dtype} {labels.shape}"
        )
    given = np.zeros(len(images), np.int32) if labels is None else labels.astype(np.int32)

    def blocks(size: int) -> Blocks:
        for start in range(0, len(images), size):
            yield images[start : start + size], given[start : start + size]

    digest = hashlib.sha256(np.ascontiguousarray(images).data)
    digest.update(np.ascontiguousarray(given).data)
    description: JsonObject = {"images": path.name, "sha256": digest.hexdigest()}
    return ImageFiles(len(images), labels is not None, description, blocks)


def _folder(path: Path) -> ImageFiles:
    """All images in a folder, at any depth, in the order of their paths; subfolders are not labels."""
    found = find(path)
    if not found.files:
        raise InputError(f"--images={path}: no images in that folder; {found.why_none()}")
    files = [path / name for name in found.files]
    sizes, digest = [], hashlib.sha256()
    for file in files:
        with naming(file):
            content = read_bytes(file)
            sizes.append(_size(content))
        digest.update(content)
        if sizes[-1] != sizes[0]:
            raise _of_several_sizes(path, (files[0], sizes[0]), (file, sizes[-1]))
    size = sizes[0]

    def read(file: Path) -> np.ndarray:
        with naming(file), opened(read_bytes(file)) as image:
            pixels = np.asarray(upright(image).convert("RGB"))
        if (
            here := pixels.shape[1::-1]
        ) != size:  # The EXIF tag is stored after the pixels, or the file has changed.
            raise _of_several_sizes(path, (files[0], size), (file, here))
        return pixels

    def blocks(length: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for start in range(0, len(files), length):
            part = [read(file) for file in files[start : start + length]]
            yield np.stack(part), np.zeros(len(part), np.int32)

    description: JsonObject = {"images": path.name, "sha256": digest.hexdigest()}
    return ImageFiles(len(files), False, description, blocks, note=found.note())


def _size(content: bytes) -> tuple[int, int]:
    """Width and height of the upright image; decodes the pixels only if they must be rotated."""
    with opened(content) as image:
        if image.mode not in ("RGB", "L", "P") or image.has_transparency_data:
            raise ValueError(f"mode {image.mode}; use opaque 8-bit RGB, grey or palette images")
        return image.size if turn(image) is None else upright(image).size


def _of_several_sizes(
    path: Path, one: tuple[Path, tuple[int, ...]], other: tuple[Path, tuple[int, ...]]
) -> InputError:
    found = " and ".join(f"{printable(file.name)} of {size[0]}x{size[1]}" for file, size in (one, other))
    return InputError(f"--images={path}: images of several sizes, {found}; all images must have one size")
