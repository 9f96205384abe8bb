import dataclasses
import gzip
import json
import pickle

import numpy as np
import pytest
import tensorflow_datasets as tfds

from mcm_jax.data import emoji, layout, pipeline, preparation
from mcm_jax.data.emoji import DESIGNS, Emoji, Package
from mcm_jax.system.errors import InputError
from tests.tars import tar

COLORS = ["red", "green", "blue", "gold"]


def icon_set(design, names, **fields):
    """The content of json/DESIGN.json, in which each drawing is a square of its own size."""
    number = list(DESIGNS).index(design)
    icons = {
        name: {"body": f'<path fill="{COLORS[number % 4]}" d="M0 0h{8 + number}v{4 + index}H0z"/>'}
        for index, name in enumerate(names)
    }
    info = {
        "name": design,
        "author": {"name": f"Author of {design}", "url": "https://example.com"},
        "license": {"title": "CC BY 4.0", "url": "https://example.com/by"},
    }
    return {"prefix": design, "info": info, "icons": icons, "width": 32, "height": 32} | fields


def package_files(**changed):
    """The files of a tiny package of the true layout: 30 names in every design."""
    names = [f"thing-{'abcdefghij'[n % 10]}{'xyz'[n // 10]}" for n in range(30)]
    sets = {design: icon_set(design, names) for design in DESIGNS}
    sets["noto"] = icon_set("noto", [*names, "waving-hand", "waving-hand-dark-skin-tone", "7"])
    sets["noto"]["icons"]["old"] = {"body": "<g/>", "hidden": True}
    sets["fluent-emoji"] = icon_set(
        "fluent-emoji",
        [*names, "waving-hand", "waving-hand-medium-dark", "waving-hand-light-medium", "traffic-light"],
    )
    sets["twemoji"] = icon_set("twemoji", [*names, "flag-france", "hello"])
    sets["twemoji"]["aliases"] = {
        "hand-waving": {"parent": "waving-hand"},
        "back": {"parent": "hello", "hFlip": True},
    }
    sets["noto-v1"] = icon_set("noto-v1", [*names, "flag-for-flag-france", "hand-waving"])
    sets["streamline-emojis"] = icon_set("streamline-emojis", [*names, "hello-1", "hello-2"])
    sets["fxemoji"] = icon_set("fxemoji", ["thingax", "handwaving", "blackdownpointingarrow"])
    sets |= changed
    files = {
        f"json/{design}.json": json.dumps(content).encode() for design, content in sets.items() if content
    }
    return files | {"package.json": json.dumps({"name": "@iconify/json", "version": "2.2.535"}).encode()}


def write_tgz(path, files):
    path.write_bytes(gzip.compress(tar({f"package/{name}": content for name, content in files.items()}), 1))
    return path


@pytest.fixture(scope="module")
def tgz(tmp_path_factory):
    return write_tgz(tmp_path_factory.mktemp("package") / "iconify.tgz", package_files())


@pytest.fixture(scope="module")
def package(tgz):
    return emoji.read(tgz)


def names_of(package, design):
    return [each.name for each in package.emojis if each.design == design and "thing" not in each.name]


def test_captions_are_the_name_and_the_design():
    assert Emoji("grinning-face", "noto-v1", "", (1.0, 1.0)).caption == "grinning face, Noto v1 style"
    assert (
        list(DESIGNS)
        == (
            "openmoji twemoji noto noto-v1 fluent-emoji fluent-emoji-flat emojione emojione-v1 fxemoji "
            "streamline-emojis"
        ).split()
    )


def test_skin_tones_hidden_ones_and_mere_numbers_are_left_out(package):
    assert names_of(package, "noto") == ["waving-hand"]
    assert names_of(package, "fluent-emoji") == ["waving-hand", "traffic-light"]


def test_designs_write_the_same_name_alike(package):
    assert names_of(package, "noto-v1") == ["flag-france", "hand-waving"]
    assert names_of(package, "streamline-emojis") == ["hello", "hello"]
    written = [each.name for each in package.emojis if each.design == "fxemoji"]
    assert written == ["thing-ax", "hand-waving"], "the third name is in no other design"


def test_directory_and_archive_hold_the_same(package, tmp_path):
    for root in (tmp_path / "a", tmp_path / "b" / "package"):
        for name, content in package_files().items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(content)
    assert emoji.read(tmp_path / "a") == package == emoji.read(tmp_path / "b")


@pytest.mark.parametrize("change", [{"body": "<g/>"}, {"name": "thing-other"}, {"size": (1.0, 1.0)}])
def test_source_follows_every_drawing_and_name(package, change):
    first, *others = package.emojis
    changed = dataclasses.replace(package, emojis=(dataclasses.replace(first, **change), *others))
    assert package.source().startswith("@iconify/json 2.2.535 ") and changed.source() != package.source()


def made(**names):
    """A package of the given names by design, without drawings in common."""
    emojis = [
        Emoji(name, design.replace("_", "-"), f"{design} {name}", (1.0, 1.0))
        for design, found in names.items()
        for name in found
    ]
    return Package("1", tuple(emojis), (), "")


NAMES = [f"n{number}" for number in range(600)]
LARGE = made(noto=NAMES, noto_v1=NAMES, twemoji=NAMES[:500], openmoji=[*NAMES[:300], "alone"])


def test_each_split_is_what_it_says():
    """Names of test don't train; held-out names and designs do, but not together, nor as a near copy."""
    found = emoji.assigned(LARGE)
    assert sum(map(len, found.values())) == len(LARGE.emojis)
    train, test, held_out = found.values()
    trained = {(each.name, each.family) for each in train}
    names, families = ({pair[n] for pair in trained} for n in (0, 1))
    assert not names & {each.name for each in test}
    for each in held_out:
        assert each.name in names and each.family in families and (each.name, each.family) not in trained
    assert 0.06 < len({each.name for each in test}) / 601 < 0.14
    assert 0.03 < len(held_out) / len(LARGE.emojis) < 0.1


def test_both_notos_are_on_one_side():
    for found in emoji.assigned(LARGE).values():
        notos = [{each.name for each in found if each.design == design} for design in ("noto", "noto-v1")]
        assert notos[0] == notos[1]


def test_names_of_one_emoji_share_a_split():
    """Whether another design calls it so, or the same design draws the same."""
    pairs = [(f"n{number}", f"also-n{number}") for number in range(40)]
    plain = made(twemoji=[name for pair in pairs for name in pair])
    aliased = Package("1", plain.emojis, tuple(pairs), "")
    copies = tuple(
        Emoji(each.name, each.design, each.name.removeprefix("also-"), (1.0, 1.0)) for each in plain.emojis
    )

    def apart(package):
        place = {each.name: split for split, found in emoji.assigned(package).items() for each in found}
        return sum(place[one] != place[other] for one, other in pairs)

    assert apart(plain) > 0 and apart(aliased) == apart(Package("1", copies, (), "")) == 0


def test_a_name_that_no_other_family_has_is_not_held_out():
    """Its group has other names in the other family, so nothing would train its name."""
    aliases = tuple((name, f"{name}s") for name in NAMES)
    package = made(noto=NAMES, twemoji=[f"{name}s" for name in NAMES])
    assert emoji.assigned(Package("1", package.emojis, aliases, ""))["heldout"] == []


@pytest.mark.parametrize("size", [(2.0, 1.0), (1.0, 2.0), (1.5, 1.5)])
def test_drawings_are_centred_in_a_square_on_white(size):
    whole = f'<path d="M0 0h{size[0]}v{size[1]}H0z" fill="red"/>'
    pixels = emoji.render(Emoji("a", "noto", whole, size), resolution=8).astype(int)
    red = (pixels == [255, 0, 0]).all(-1)
    white = (pixels == 255).all(-1)
    assert (red == red[::-1, ::-1]).all() and (red | white).all()
    assert red.sum() == 64 * min(size) / max(size)


def test_a_drawing_that_cannot_be_drawn_is_named():
    with pytest.raises(InputError, match=r"odd-one in json/noto\.json cannot be drawn .*npm pack") as caught:
        emoji.render(Emoji("odd-one", "noto", "<g>", (1.0, 1.0)), resolution=8)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def prepared(tgz, tmp_path_factory):
    data_dir = tmp_path_factory.mktemp("data")
    plan = preparation.plan(dataset="emoji", resolution=8, manual_dir=str(tgz), workers=0)
    info, built = preparation.prepare(plan, data_dir=data_dir)
    assert built
    builder = tfds.builder_from_directory(info.path)
    return data_dir, info, {split: list(builder.as_data_source(split)) for split in emoji.SPLITS}


def test_examples_are_the_drawings_with_captions(prepared, package):
    _, info, examples = prepared
    assert info.class_names == tuple(DESIGNS.values())
    for split, wanted in emoji.assigned(package).items():
        assert info.num_examples[split] == len(wanted) == sum(info.class_counts[split]) > 0
        for each, example in list(zip(wanted, examples[split], strict=True))[::4]:
            np.testing.assert_array_equal(example["image"], emoji.render(each, resolution=8))
            assert example["caption"].decode() == each.caption
            assert each.caption == f"{example['name'].decode()}, {info.class_names[example['label']]} style"


def test_pipeline_reads_it_and_the_report_counts_it(prepared):
    data_dir, info, examples = prepared
    source = pipeline.open_split(data_dir=data_dir, dataset="emoji", resolution=8, split="heldout")
    np.testing.assert_array_equal(source.labels, [example["label"] for example in examples["heldout"]])
    assert "heldout" in preparation.report(info, built=True, data_dir="data")


def test_all_authors_and_licences_travel_with_the_data(prepared):
    description = tfds.builder_from_directory(prepared[1].path).info.description
    for design, name in DESIGNS.items():
        assert f"{name}: Author of {design} (https://example.com), CC BY 4.0 (" in description


def test_command_of_a_missing_data_set_has_the_flag(tmp_path):
    with pytest.raises(InputError, match="--dataset=emoji --resolution=8 --manual_dir=PATH"):
        layout.describe(data_dir=tmp_path, dataset="emoji", resolution=8)


def test_white_drawings_are_left_out():
    bodies = {"snow": '<path fill="#fff" d="M0 0h1v1H0z"/>', "coal": '<path d="M0 0h1v1H0z"/>'}
    emojis = tuple(Emoji(name, "noto", body, (1.0, 1.0)) for name, body in bodies.items())
    package = Package("1", emojis, (), "")
    drawn = [each for shard in emoji.shards(package, resolution=4) for each in shard.examples()]
    assert [each["name"] for each in drawn] == ["coal"]


def test_shards_are_parts_that_other_processes_can_draw():
    package = made(noto=[f"n{number}" for number in range(1200)])
    shards = [shard for shard in emoji.shards(package, resolution=4) if shard.split == "train"]
    assert [(shard.index, shard.count) for shard in shards] == [(0, 3), (1, 3), (2, 3)]
    assert pickle.loads(pickle.dumps(shards[0])).split == "train"


def without(name):
    files = package_files()
    del files[name]
    return files


def with_icons(**icons):
    content = icon_set("noto", ["a"])
    content["icons"] |= icons
    return package_files(noto=content)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            without("json/noto.json"),
            r"is not the package @iconify/json \(no package/json/noto.json\); get it with",
        ),
        (without("package.json"), "is not the package"),
        (package_files() | {"package.json": b"[]"}, r"package\.json is damaged \(it is not an object\)"),
        (package_files() | {"package.json": b"{}"}, "package.json is damaged .it is not of @iconify/json"),
        (package_files() | {"json/noto.json": b'{"icons": NaN}'}, "json/noto.json is damaged .NaN is not a"),
        (package_files(noto={"icons": []}), "json/noto.json is damaged"),
        (package_files(noto=icon_set("noto", ["a"], info={})), r"json/noto\.json is damaged \(no 'author'\)"),
        (with_icons(b={}), r"json/noto\.json is damaged \(no 'body'\)"),
        (with_icons(b={"body": '<image href="/etc/hostname"/>'}), "b is not a drawing"),
        (with_icons(b={"body": "<g/>", "width": 0}), "b is 0 by 32"),
    ],
)
def test_damaged_packages_are_one_line(files, message, tmp_path):
    with pytest.raises(InputError, match=message) as caught:
        emoji.read(write_tgz(tmp_path / "a.tgz", files))
    assert "\n" not in str(caught.value) and "npm pack @iconify/json@" in str(caught.value)


@pytest.mark.parametrize("damage", ["cut", "text", "no tar", "empty", "missing", "directory"])
def test_other_files_are_no_package(damage, tgz, tmp_path):
    path, content = tmp_path / "a.tgz", tgz.read_bytes()
    if damage == "directory":
        path.mkdir()
    elif damage != "missing":
        cases = {"cut": content[:-2000], "text": b"hello", "no tar": gzip.compress(b"x" * 5000), "empty": b""}
        path.write_bytes(cases[damage])
    with pytest.raises(InputError, match=r"a\.tgz is not the package @iconify/json") as caught:
        emoji.read(path)
    assert "\n" not in str(caught.value)


def test_the_package_is_needed():
    with pytest.raises(InputError, match=r"needs --manual_dir=PATH, the \.tgz of: npm pack @iconify"):
        preparation.plan(dataset="emoji", resolution=8)
