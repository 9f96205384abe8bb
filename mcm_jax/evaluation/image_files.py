"""Images that any program made: uint8 under arr_0 of an .npz, as ADM's evaluator takes them, or a folder."""

import dataclasses
import hashlib
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mcm_jax.evaluation.references import Blocks
from mcm_jax.system.errors import InputError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclasses.dataclass(frozen=True)
class ImageFiles:
    """`num` images, and `blocks(size)` of them with labels, which are 0 where there are none.

    Attributes:
      description: what a result must say about them.
    """

    num: int
    has_labels: bool
    description: dict[str, Any]
    blocks: Callable[[int], Blocks]


def open_images(path: Path) -> ImageFiles:
    """Looks at all of them, and reads none to its end.

    Raises:
      InputError: there is nothing, something that is no image, or images of several sizes.
    """
    if path.is_dir():
        return _folder(path)
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in ("arr_0", "arr_1") if name in file.files}
    except FileNotFoundError:
        raise InputError(f"--images={path}: there is no such file or folder") from None
    except (OSError, ValueError, EOFError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"--images={path}: neither a whole .npz nor a folder ({reason})") from error
    images, labels = arrays.get("arr_0"), arrays.get("arr_1")
    if images is None or images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        found = "nothing" if images is None else f"{images.dtype} {images.shape}"
        raise InputError(f"--images={path}: arr_0 must hold uint8 images [N, H, W, 3], and holds {found}")
    if labels is not None and (labels.shape != images.shape[:1] or labels.dtype.kind not in "iu"):
        raise InputError(
            f"--images={path}: arr_1 must hold {len(images)} labels, and holds {labels.dtype} {labels.shape}"
        )
    of = np.zeros(len(images), np.int32) if labels is None else labels.astype(np.int32)

    def blocks(size: int) -> Blocks:
        for start in range(0, len(images), size):
            yield images[start : start + size], of[start : start + size]

    digest = hashlib.sha256(np.ascontiguousarray(images))
    digest.update(np.ascontiguousarray(of))
    description = {"images": path.name, "sha256": digest.hexdigest()}
    return ImageFiles(len(images), labels is not None, description, blocks)


def _folder(path: Path) -> ImageFiles:
    """All images below a folder, in the order of their paths; classes are not read."""
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
    if not files:
        raise InputError(f"--images={path}: no images in that folder; read are {' '.join(SUFFIXES)}")
    sizes = {}
    digest = hashlib.sha256()
    for file in files:
        try:
            with Image.open(file) as image:
                sizes.setdefault(image.size, file)
                if image.mode not in ("RGB", "L", "P") or image.has_transparency_data:
                    raise ValueError(
                        f"of mode {image.mode}; take 8-bit RGB, grey or palette, not transparent"
                    )
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise _unreadable(file, error) from error
        digest.update(file.read_bytes())
    if len(sizes) > 1:
        (one, first), (other, second) = list(sizes.items())[:2]
        raise InputError(
            f"--images={path}: images of several sizes, {first.name} of {one[0]}x{one[1]} and {second.name} "
            f"of {other[0]}x{other[1]}; a distance is of one size"
        )

    def blocks(size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for start in range(0, len(files), size):
            part = [_read(file) for file in files[start : start + size]]
            yield np.stack(part), np.zeros(len(part), np.int32)

    return ImageFiles(len(files), False, {"images": path.name, "sha256": digest.hexdigest()}, blocks)


def _read(file: Path) -> np.ndarray:
    try:
        with Image.open(file) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise _unreadable(file, error) from error


def _unreadable(file: Path, error: Exception) -> InputError:
    return InputError(f"{file}: not a readable image ({' '.join(str(error).split())}); remove or replace it")
