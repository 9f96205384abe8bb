"""Grids of images, as arrays and as PNG files."""

import contextlib
import io
import os
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from mcm_jax.errors import InputError

_WHITE = 255


def image_grid(
    images: UInt8[np.ndarray, "N H W 3"], columns: int, *, gap: int = 1, scale: int = 1
) -> UInt8[np.ndarray, "height width 3"]:
    """The images in rows of `columns`, read like text, with `gap` white pixels between them.

    scale repeats each pixel scale x scale times (tiny images are hard to see); the gap is scaled with them.
    Places of the last row that have no image are white. Fewer images than columns make a grid only as wide as
    they are.
    """
    if not len(images) or columns < 1 or gap < 0 or scale < 1:
        raise InputError(
            f"a grid of {len(images)} images, columns={columns}, gap={gap}, scale={scale}: give more"
        )
    count, height, width, _ = images.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    shape = (rows * (height + gap) - gap, columns * (width + gap) - gap, 3)
    grid = np.full(shape, _WHITE, np.uint8)
    for index, image in enumerate(images):
        top, left = (index // columns) * (height + gap), (index % columns) * (width + gap)
        grid[top : top + height, left : left + width] = image
    return grid.repeat(scale, axis=0).repeat(scale, axis=1)


def save_png(image: UInt8[np.ndarray, "H W 3"], path: str | Path) -> None:
    """Writes the PNG in one go: `path` never holds half a picture. Its directory is made if need be.

    Raises InputError where it cannot be written.
    """
    path = Path(path)
    content = io.BytesIO()
    Image.fromarray(image).save(content, format="PNG")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content.getvalue())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise InputError(
            f"{path}: cannot write the picture ({error.strerror}); choose another path"
        ) from error
