"""The drawing styles of the data set `avatars`: which attributes vary, in which words, by which options.

All styles are part of `dicebear-styles`, drawn by DiceBear and released under CC0 1.0. They and their values
were chosen by eye: each value can be told from the others at 32x32, and most of them at 16x16.
"""

import dataclasses
from collections.abc import Mapping, Sequence

# Names of options of dicebear -> values: a color or a variant, or a probability in percent.
Options = dict[str, str | int]


@dataclasses.dataclass(frozen=True)
class Attribute:
    """One property that the caption names: `values` maps the words for a value to the options that draw it.

    `phrase` is how a caption uses the words ({}), so that the color of the critter is not taken for that of
    its background.
    """

    values: Mapping[str, Options]
    phrase: str = "{}"


@dataclasses.dataclass(frozen=True)
class Style:
    """A style: its attributes, the sentence that names all of them, and all other options.

    `noun` is the word by which a caption is known to be of this style. `free` maps options to the values from
    which they are drawn without being named; `off` lists components that are never drawn.
    """

    noun: str
    sentence: str
    attributes: Mapping[str, Attribute]
    free: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
    fixed: Mapping[str, str] = dataclasses.field(default_factory=dict)
    off: Sequence[str] = ()


def _colors(option: str, palette: Mapping[str, str]) -> dict[str, Options]:
    return {word: {f"{option}Color": color} for word, color in palette.items()}


def _variants(component: str, **words: str | None) -> dict[str, Options]:
    """Maps words ('three_eyes' is 'three eyes') to a variant of the component; None: it is not drawn."""
    return {
        word.replace("_", " "): {f"{component}Probability": 0}
        if variant is None
        else {f"{component}Variant": variant, f"{component}Probability": 100}
        for word, variant in words.items()
    }


# Light enough for dark pupils, dark enough for white eyes, and far from each other.
_BODIES = {
    "red": "#ef4444",
    "orange": "#f58b3c",
    "yellow": "#f7d046",
    "green": "#5cc26a",
    "blue": "#55a8f5",
    "purple": "#a682e8",
    "pink": "#f7a8d0",
}
# Darker than every body: a red critter stands out on a red background.
_DARK = {
    "black": "#14161c",
    "grey": "#7b818c",
    "brown": "#74451f",
    "red": "#9b1528",
    "green": "#0b6b43",
    "blue": "#1d46c8",
    "purple": "#5420a8",
}
_PALE = {
    "white": "#ffffff",
    "grey": "#b0b4b9",
    "yellow": "#f8ecb0",
    "green": "#a8dca0",
    "blue": "#a9c8f7",
    "purple": "#d3a6f2",
}
_NIGHTS = {"black": "#08090f", "blue": "#12307a", "green": "#06452f", "purple": "#4a1680", "red": "#641022"}
_SKIES = {"blue": "#b5e0ff", "pink": "#ffd0e4", "yellow": "#fff2b8", "grey": "#b9bec8", "black": "#10142b"}
_SUNS = {"red": "#e5322d", "yellow": "#ffc61a", "blue": "#2e6bff"}
# From the farthest hill to the nearest.
_HILLS = {
    "green": ("#93c98a", "#6aa865", "#3b7d42", "#1f5229"),
    "brown": ("#c8a070", "#a5773f", "#7d5428", "#4f3213"),
    "blue": ("#7fb0e6", "#5b8fd0", "#2f62a8", "#1d3f73"),
    "red": ("#f07a78", "#d94a4f", "#b5232f", "#7a141f"),
    "purple": ("#b79be0", "#9274c8", "#653fa0", "#40246d"),
}
_HAIR = {
    "black": "#1c1a1e",
    "brown": "#6b3f1d",
    "blond": "#e3c16f",
    "red": "#c0301c",
    "blue": "#2a6fe0",
    "green": "#3f9a3a",
}
_GLASSES = {"black": "#191919", "red": "#d1202f", "blue": "#2456c8"}
_SHIRTS = {
    "red": "#d1323f",
    "green": "#1f9d55",
    "blue": "#2456c8",
    "yellow": "#f2c230",
    "purple": "#7a3fc0",
    "black": "#26272c",
}

_ON_DARK = Attribute(_colors("background", _DARK), "{} background")
_INK = {"inkColor": "#1e293b"}
_HILL_SHAPES = {
    "hill1Variant": ("peak", "ridge", "rugged"),
    "hill2Variant": ("mesa", "ridge", "rugged"),
    "hill3Variant": ("dunes", "gentle", "rolling"),
    "hill4Variant": ("dunes", "gentle", "rolling", "slope"),
}

STYLES: dict[str, Style] = {
    "critters": Style(
        noun="critter",
        sentence="a {color} with {eyes}, {mouth} and {top} on a {background}",
        attributes={
            "color": Attribute(_colors("body", _BODIES), "{} critter"),
            "eyes": Attribute(
                _variants("eyes", one_eye="mono", two_eyes="round", three_eyes="trio", closed_eyes="happy")
            ),
            "mouth": Attribute(
                _variants(
                    "mouth",
                    a_wide_smile="grin",
                    a_frown="frown",
                    an_open_mouth="open",
                    sharp_teeth="teeth",
                )
            ),
            "top": Attribute(
                _variants(
                    "top",
                    horns="horns",
                    round_ears="earsRound",
                    an_antenna="bobble",
                    a_fin="fin",
                    a_bare_head=None,
                )
            ),
            "background": _ON_DARK,
        },
        free={
            "bodyVariant": ("dome", "block", "squat", "round", "bell", "wedge"),
            "accentColor": ("#f7d046", "#fda4af", "#e2e8f0"),
        },
        fixed=_INK,
        off=("animation", "cheeks", "pattern"),
    ),
    "moods": Style(
        noun="face",
        sentence="a {shape} {color} with {eyes} and {mouth} on a {background}",
        attributes={
            "shape": Attribute(
                _variants("face", round="circle", square="squircle", tall="tall", broad="wide")
            ),
            "color": Attribute(_colors("face", _BODIES), "{} face"),
            "eyes": Attribute(
                _variants(
                    "eyes", open_eyes="bigPupils", closed_eyes="happy", angry_eyes="angry", a_wink="wink"
                )
            ),
            "mouth": Attribute(
                _variants("mouth", a_smile="wide", a_frown="frown", an_open_mouth="open", a_laugh="bigSmile")
            ),
            "background": _ON_DARK,
        },
        fixed=_INK,
        off=("animation", "cheeks"),
    ),
    "sprouts": Style(
        noun="pot",
        sentence="{plant} in a {color} with {eyes} on a {background}",
        attributes={
            "plant": Attribute(
                _variants(
                    "plant",
                    a_cactus="cactus",
                    a_flower="flower",
                    a_tulip="tulip",
                    a_palm="palm",
                    a_bush="bush",
                    grass="succulent",
                )
            ),
            "color": Attribute(_colors("pot", _BODIES), "{} pot"),
            "eyes": Attribute(_variants("eyes", wide_eyes="wide", closed_eyes="happy", angry_eyes="angry")),
            "background": _ON_DARK,
        },
        free={
            "potVariant": ("taper", "cylinder", "bowl", "tub", "round"),
            "mouthVariant": ("smile", "line", "open"),
        },
        fixed={**_INK, "plantColor": "#4ade80", "bloomColor": "#f9a8d4"},
        off=("animation", "cheeks", "pattern"),
    ),
    "planets": Style(
        noun="planet",
        sentence="a {surface} {color} with {ring} and {moon} in a {sky}",
        attributes={
            "surface": Attribute(_variants("surface", striped="banded", cratered="cratered", smooth=None)),
            "color": Attribute(_colors("planet", _BODIES), "{} planet"),
            "ring": Attribute(_variants("ring", a_ring="bold", no_ring=None)),
            "moon": Attribute(_variants("moons", a_moon="one", no_moon=None)),
            "sky": Attribute(_colors("background", _NIGHTS), "{} sky"),
        },
        fixed={"planetVariant": "disc", "shadeVariant": "soft", "moonColor": "#f4f4f4"},
        # Stars would look like the moon.
        off=("animation", "star"),
    ),
    "landscape": Style(
        noun="landscape",
        sentence="a landscape of {far} behind {near} under a {sky} with {sun}",
        attributes={
            "far": Attribute(
                {word: {"hill1Color": a, "hill2Color": b} for word, (a, b, _, _) in _HILLS.items()},
                "{} mountains",
            ),
            "near": Attribute(
                {word: {"hill3Color": a, "hill4Color": b} for word, (_, _, a, b) in _HILLS.items()},
                "{} hills",
            ),
            "sky": Attribute(_colors("background", _SKIES), "{} sky"),
            "sun": Attribute(
                {f"a {word} sun": {"orbColor": color, "orbProbability": 100} for word, color in _SUNS.items()}
                | _variants("orb", no_sun=None)
            ),
        },
        free=_HILL_SHAPES,
        fixed={"orbVariant": "sun"},
        off=("animation",),
    ),
    "pixel-art": Style(
        noun="person",
        sentence="a person with {length} {hair}, {glasses} and {mouth} in a {shirt} on a {background}",
        attributes={
            "length": Attribute({"long": {"hairVariant": "long12"}, "short": {"hairVariant": "short06"}}),
            "hair": Attribute(_colors("hair", _HAIR), "{} hair"),
            "glasses": Attribute(
                {
                    f"{word} glasses": {"glassesColor": color, "glassesProbability": 100}
                    for word, color in _GLASSES.items()
                }
                | _variants("glasses", no_glasses=None)
            ),
            "mouth": Attribute(_variants("mouth", a_smile="happy09", a_frown="sad01")),
            "shirt": Attribute(_colors("clothing", _SHIRTS), "{} shirt"),
            "background": Attribute(_colors("background", _PALE), "{} background"),
        },
        free={
            "skinColor": ("#f5cfa0", "#e0b687", "#b68655", "#8d5524"),
            "clothesVariant": ("variant01", "variant03", "variant04", "variant12"),
            "eyesVariant": ("variant01", "variant09"),
        },
        fixed={"eyesColor": "#647b90", "glassesVariant": "dark03", "mouthColor": "#de0f0d"},
        off=("accessories", "beard", "hat"),
    ),
}
