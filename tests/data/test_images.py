import io
import os
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from mcm_jax.data import folder, imagenet, images
from mcm_jax.evaluation.image_files import open_images
from mcm_jax.system.errors import InputError
from tests.limits import refusal

# A white top edge: every orientation puts it, and the corner, elsewhere.
STORED = np.zeros((6, 4, 3), np.uint8)
STORED[0], STORED[0, 0] = 255, 100


def entry(tag, kind, count, value):
    return struct.pack("<HHI4s", tag, kind, count, value)


def exif(*entries):
    """A TIFF directory as it lies in a file: what `Image.Exif` would not write can be in it."""
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)


def turned(value):
    return entry(0x112, 3, 1, struct.pack("<HH", value, 0))


WIDTH_AS_TEXT = entry(0x100, 2, 4, b"abc\0")
UNKNOWN_KIND = entry(0x10F, 99, 1, b"abcd")
FAR_AWAY = entry(0x10F, 2, 2**31, b"\xff\xff\xff\x7f")


def encoded(suffix, **options):
    content = io.BytesIO()
    how = {"lossless": True} if suffix == "webp" else {}
    Image.fromarray(STORED).save(content, {"jpg": "JPEG"}.get(suffix, suffix), **how, **options)
    return content.getvalue()


def loaded(path, content):
    """The pixels at the file's own size, as `evaluate` reads them; `prepare` must read the same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    (block,) = open_images(path.parent).blocks(1)
    prepared = folder.load_image(path, resolution=4)
    height, width = block[0].shape[1:3]
    top, left = (height - 4) // 2, (width - 4) // 2
    np.testing.assert_array_equal(prepared, block[0][0, top : top + 4, left : left + 4])
    return block[0][0]


@pytest.mark.parametrize("odd", [(), (WIDTH_AS_TEXT,), (UNKNOWN_KIND,), (FAR_AWAY,)])
@pytest.mark.parametrize("suffix", ["jpg", "webp", "png"])
def test_the_mark_turns_the_image_whatever_stands_beside_it(tmp_path, suffix, odd):
    pixels = loaded(tmp_path / f"a.{suffix}", encoded(suffix, exif=exif(*odd, turned(6))))
    np.testing.assert_allclose(pixels, np.rot90(STORED, -1), atol=60 if suffix == "jpg" else 0)


@pytest.mark.parametrize("value", range(1, 10))
def test_every_mark_is_turned_as_pillow_does(tmp_path, value):
    from PIL import ImageOps

    content = encoded("png", exif=exif(turned(value)))
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(content))))
    np.testing.assert_array_equal(loaded(tmp_path / "a.png", content), expected)


@pytest.mark.parametrize(
    "mark",
    [
        b"Exif\0\0no TIFF directory",
        b"Exif\0\0",
        exif(entry(0x112, 2, 4, b"six\0")),
        exif(entry(0x112, 5, 1, bytes(4))),
        exif(turned(6))[:20],
        exif(turned(77)),
    ],
)
@pytest.mark.parametrize("suffix", ["jpg", "webp", "png"])
def test_without_a_readable_mark_the_image_is_used_as_it_lies(tmp_path, suffix, mark):
    with warnings.catch_warnings(action="error"):
        pixels = loaded(tmp_path / f"a.{suffix}", encoded(suffix, exif=mark))
    np.testing.assert_allclose(pixels, STORED, atol=60 if suffix == "jpg" else 0)


def test_a_profile_that_is_no_number_is_no_mark(tmp_path):
    text = PngImagePlugin.PngInfo()
    text.add_text("Raw profile type exif", "\nexif\n 4\nnot hexadecimal\n", zip=True)
    np.testing.assert_array_equal(loaded(tmp_path / "a.png", encoded("png", pnginfo=text)), STORED)


def test_a_tiff_is_turned_once(tmp_path):
    """Pillow turns TIFF by itself."""
    content = encoded("tiff", tiffinfo={0x112: 6})
    np.testing.assert_array_equal(loaded(tmp_path / "a.tif", content), np.rot90(STORED, -1))


def test_a_mark_behind_the_pixels_of_a_png(tmp_path):
    """The standard allows it. Only decoding the pixels shows it, and that the size is another."""
    content = encoded("png")
    chunk = io.BytesIO()
    PngImagePlugin.putchunk(chunk, b"eXIf", exif(turned(6))[6:])
    path = tmp_path / "a.png"
    path.write_bytes(content[:-12] + chunk.getvalue() + content[-12:])
    np.testing.assert_array_equal(folder.load_image(path, resolution=4), np.rot90(STORED, -1)[:, 1:5])
    with pytest.raises(InputError, match=r"several sizes, a\.png of 4x6 and a\.png of 6x4"):
        list(open_images(tmp_path).blocks(1))


def test_a_message_stays_on_one_line(tmp_path):
    path = tmp_path / "a\nb.png"
    path.write_bytes(b"no image")
    for read in (lambda: folder.load_image(path, resolution=4), lambda: open_images(tmp_path)):
        with pytest.raises(InputError, match=r"a\\nb\.png: not a readable image") as caught:
            read()
        assert "\n" not in str(caught.value)


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def test_all_that_pillow_decodes_is_found_by_its_suffix(tmp_path):
    suffixes = "JPG apng avif bmp gif jfif jp2 jpe jpeg png ppm tga tif tiff webp".split()
    read = [f"1.{suffix}" for suffix in suffixes]
    touch(tmp_path, *read, "1.heic", "2.heic", "1.txt", "1.PNG.part", "1.eps", "1.h5", "1")
    found = images.find(tmp_path)
    assert list(found.files) == sorted(read)
    assert found.note() == "skipped: 2 .heic, 1 .eps, 1 .h5, 1 .part, 1 .txt, 1 without a suffix"


def test_hidden_files_and_folders_are_skipped(tmp_path):
    touch(tmp_path, "a/1.png", "a/._1.png", ".ipynb_checkpoints/1.png", "a/.cache/deep/1.png", "a/.txt")
    found = images.find(tmp_path)
    assert found.files == ("a/1.png",) and found.skipped == {"hidden": 4}


def test_links_are_followed_but_not_in_circles(tmp_path):
    touch(tmp_path, "store/1.png", "store/deep/2.png", "root/a/3.png")
    root = tmp_path / "root"
    (root / "b").symlink_to(tmp_path / "store")
    (root / "a" / "linked").symlink_to("../../store/deep")
    (root / "4.png").symlink_to(tmp_path / "store" / "1.png")
    (tmp_path / "store" / "up").symlink_to(root)
    (root / "lost").symlink_to(tmp_path / "nowhere")
    found = images.find(root)
    assert found.files == ("4.png", "a/3.png", "a/linked/2.png", "b/1.png", "b/deep/2.png")
    assert found.skipped == {"looping link": 1, "broken link": 1}


def test_a_broken_link_to_an_image_is_named(tmp_path):
    touch(tmp_path, "1.png", "2.png")
    (tmp_path / "3.png").symlink_to(tmp_path / "nowhere.png")
    assert images.find(tmp_path).files == ("1.png", "2.png", "3.png")
    with pytest.raises(InputError, match=r"3\.png: not a readable image"):
        folder.load_image(tmp_path / "3.png", resolution=4)


def test_what_is_no_file_is_skipped(tmp_path):
    """Opening a pipe would wait for ever."""
    os.mkfifo(tmp_path / "pipe.png")
    assert images.find(tmp_path).skipped == {".png": 1}


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    """A class must not vanish because nobody may read it."""
    touch(tmp_path, "a/1.png", "b/1.png")
    scandir = os.scandir

    def denied(path):
        if path.name == "b":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(InputError, match=r"cannot read .*/b \(Permission denied\)"):
        images.find(tmp_path)


def test_many_kinds_are_summed_up(tmp_path):
    touch(tmp_path, *(f"1.{n:02}" for n in range(15)), "2.03")
    listed = "".join(f"1 .{n:02}, " for n in (0, 1, 2, 4, 5, 6, 7, 8, 9))
    assert images.find(tmp_path).note() == f"skipped: 2 .03, {listed}5 others"


FORMATS = ("jpeg", "png", "webp", "avif", "gif", "bmp", "jpeg2000", "pcx", "ppm", "qoi", "sgi", "tga", "tiff")


@pytest.mark.parametrize("name", FORMATS)
def test_a_damaged_file_is_an_input_error_and_nothing_else(tmp_path, name):
    """A hundred mutations of a file in each format: it is read, or one line names it."""
    rng = np.random.default_rng(0)
    content = io.BytesIO()
    noise = Image.fromarray(rng.integers(0, 256, (7, 5, 3), np.uint8))
    marked = {"exif": exif(WIDTH_AS_TEXT, turned(6))} if name in ("jpeg", "png", "webp") else {}
    noise.save(content, name, **marked)
    path, refusals = tmp_path / f"a.{name}", []
    for _ in range(100):
        mutated = np.frombuffer(content.getvalue(), np.uint8).copy()
        places = rng.integers(0, rng.choice([40, 120, len(mutated)]), rng.integers(1, 4))
        mutated[places % len(mutated)] = rng.choice([0, 255, rng.integers(256)])
        path.write_bytes(mutated[: len(mutated) - rng.choice([0, 0, rng.integers(len(mutated))])].tobytes())
        try:
            folder.load_image(path, resolution=4)
        except InputError as error:
            refusals.append(str(error))
    assert 0 < len(refusals) < 100
    assert all(f"a.{name}: not a readable image" in line and "\n" not in line for line in refusals)


def png_of_zeros(side):
    """A PNG of side^2 grey pixels, whose file is 1/1,000 of that."""
    content = io.BytesIO(b"\x89PNG\r\n\x1a\n")
    content.seek(8)
    PngImagePlugin.putchunk(content, b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0))
    PngImagePlugin.putchunk(content, b"IDAT", zlib.compress(bytes(side * (side + 1)), 1))
    PngImagePlugin.putchunk(content, b"IEND", b"")
    return content.getvalue()


# Pillow only warns at the first size, and raises its error at the second.
@pytest.mark.parametrize("side", [9_500, 14_000])
def test_an_image_of_too_many_pixels_is_one_line(tmp_path, side):
    path = tmp_path / "bomb.png"
    path.write_bytes(png_of_zeros(side))
    encoded = imagenet.Encoded("bomb.png", path.read_bytes(), 0)
    for read in (
        lambda: folder.load_image(path, resolution=4),
        lambda: open_images(tmp_path),
        lambda: imagenet.load(encoded, resolution=4, preparation="area"),
    ):
        found = refusal(read)
        assert found is not None and "bomb.png: not a readable image (Image size" in found


def test_a_part_of_gigabytes_is_one_line_or_skipped(tmp_path):
    """The length of a PNG's pixels says that they fill 4 GB; the pixels themselves are whole."""
    content = encoded("png")
    place = content.index(b"IDAT") - 4
    (tmp_path / "bomb.png").write_bytes(content[:place] + b"\x7f\xff\xff\xff" + content[place + 4 :])
    for read in (
        lambda: folder.load_image(tmp_path / "bomb.png", resolution=4),
        lambda: list(open_images(tmp_path).blocks(1)),
    ):
        refusal(read)
