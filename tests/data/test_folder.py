import os

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from mcm_jax.data import folder, layout, pipeline, preparation
from mcm_jax.system.errors import InputError


def save(path, pixels, mode=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels, np.uint8), mode).save(path, **options)
    return path


def uniform(*value, side=4):
    return np.broadcast_to(np.array(value, np.uint8), (side, side, len(value))).copy()


def load(path, resolution=4):
    return folder.load_image(path, resolution=resolution)


def test_area_resize_is_the_block_mean(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (12, 12, 3))
    means = pixels.reshape(3, 4, 3, 4, 3).mean((1, 3))
    loaded = load(save(tmp_path / "a.png", pixels), resolution=3)
    assert loaded.dtype == np.uint8
    np.testing.assert_allclose(loaded, means, atol=0.51)


def test_area_resize_by_a_fraction_weighs_covered_areas(tmp_path):
    """3 pixels to 2: the middle one counts half on each side."""
    columns = np.array([0, 90, 240])
    pixels = np.broadcast_to(columns[None, :, None], (3, 3, 3))
    expected = [(0 + 45) / 1.5, (45 + 240) / 1.5]
    loaded = load(save(tmp_path / "a.png", pixels), resolution=2)
    np.testing.assert_allclose(loaded[0, :, 0], expected, atol=0.51)


@pytest.mark.parametrize("transpose", [False, True])
def test_crop_is_the_central_square(tmp_path, transpose):
    pixels = np.zeros((4, 10, 3), np.uint8)
    pixels[:, 3:7] = np.random.default_rng(0).integers(1, 256, (4, 4, 3))
    pixels = pixels.swapaxes(0, 1) if transpose else pixels
    expected = pixels[3:7] if transpose else pixels[:, 3:7]
    np.testing.assert_array_equal(load(save(tmp_path / "a.png", pixels)), expected)


def test_small_images_are_enlarged(tmp_path):
    assert (load(save(tmp_path / "a.png", uniform(9, 8, 7, side=2)), 5) == [9, 8, 7]).all()


def test_grey_palette_and_cmyk_become_rgb(tmp_path):
    grey = save(tmp_path / "grey.png", np.full((4, 4), 77))
    assert (load(grey) == 77).all()
    palette = Image.fromarray(uniform(200, 30, 60)).convert("P", palette=Image.Palette.ADAPTIVE)
    palette.save(tmp_path / "palette.png")
    assert (load(tmp_path / "palette.png") == [200, 30, 60]).all()
    Image.fromarray(uniform(200, 30, 60)).convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    assert np.abs(load(tmp_path / "cmyk.jpg").astype(int) - [200, 30, 60]).max() < 6
    Image.new("1", (4, 4), 1).save(tmp_path / "bits.png")
    assert (load(tmp_path / "bits.png") == 255).all()


def test_sixteen_bit_grey_keeps_its_high_bits(tmp_path):
    Image.fromarray(np.full((4, 4), 0x4D12, np.uint16)).save(tmp_path / "deep.png")
    assert (load(tmp_path / "deep.png") == 0x4D).all()


def test_transparency_goes_on_white(tmp_path):
    """Half-transparent red is pink; what is fully transparent is white, whatever colour hides there."""
    pixels = np.concatenate([uniform(255, 0, 0, 128)[:, :2], uniform(10, 20, 30, 0)[:, 2:]], axis=1)
    loaded = load(save(tmp_path / "a.png", pixels))
    np.testing.assert_allclose(loaded[0, 0], [255, 127, 127], atol=1)
    assert (loaded[:, 2:] == 255).all()
    palette = Image.fromarray(uniform(1, 2, 3)).convert("P", palette=Image.Palette.ADAPTIVE)
    palette.save(tmp_path / "palette.png", transparency=0)
    assert (load(tmp_path / "palette.png") == 255).all()
    grey = np.stack([np.full((4, 4), 40), np.zeros((4, 4))], axis=-1).astype(np.uint8)
    Image.fromarray(grey, "LA").save(tmp_path / "grey.png")
    assert (load(tmp_path / "grey.png") == 255).all()


def test_camera_orientation_is_applied(tmp_path):
    pixels = np.zeros((4, 4, 3), np.uint8)
    pixels[0] = 255
    exif = Image.Exif()
    exif[0x0112] = 3  # The camera was upside down.
    loaded = load(save(tmp_path / "a.png", pixels, exif=exif))
    np.testing.assert_array_equal(loaded, pixels[::-1, ::-1])


@pytest.mark.parametrize("content", ["text", "cut", "empty"])
def test_unreadable_file_is_named_with_a_remedy(tmp_path, content):
    path = save(tmp_path / "bad.png", np.random.default_rng(0).integers(0, 256, (64, 64, 3)))
    path.write_bytes({"text": b"no image", "cut": path.read_bytes()[:2000], "empty": b""}[content])
    with pytest.raises(InputError, match=r"bad\.png: not a readable image .*remove") as caught:
        load(path)
    assert "\n" not in str(caught.value)


def test_class_folders_give_classes_in_order(tmp_path):
    for name in (
        "dogs/b.png",
        "dogs/z.png",
        "dogs/deep/er/a.JPG",
        "cats/c.png",
        "empty/readme.txt",
        ".hidden/d.png",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "cats" / "._c.png").touch()
    (tmp_path / "list.txt").touch()
    listing = folder.list_images(tmp_path, single_class="x")
    assert listing.class_names == ("cats", "dogs")
    expected = {"cats/c.png": 0, "dogs/b.png": 1, "dogs/deep/er/a.JPG": 1, "dogs/z.png": 1}
    assert list(listing.files.items()) == list(expected.items())


def test_without_class_folders_there_is_one_class(tmp_path):
    for name in ("b.png", "a.png"):
        (tmp_path / name).touch()
    listing = folder.list_images(tmp_path, single_class="pets")
    assert (listing.class_names, list(listing.files)) == (("pets",), ["a.png", "b.png"])


def test_fingerprint_sees_names_and_sizes(tmp_path):
    for name in ("b.png", "a.png"):
        (tmp_path / name).touch()

    def fingerprint():
        return folder.list_images(tmp_path, single_class="pets").fingerprint()

    before = fingerprint()
    assert before == fingerprint()
    (tmp_path / "a.png").write_text("longer")
    longer = fingerprint()
    (tmp_path / "a.png").rename(tmp_path / "c.png")
    assert len({before, longer, fingerprint()}) == 3


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "0 images found"),
        (["a.png"], "1 images found, at least 2"),
        (["a.txt", "b.txt"], r"0 images found.*\.png"),
        (["a.png", "cats/b.png"], r"both directly in it \(a.png\) and in its subfolders \(cats\)"),
    ],
)
def test_folders_that_cannot_be_split_are_refused(tmp_path, files, message):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(InputError, match=message):
        folder.list_images(tmp_path, single_class="x")


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def class_names(root):
    return folder.list_images(root, single_class="x").class_names


def test_numbers_in_class_names_count_as_numbers(tmp_path):
    names = ["10", "9", "02", "2", "a10b", "a9b", "n02_1", "n2"]
    touch(tmp_path, *(f"{name}/a.png" for name in names))
    listing = folder.list_images(tmp_path, single_class="x")
    assert listing.class_names == ("02", "2", "9", "10", "a9b", "a10b", "n2", "n02_1")
    assert all(listing.class_names[label] == name.partition("/")[0] for name, label in listing.files.items())


@pytest.mark.parametrize(
    "name", [" ", "cat ", " cat", "a\nb", "a\r", "a\x85b", "a\u2028b", "a\x1bb", "\u3000a"]
)
def test_a_name_that_comes_back_as_another_is_refused(tmp_path, name):
    """TFDS writes one stripped name a line."""
    touch(tmp_path, f"{name}/a.png", "cat/a.png")
    with pytest.raises(InputError, match=r"the subfolder '.*' cannot be a class name.*rename it") as caught:
        class_names(tmp_path)
    assert str(caught.value).isprintable()


def test_other_odd_names_come_back(tmp_path):
    names = {"a\u3000b", "ünïcødé 图", "a\xa0b", "a  b", "#a", '"a"'}
    touch(tmp_path, *(f"{name}/a.png" for name in names))
    label = tfds.features.ClassLabel(names=class_names(tmp_path))
    label.save_metadata(tmp_path, "label")
    read = tfds.features.ClassLabel()
    read.load_metadata(tmp_path, "label")
    assert tuple(read.names) == class_names(tmp_path) and set(read.names) == names


def test_names_that_are_no_unicode_are_escaped_or_refused(tmp_path):
    touch(tmp_path, os.fsdecode(b"\xff/a.png"), "b/a.png")
    assert class_names(tmp_path) == ("b", "\\xff")
    touch(tmp_path, "\\xff/a.png")
    with pytest.raises(InputError, match="same name once escaped"):
        class_names(tmp_path)


@pytest.mark.parametrize(
    ("names", "refused"),
    [
        (["train/cat/a.png", "val/cat/a.png"], True),
        (["Train/a.png", "Test/b.png"], True),
        (["train/a.png", "validation/a.png", "unlabelled/b.png"], True),
        (["training/cat/a.png", "training/dog/b.png", "readme/a.txt"], True),
        (["train/a.png", "bus/b.png"], False),
        (["cat/train/a.png", "cat/val/b.png"], False),
    ],
)
def test_splits_are_no_classes(tmp_path, names, refused):
    touch(tmp_path, *names)
    if not refused:
        class_names(tmp_path)
        return
    with pytest.raises(
        InputError, match=r"rain\w*.*\) are splits, not classes; give one of them, --manual_dir="
    ):
        class_names(tmp_path)


def test_what_is_left_out_is_noted(tmp_path):
    touch(
        tmp_path,
        "a/1.png",
        "a/2.heic",
        "b/1.heic",
        "b/2.HEIC",
        "d/1.png",
        ".hidden/1.png",
        "list",
        "a/._1.png",
    )
    (tmp_path / "c").mkdir()
    assert folder.list_images(tmp_path, single_class="x").notes == (
        "skipped: 3 .heic, 2 hidden, 1 without a suffix",
        "subfolders without images, which do not become classes: b, c",
    )


def test_a_single_folder_of_classes_is_noted(tmp_path):
    touch(tmp_path, "pets/cats/1.png", "pets/dogs/2.png")
    (note,) = folder.list_images(tmp_path, single_class="x").notes
    assert note.startswith("one class, pets; ") and note.endswith(f"--manual_dir={tmp_path / 'pets'}")


def test_nothing_is_noted_where_all_is_read(tmp_path):
    assert folder.list_images(touch(tmp_path, "a/1.png", "b/1.jpg"), single_class="x").notes == ()


def prepared(root, data_dir):
    chosen = preparation.plan(dataset="folder", resolution=4, manual_dir=str(root), name="x")
    return preparation.prepare(chosen, data_dir=data_dir)[0]


def test_copies_share_a_split(tmp_path, capsys):
    """Forty images, each under three names: what is tested on was never trained on."""
    images = np.random.default_rng(0).integers(0, 256, (40, 4, 4, 3))
    for n, pixels in enumerate(images):
        for name in (f"a/{n}.png", f"a/copy of {n}.png", f"b/{n}.png"):
            save(tmp_path / "images" / name, pixels)
    info = prepared(tmp_path / "images", tmp_path / "data")
    assert "80 images are copies of others" in capsys.readouterr().err
    found = [
        {
            pixels.tobytes()
            for pixels in pipeline.open_split(
                data_dir=tmp_path / "data", dataset="folder/x", resolution=4, split=split
            ).images
        }
        for split in layout.SPLITS
    ]
    assert not found[0] & found[1] and len(found[0] | found[1]) == 40
    assert info.num_examples == {
        split: 3 * len(part) for split, part in zip(layout.SPLITS, found, strict=True)
    }


def test_each_class_trains_on_an_image(tmp_path):
    for n in range(40):
        save(tmp_path / "images" / f"c{n}" / "a.png", uniform(n, n, n))
    info = prepared(tmp_path / "images", tmp_path / "data")
    assert info.num_examples == {"train": 39, "test": 1}
    untrained = info.class_names[info.class_counts["test"].index(1)]
    report = preparation.report(info, built=True, data_dir="data")
    assert f"without training images, so never sampled: {untrained}\n" in report
    assert "\n     10  c10  " in report


def test_copies_of_one_image_are_refused(tmp_path):
    for n in range(3):
        save(tmp_path / "images" / f"{n}.png", uniform(1, 2, 3))
    with pytest.raises(InputError, match="its 3 images are identical"):
        prepared(tmp_path / "images", tmp_path / "data")


def test_paths_that_differ_by_a_backslash_are_two(tmp_path):
    """TFDS takes one for the other where a key is text."""
    for n in range(5):
        save(tmp_path / "images" / "class" / f"{n}\\b.png", uniform(n, 0, 0))
        save(tmp_path / "images" / "class" / f"{n}/b.png", uniform(n, 1, 0))
    assert sum(prepared(tmp_path / "images", tmp_path / "data").num_examples.values()) == 10


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(InputError, match="nowhere: there is no such folder"):
        folder.list_images(tmp_path / "nowhere", single_class="x")
