"""Images of other programs: what is read is what they wrote, and bad input is refused beforehand."""

import io

import numpy as np
import pytest
from PIL import Image

from mcm_jax.evaluation.image_files import open_images
from mcm_jax.system.errors import InputError

IMAGES = np.random.default_rng(0).integers(0, 256, (5, 4, 6, 3), np.uint8)


def png(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def folder(tmp_path):
    for n, pixels in enumerate(IMAGES):
        png(tmp_path / "images" / f"class {n % 2}" / f"{n}.png", pixels)
    return tmp_path / "images"


def all_of(found, size=2):
    blocks = list(found.blocks(size))
    return np.concatenate([images for images, _ in blocks]), np.concatenate([labels for _, labels in blocks])


@pytest.mark.parametrize("labels", [None, np.arange(5, dtype=np.int64)])
def test_an_npz_as_adm_and_sample_write_it(labels, tmp_path):
    path = tmp_path / "samples.npz"
    np.savez(path, *([IMAGES] if labels is None else [IMAGES, labels]))
    found = open_images(path)
    images, read = all_of(found)
    np.testing.assert_array_equal(images, IMAGES)
    np.testing.assert_array_equal(read, np.zeros(5) if labels is None else labels)
    assert found.num == 5 and found.has_labels == (labels is not None)
    assert found.description["images"] == "samples.npz"


def test_a_folder_in_the_order_of_its_paths(folder):
    found = open_images(folder)
    images, _ = all_of(found)
    np.testing.assert_array_equal(images, IMAGES[[0, 2, 4, 1, 3]])
    assert found.num == 5 and not found.has_labels


def test_what_is_no_image_is_noted(folder):
    """The listing is that of `prepare`, see tests/data/test_images.py."""
    for name in (".hidden.png", "list.txt", "photo.heic"):
        (folder / name).write_text("no image")
    (folder / ".ipynb_checkpoints").mkdir()
    png(folder / ".ipynb_checkpoints" / "0.png", IMAGES[0])
    for n, suffix in enumerate(("gif", "tif", "jfif", "tga")):
        Image.fromarray(IMAGES[n]).save(folder / f"{n}.{suffix}")
    found = open_images(folder)
    assert found.num == len(all_of(found)[0]) == 9
    assert found.note == "skipped: 2 hidden, 1 .heic, 1 .txt"


def test_a_linked_folder_is_read(folder, tmp_path):
    (folder / "linked").symlink_to(folder / "class 0")
    assert open_images(folder).num == 8


def test_the_hash_is_of_the_content(folder, tmp_path):
    first = open_images(folder).description
    assert open_images(folder).description == first
    png(folder / "class 0" / "0.png", 255 - IMAGES[0])
    assert open_images(folder).description["sha256"] != first["sha256"]


def test_grey_and_palette_images_become_rgb(tmp_path):
    Image.fromarray(IMAGES[0]).convert("L").save(tmp_path / "grey.png")
    images, _ = all_of(open_images(tmp_path))
    assert images.shape == (1, 4, 6, 3) and (images[..., 0] == images[..., 1]).all()


def text(path):
    path.parent.mkdir(exist_ok=True)
    path.write_text("no image")


def transparent(path):
    path.parent.mkdir()
    Image.fromarray(IMAGES[0]).convert("RGBA").save(path)


def deep(path):
    path.parent.mkdir()
    Image.fromarray(np.full((4, 4), 40_000, np.uint16)).save(path)


def cut_off(path):
    content = io.BytesIO()
    np.savez(content, IMAGES)
    path.write_bytes(content.getvalue()[:-30])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "there is no such file or folder"),
        (lambda path: path.mkdir(), "no images in that folder"),
        (lambda path: text(path / "a.png"), "a.png: not a readable image"),
        (lambda path: path.write_bytes(b"text"), "neither a complete .npz nor a folder"),
        (lambda path: transparent(path / "a.png"), "a.png: not a readable image .mode RGBA; use opaque"),
        (lambda path: deep(path / "a.png"), "a.png: not a readable image .mode I;16; use opaque"),
        (cut_off, "neither a complete .npz nor a folder"),
        (
            lambda path: np.savez(path.open("wb"), x=IMAGES),
            "arr_0 must hold uint8 images .*, not nothing",
        ),
        (
            lambda path: np.savez(path.open("wb"), IMAGES / 255),
            "arr_0 must hold uint8 images .* not float64",
        ),
        (lambda path: np.savez(path.open("wb"), IMAGES, np.arange(4)), "arr_1 must hold 5 labels"),
        (lambda path: np.save(path.open("wb"), IMAGES), "neither a complete .npz nor a folder"),
    ],
)
def test_what_is_none(make, message, tmp_path):
    path = tmp_path / "images"
    make(path)
    with pytest.raises(InputError, match=message) as error:
        open_images(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_images_of_several_sizes(folder):
    png(folder / "z.png", IMAGES[0].transpose(1, 0, 2))
    with pytest.raises(InputError, match=r"several sizes, 0.png of 6x4 and z.png of 4x6"):
        open_images(folder)


def test_an_image_that_breaks_off(folder):
    """Its head is whole: only reading tells."""
    file = folder / "class 1" / "1.png"
    file.write_bytes(file.read_bytes()[:-30])
    with pytest.raises(InputError, match=r"1\.png: not a readable image"):
        all_of(open_images(folder))
