"""Grids of images, as arrays and as PNG files."""

import io

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from mcm_jax.system.errors import InputError
from mcm_jax.system.files import write_output
from mcm_jax.system.paths import Path

_WHITE = 255


def image_grid(
    images: UInt8[np.ndarray, "N H W 3"], columns: int, *, gap: int = 1, scale: int = 1
) -> UInt8[np.ndarray, "height width 3"]:
    """Arranges images in rows of `columns`, from left to right, with `gap` white pixels between them.

    Empty positions in the last row are white. With fewer images than columns, the grid is only as wide as the
    images.

    Args:
      scale: repeats each pixel, including the gaps, scale x scale times, since tiny images are hard to see.
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
    """Writes a PNG file atomically, with `files.write_output`."""
    write_output(path, png_bytes(image))


def png_bytes(image: UInt8[np.ndarray, "H W 3"]) -> bytes:
    """Encodes the image as PNG."""
    content = io.BytesIO()
    Image.fromarray(image).save(content, format="PNG")
    return content.getvalue()
