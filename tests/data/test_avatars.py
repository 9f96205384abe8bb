import hashlib
import itertools
import json
import pickle
import re
from collections import Counter

import dicebear
import numpy as np
import pytest
import tensorflow_datasets as tfds

from mcm_jax.data import avatars, layout, pipeline, preparation
from mcm_jax.data.avatar_styles import STYLES
from mcm_jax.data.avatars import Avatar
from mcm_jax.system.errors import InputError
from tests import forks

EXAMPLES = [
    Avatar(
        "critters",
        {
            "color": "orange",
            "eyes": "three eyes",
            "mouth": "a wide smile",
            "top": "a bare head",
            "background": "blue",
        },
    ),
    Avatar(
        "moods",
        {
            "shape": "round",
            "color": "yellow",
            "eyes": "a wink",
            "mouth": "an open mouth",
            "background": "black",
        },
    ),
    Avatar("sprouts", {"plant": "a palm", "color": "orange", "eyes": "angry eyes", "background": "red"}),
    Avatar(
        "planets",
        {"surface": "striped", "color": "red", "ring": "a ring", "moon": "no moon", "sky": "purple"},
    ),
    Avatar("landscape", {"far": "blue", "near": "green", "sky": "pink", "sun": "no sun"}),
    Avatar(
        "pixel-art",
        {
            "length": "long",
            "hair": "red",
            "glasses": "no glasses",
            "mouth": "a frown",
            "shirt": "blue",
            "background": "white",
        },
    ),
]
CAPTIONS = [
    "an orange critter with three eyes, a wide smile and a bare head on a blue background",
    "a round yellow face with a wink and an open mouth on a black background",
    "a palm in an orange pot with angry eyes on a red background",
    "a striped red planet with a ring and no moon in a purple sky",
    "a landscape of blue mountains behind green hills under a pink sky with no sun",
    "a person with long red hair, no glasses and a frown in a blue shirt on a white background",
]


def all_attributes(style):
    """All combinations of a style's values, 16,000 in all styles together."""
    values = {name: list(attribute.values) for name, attribute in STYLES[style].attributes.items()}
    return [dict(zip(values, words, strict=True)) for words in itertools.product(*values.values())]


def drawn(avatar):
    return avatars.render(avatar, resolution=32).astype(int)


def test_captions_name_every_attribute():
    assert [avatar.style for avatar in EXAMPLES] == list(STYLES)
    assert [avatar.caption for avatar in EXAMPLES] == CAPTIONS


def test_a_caption_gives_its_attributes_back():
    for style in STYLES:
        for attributes in all_attributes(style)[::3]:
            avatar = Avatar(style, attributes)
            assert avatars.parse(avatar.caption) == (style, attributes), avatar.caption


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a purple critter with one eye", ("critters", {"color": "purple", "eyes": "one eye"})),
        ("A critter on a purple background", ("critters", {"background": "purple"})),
        ("a person in a red shirt, blue glasses", ("pixel-art", {"glasses": "blue glasses", "shirt": "red"})),
        ("green hills: a landscape", ("landscape", {"near": "green"})),
        ("planets", None),
        ("", None),
    ],
)
def test_prompts_name_some_attributes(prompt, expected):
    assert avatars.parse(prompt) == expected


def test_attributes_are_chosen_by_different_options():
    for style in STYLES.values():
        options = [
            {option for chosen in attribute.values.values() for option in chosen}
            for attribute in style.attributes.values()
        ]
        named = [*options, set(style.free), set(style.fixed), {f"{name}Probability" for name in style.off}]
        assert sum(map(len, named)) == len(set().union(*named))


@pytest.mark.parametrize("avatar", EXAMPLES, ids=list(STYLES))
def test_options_and_not_the_seed_choose_what_is_drawn(avatar):
    """With each of ten seeds, dicebear takes all variants and colors of what it draws from our options."""
    style = STYLES[avatar.style]
    free = {option: values[0] for option, values in style.free.items()}
    options = avatars.options(Avatar(avatar.style, avatar.attributes, free))
    definition = dicebear.Style(avatars.definition(avatar.style))
    for seed in range(10):
        taken = dicebear.Avatar(definition, {**options, "seed": str(seed)}).to_json()["options"]
        chosen = {name: value for name, value in taken.items() if name.endswith(("Variant", "Color"))}
        assert all(options[name] in (value, *value) for name, value in chosen.items() if value != []), chosen
        assert "animationVariant" not in chosen and len(chosen) >= len(avatar.attributes)


@pytest.mark.parametrize("style", STYLES)
def test_every_value_is_seen_at_32(style):
    """Two values of an attribute differ in at least three pixels by 40 of 255; craters are faint: by 24."""
    rng = np.random.default_rng(0)
    for _ in range(2):
        avatar = avatars.random_avatar(rng, style)
        for name, attribute in STYLES[style].attributes.items():
            others = [
                Avatar(style, {**avatar.attributes, name: word}, avatar.free) for word in attribute.values
            ]
            least = 24 if name == "surface" else 40
            for one, other in itertools.combinations(map(drawn, others), 2):
                assert (np.abs(one - other).max(-1) >= least).sum() >= 3, (avatar.caption, name)


def test_pictures_show_what_the_caption_says():
    critter, _, _, planet, landscape, _ = (drawn(avatar) for avatar in EXAMPLES)
    red, green, blue = critter[-4, 16]
    assert red > green > blue, "the body is orange"
    assert critter[2, 2].argmax() == 2, "the background is blue"
    assert planet[16, 16].argmax() == 0, "the planet is red"
    assert landscape[-1, 16].argmax() == 1 and landscape[0, 16].argmax() == 0, "green hills, a pink sky"


@pytest.mark.parametrize("resolution", [1, 7, 16, 100])
def test_any_resolution_is_the_same_drawing(resolution):
    small = avatars.render(EXAMPLES[0], resolution=resolution)
    large = avatars.render(EXAMPLES[0], resolution=300)
    assert small.shape == (resolution, resolution, 3) and small.dtype == np.uint8
    assert np.abs(small.mean((0, 1)) - large.mean((0, 1))).max() < 2.5


def test_held_out_pairs_occur_in_the_held_out_split_alone():
    """Checked on the options that are drawn, not on the attributes that they come from."""
    pairs = {
        style: [
            set().union(*(STYLES[style].attributes[name].values[word].items() for name, word in pair))
            for pair in avatars.held_out_pairs(style)
        ]
        for style in STYLES
    }
    for split, step in (("train", 10), ("test", 50), ("heldout", 50)):
        for avatar in (avatars.draw(split, index) for index in range(0, avatars.NUM_TRAIN, step)):
            options = avatars.options(avatar).items()
            assert any(pair <= options for pair in pairs[avatar.style]) == (split == "heldout")


def test_a_few_percent_of_the_pairs_are_held_out():
    """And each value keeps, of every other attribute, at least two values and all but one."""
    for style, described in STYLES.items():
        held_out, total = avatars.held_out_pairs(style), 0
        for (name, first), (other, second) in itertools.combinations(described.attributes.items(), 2):
            between = [pair for pair in held_out if (pair[0][0], pair[1][0]) == (name, other)]
            most = Counter(value for pair in between for value in pair)
            assert max(most.values(), default=0) <= min(1, len(first.values) - 2, len(second.values) - 2)
            total += len(first.values) * len(second.values)
        assert 0.01 < len(held_out) / total < 0.06


def test_splits_share_no_drawing_and_no_style_is_rare():
    found = {split: [avatars.draw(split, index) for index in range(1200)] for split in avatars.SPLITS}
    for sample in found.values():
        counts = Counter(avatar.style for avatar in sample)
        assert set(counts) == set(STYLES) and min(counts.values()) > 150
    train, test = (
        {
            json.dumps([avatar.style, avatar.attributes, {**avatar.free, "seed": ""}])
            for avatar in found[split]
        }
        for split in layout.SPLITS
    )
    assert not train & test


def test_an_image_depends_on_its_split_and_index_alone():
    """In a process with other hash seeds too."""
    code = (
        "import hashlib\nfrom mcm_jax.data import avatars\n"
        "for split in avatars.SPLITS:\n for index in (5, 0):\n  a = avatars.draw(split, index)\n"
        "  print(hashlib.sha256(avatars.render(a, resolution=16).tobytes()).hexdigest(), a.caption)"
    )
    lines = []
    for split, index in itertools.product(avatars.SPLITS, (5, 0)):
        avatar = avatars.draw(split, index)
        digest = hashlib.sha256(avatars.render(avatar, resolution=16).tobytes()).hexdigest()
        lines.append(f"{digest} {avatar.caption}")
    assert len(set(lines)) == 6
    assert forks.run(code, parent=1).stdout.splitlines() == lines


def test_the_drawn_avatars_are_those_of_every_version():
    """Samples of another version would be compared with other pictures of the same name."""
    assert (
        avatars.draw("train", 0).caption
        == "a person with short red hair, red glasses and a smile in a red shirt on a white background"
    )
    assert (
        avatars.draw("test", 1999).caption
        == "a purple critter with three eyes, a frown and a fin on a purple background"
    )
    assert (
        avatars.draw("heldout", 7).caption == "a striped yellow planet with a ring and a moon in a blue sky"
    )


@pytest.mark.parametrize("style", STYLES)
def test_styles_are_cc0(style):
    licence = avatars.definition(style)["meta"]["license"]
    assert licence["name"] == "CC0 1.0"
    assert licence["url"] == "https://creativecommons.org/publicdomain/zero/1.0/"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Seven images a split at 8x8: the directory, the DatasetInfo, and all examples by split."""
    data_dir = tmp_path_factory.mktemp("data")
    plan = preparation.plan(dataset="avatars", resolution=8, num=7, workers=0)
    info, built = preparation.prepare(plan, data_dir=data_dir)
    assert built
    builder = tfds.builder_from_directory(info.path)
    return data_dir, info, {split: list(builder.as_data_source(split)) for split in avatars.SPLITS}


def test_examples_are_the_avatars_with_captions_and_attributes(prepared):
    _, info, examples = prepared
    assert info.class_names == tuple(STYLES) and info.num_examples == dict.fromkeys(avatars.SPLITS, 7)
    for split, found in examples.items():
        for index, example in enumerate(found):
            avatar = avatars.draw(split, index)
            np.testing.assert_array_equal(example["image"], avatars.render(avatar, resolution=8))
            assert info.class_names[example["label"]] == avatar.style
            assert example["caption"].decode() == avatar.caption
            assert json.loads(example["attributes"]) == {"style": avatar.style, **avatar.attributes}
        counts = Counter(info.class_names[example["label"]] for example in found)
        assert tuple(counts[name] for name in STYLES) == info.class_counts[split]


def test_more_images_begin_with_the_same(prepared, tmp_path):
    plan = preparation.plan(dataset="avatars", resolution=8, num=9, workers=0)
    info, _ = preparation.prepare(plan, data_dir=tmp_path)
    assert info.num_examples["train"] == 9
    for split, found in prepared[2].items():
        more = pipeline.open_split(data_dir=tmp_path, dataset="avatars", resolution=8, split=split)
        np.testing.assert_array_equal(more.images[:7], [example["image"] for example in found])


def test_another_number_replaces_nothing_unasked(prepared):
    plan = preparation.plan(dataset="avatars", resolution=8, num=9, workers=0)
    with pytest.raises(InputError, match=r"was made from other files \(7 avatars .*, now 9 avatars"):
        preparation.prepare(plan, data_dir=prepared[0])


def test_pipeline_reads_all_three_splits(prepared):
    data_dir, info, examples = prepared
    for split, found in examples.items():
        source = pipeline.open_split(data_dir=data_dir, dataset="avatars", resolution=8, split=split)
        np.testing.assert_array_equal(source.labels, [example["label"] for example in found])
    assert len(set(info.fingerprints.values())) == 3
    assert "heldout" in preparation.report(info, built=True, data_dir="data")


def test_attribution_and_licence_travel_with_the_data(prepared):
    info = tfds.builder_from_directory(prepared[1].path).info
    assert "CC0 1.0" in info.description and "https://www.dicebear.com" in info.description
    assert "dicebear-styles 10.6" in prepared[1].source and "resvg-py 0.5" in prepared[1].preprocessing


def test_large_splits_have_many_shards():
    shards = avatars.shards(4500, resolution=8)
    assert Counter(shard.split for shard in shards) == {"train": 5, "test": 2, "heldout": 2}
    assert all(shard.count == Counter(one.split for one in shards)[shard.split] for shard in shards)
    last = next(iter(pickle.loads(pickle.dumps(shards[4])).examples()))
    assert last["caption"] == avatars.draw("train", 4000).caption


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num": 0}, "--num=0: it must be at least 1"),
        ({"manual_dir": "x"}, "--manual_dir applies only to --dataset="),
        ({"name": "x"}, "--name applies only to --dataset=folder; remove it"),
        ({"host": (0, 2)}, "--host applies only to --dataset=imagenet"),
        ({"dataset": "openmoji", "num": 9}, "--num applies only to --dataset=avatars; remove it"),
        (
            {"dataset": "folder", "workers": 2},
            "--workers applies only to --dataset=avatars or emoji or coco or imagenet",
        ),
    ],
)
def test_bad_input_is_one_line(options, message):
    with pytest.raises(InputError, match=message) as caught:
        preparation.plan(**{"dataset": "avatars", "resolution": 8} | options)
    assert "\n" not in str(caught.value)


def test_program_prepares_them(tmp_path):
    arguments = ("--dataset=avatars", "--resolution=4", "--num=2", "--workers=0")
    done = forks.program("prepare", *arguments, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"\n  all +2 +2 +2\n", done.stdout)
