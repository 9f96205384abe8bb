"""Draws SVG documents as small images."""

import io

import numpy as np
import resvg_py
from jaxtyping import UInt8
from PIL import Image

from mcm_jax.system import versions


def draw(svg: str, *, resolution: int, least: int) -> UInt8[np.ndarray, "r r 3"]:
    """Draws a square SVG on white, antialiased.

    It is drawn at an integer multiple of the resolution, at least `least` pixels and at least twice the
    resolution, and each block is averaged. Fonts are not looked for, so that no text is drawn.

    Raises:
      ValueError: resvg cannot draw it.
    """
    factor = max(2, -(-least // resolution))
    side = factor * resolution
    png = resvg_py.svg_to_bytes(svg, width=side, height=side, background="#ffffff", skip_system_fonts=True)
    with Image.open(io.BytesIO(bytes(png))) as image:
        return np.asarray(image.convert("RGB").reduce(factor))


def described(resolution: int) -> str:
    """Describes the drawing in results."""
    resvg = versions.installed("resvg-py")
    return f"resvg-py {resvg}, block-averaged to {resolution}x{resolution}, RGB on white"
