import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mcm_jax.data import folder
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


@given(st.integers(1, 12), st.integers(1, 24), st.integers(0, 2**32))
def test_area_sums_are_exact(resolution, side, seed):
    """Repeat every pixel `resolution` times, and the cells are blocks of whole pixels; enlarging too."""
    values = np.random.default_rng(seed).integers(0, 256, (side, 2, 3), np.uint8)
    expected = values.repeat(resolution, axis=0).reshape(resolution, side, 2, 3).sum(1)
    for given_as in (values, values.astype(np.int32)):
        found = folder._sums_over_cells(given_as, resolution, np.int32)
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("side", [257, 258, 900, 3000])
def test_sums_of_large_images_do_not_overflow(side):
    """Two cells of white: up to 257 rows fit 16 bits, up to 2,901 pixels squared 31 bits."""
    white = Image.fromarray(np.full((side, side, 3), 255, np.uint8))
    assert (folder.square_area(white, 1) == 255).all() and (folder.square_area(white, 2) == 255).all()


def test_a_half_is_rounded_to_even():
    """As in NumPy."""
    halves = Image.fromarray(np.array([[0, 1], [1, 0]], np.uint8)).convert("RGB")
    odd_halves = Image.fromarray(np.array([[1, 2], [2, 1]], np.uint8)).convert("RGB")
    assert (folder.square_area(halves, 1) == 0).all() and (folder.square_area(odd_halves, 1) == 2).all()


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
        (["a.png", "cats/b.png"], r"both in it \(a.png\) and in its subfolders \(cats\)"),
    ],
)
def test_folders_that_cannot_be_split_are_refused(tmp_path, files, message):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(InputError, match=message):
        folder.list_images(tmp_path, single_class="x")


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(InputError, match="nowhere: there is no such folder"):
        folder.list_images(tmp_path / "nowhere", single_class="x")
