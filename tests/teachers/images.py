"""Images of ten classes, as many as the narrow networks have."""

from pathlib import Path

import numpy as np
from PIL import Image


def write(directory: Path) -> None:
    """Twelve images of 32x32 pixels for each class."""
    draw = np.random.default_rng(0)
    for name in "abcdefghij":
        (directory / name).mkdir(parents=True)
        for n in range(12):
            pixels = np.full((32, 32, 3), draw.integers(0, 256, 3), np.uint8)
            Image.fromarray(pixels).save(directory / name / f"{n}.png")
