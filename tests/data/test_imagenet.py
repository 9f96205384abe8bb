"""Tiny tars of ILSVRC2012's layout: what is read equals what TFDS's own builder reads, and damage is told."""

import io
import re
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from etils import epath
from PIL import Image

from mcm_jax import prepare
from mcm_jax.data import imagenet, layout, pipeline, preparation, resizing, shards
from mcm_jax.system import files
from mcm_jax.system.errors import InputError
from tests.limits import refusal
from tests.tars import tar

# Out of order, as tars may be.
CLASSES = ("n01484850", "n01440764", "n15075141")
RESOLUTION = 16


def picture(seed, size=(40, 30), mode="RGB"):
    """Smooth, so that JPEG keeps it, with a different side in front."""
    draw = np.random.default_rng(seed)
    small = Image.fromarray(draw.integers(0, 256, (5, 4, 3), np.uint8))
    return small.resize(size, Image.Resampling.BICUBIC).convert(mode)


def encoded(image, kind="JPEG"):
    file = io.BytesIO()
    image.save(file, kind, **({"quality": 95} if kind == "JPEG" else {}))
    return file.getvalue()


def make_manual_dir(directory: Path) -> Path:
    """Seven training images of three classes, a grey one among them, and five validation images."""
    seeds = iter(range(100))
    classes = {
        f"{name}.tar": tar(
            {
                f"{name}_{n}.JPEG": encoded(
                    picture(next(seeds), (30 + 7 * n, 25), "L" if (name, n) == (CLASSES[0], 1) else "RGB")
                )
                for n in range(count)
            }
        )
        for name, count in zip(CLASSES, (3, 2, 2), strict=True)
    }
    test = {f"ILSVRC2012_val_{n:08d}.JPEG": encoded(picture(next(seeds))) for n in (3, 1, 2, 5, 4)}
    directory.mkdir(parents=True, exist_ok=True)
    (directory / imagenet.TRAIN_TAR).write_bytes(tar(classes))
    (directory / imagenet.TEST_TAR).write_bytes(tar(test))
    return directory


@pytest.fixture(scope="module")
def manual_dir(tmp_path_factory):
    return make_manual_dir(tmp_path_factory.mktemp("imagenet") / "manual")


@pytest.fixture(scope="module", params=["tfrecord", "array_record"])
def tfds_dir(request, manual_dir, tmp_path_factory):
    """The same tars through TFDS's own builder."""
    data_dir = tmp_path_factory.mktemp(request.param)
    builder = tfds.builder("imagenet2012", data_dir=data_dir, try_gcs=False)
    config = tfds.download.DownloadConfig(manual_dir=manual_dir, try_download_gcs=False)
    builder.download_and_prepare(download_config=config, file_format=request.param)
    return data_dir


def read(source):
    """(split, file, label, content) of everything, whatever the order."""
    return sorted(
        (unit.split, one.name, one.label, one.content) for unit in source.units() for one in source.read(unit)
    )


def test_the_tars_are_read_as_tfds_reads_them(manual_dir, tfds_dir):
    """Files, labels, contents; the order is each one's own."""
    builder = tfds.builder("imagenet2012", data_dir=tfds_dir, try_gcs=False)
    expected = []
    for split, name in (("train", "train"), ("test", "validation")):
        raw = {"image": tfds.decode.SkipDecoding()}
        if tfds_dir.name.startswith("array_record"):
            examples = builder.as_data_source(name, decoders=raw)
        else:
            examples = tfds.as_numpy(builder.as_dataset(split=name, decoders=raw))
        for example in examples:
            fields = (example["file_name"].decode(), int(example["label"]), example["image"])
            expected.append((split, *fields))
    found = read(imagenet.open_source(str(manual_dir)))
    assert found == sorted(expected) and len(found) == 12
    assert read(imagenet.open_source(str(tfds_dir))) == found


def test_only_tfrecord_files_need_tensorflow(tfds_dir, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    if tfds_dir.name.startswith("array_record"):
        assert read(imagenet.open_source(str(tfds_dir)))
        return
    with pytest.raises(InputError, match=r"stored as TFRecord.*pip install tensorflow"):
        imagenet.open_source(str(tfds_dir))


def test_classes_are_numbered_as_everyone_numbers_them():
    names = imagenet.class_names()
    assert len(names) == 1000 and list(names) == sorted(names)
    # The tench, the goldfish and, at the end, toilet paper.
    assert (names[0], names[1], names[999]) == ("n01440764", "n01443537", "n15075141")


def test_validation_labels_go_by_the_order_of_names(manual_dir):
    names = imagenet.class_names()
    found = {
        name: names[label]
        for split, name, label, _ in read(imagenet.open_source(str(manual_dir)))
        if split == "test"
    }
    # Of the first two validation images of ILSVRC2012: a snake and a ski.
    assert found["ILSVRC2012_val_00000001.JPEG"] == "n01751748"
    assert found["ILSVRC2012_val_00000002.JPEG"] == "n09193705"


def prepared(manual_dir, data_dir, dataset="imagenet", **how):
    chosen = preparation.plan(
        dataset=dataset, resolution=RESOLUTION, manual_dir=str(manual_dir), workers=0, **how
    )
    return preparation.prepare(chosen, data_dir=data_dir)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_prepared_data_set(manual_dir, tmp_path, workers):
    """Images, labels and names of every shard; the pipeline reads them, and nothing is left behind."""
    chosen = preparation.plan(
        dataset="imagenet", resolution=RESOLUTION, manual_dir=str(manual_dir), workers=workers
    )
    info, built = preparation.prepare(chosen, data_dir=tmp_path)
    assert built and info.num_examples == {"train": 7, "test": 5} and info.num_classes == 1000
    assert info.class_counts["train"][2] == 3 and info.class_names[2] == CLASSES[0]
    assert "not all of ILSVRC2012, which has 1,281,167 and 50,000 images" in preparation.report(
        info, built=True, data_dir=str(tmp_path)
    )
    records = tfds.builder_from_directory(info.path).as_data_source("train")
    expected = {one[1]: one for one in read(imagenet.open_source(str(manual_dir)))}
    for record in records:
        name = record["file"].decode() if isinstance(record["file"], bytes) else record["file"]
        _, _, label, content = expected[name]
        with Image.open(io.BytesIO(content)) as image:
            pixels = resizing.square_area(image.convert("RGB"), RESOLUTION)
        np.testing.assert_array_equal(record["image"], pixels)
        assert record["label"] == label
    source = pipeline.open_split(data_dir=tmp_path, dataset="imagenet", resolution=RESOLUTION, split="test")
    assert len(source) == 5
    assert {path.name for path in tmp_path.iterdir()} == {"imagenet"}
    assert not list(info.path.glob("*.array_record-*.json"))


def test_tars_and_tfds_give_the_same_images(manual_dir, tfds_dir, tmp_path):
    one, _ = prepared(manual_dir, tmp_path / "a")
    other, _ = prepared(tfds_dir, tmp_path / "b")
    assert one.num_examples == other.num_examples and one.class_counts == other.class_counts
    images = [
        sorted(
            record["image"].tobytes()
            for record in tfds.builder_from_directory(info.path).as_data_source("train")
        )
        for info in (one, other)
    ]
    assert images[0] == images[1] and one.source != other.source


def test_adms_preparation_is_another_data_set(manual_dir, tmp_path):
    area, _ = prepared(manual_dir, tmp_path)
    adm, _ = prepared(manual_dir, tmp_path, "imagenet/adm")
    assert adm.path != area.path and adm.fingerprints != area.fingerprints
    assert "ADM's" in adm.preprocessing and "area resize" in area.preprocessing
    assert layout.describe(data_dir=tmp_path, dataset="imagenet/adm", resolution=RESOLUTION) == adm


@pytest.fixture(scope="module", params=["tfrecord", "array_record"])
def resized_dir(request, tmp_path_factory):
    """TFDS's own builder of imagenet_resized, on archives of the layout that it downloads."""
    draw, data_dir = np.random.default_rng(0), tmp_path_factory.mktemp(f"resized_{request.param}")
    # Numbered from 1 in its own order: kit fox, English setter and, last, dumbbell.
    labels = {"train": np.array([1, 2, 1000, 1]), "val": np.array([2, 1])}
    arrays = {
        split: {"data": draw.integers(0, 256, (len(of), 3 * RESOLUTION**2), np.uint8), "labels": of}
        for split, of in labels.items()
    }
    paths = []
    for split, content in arrays.items():
        file = io.BytesIO()
        np.savez(file, **content)
        paths.append(data_dir / f"Imagenet{RESOLUTION}_{split}_npz.zip")
        with zipfile.ZipFile(paths[-1], "w") as archive:
            archive.writestr(f"{split}_data_batch_1.npz", file.getvalue())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tfds.download.DownloadManager, "download", lambda *_: [epath.Path(p) for p in paths])
        builder = tfds.builder(f"imagenet_resized/{RESOLUTION}x{RESOLUTION}", data_dir=data_dir)
        builder.download_and_prepare(file_format=request.param)
    return data_dir, arrays


def test_small_images_keep_their_pixels_and_their_classes_names(resized_dir, tmp_path):
    data_dir, arrays = resized_dir
    info, _ = prepared(data_dir, tmp_path, "imagenet/resized")
    assert info.num_examples == {"train": 4, "test": 2} and "Chrabaszcz" in info.preprocessing
    assert info.path.parent.name == f"resized_{RESOLUTION}"
    wnids = {1: "n02119789", 2: "n02100735", 1000: "n03255030"}
    for split, ours in (("train", "train"), ("val", "test")):
        content = arrays[split]
        expected = {
            (wnids[label], row.reshape(3, RESOLUTION, RESOLUTION).transpose(1, 2, 0).tobytes())
            for row, label in zip(content["data"], content["labels"].tolist(), strict=True)
        }
        records = tfds.builder_from_directory(info.path).as_data_source(ours)
        found = {(info.class_names[record["label"]], record["image"].tobytes()) for record in records}
        assert found == expected and len(records) == len(expected)


@pytest.mark.parametrize(
    ("size", "message"), [(48, "imagenet/resized has only 8, 16, 32, 64"), (64, "holds no prep")]
)
def test_small_images_that_are_not_there(size, message, tmp_path):
    with pytest.raises(InputError, match=message):
        imagenet.open_source(str(tmp_path), resized_to=size)


def test_adm_halves_then_scales_then_crops():
    """67 x 130 to 16: halved twice, after which 16 is not twice too long, then the middle."""
    image = picture(0, (130, 67))
    halved = image.resize((65, 33), Image.Resampling.BOX).resize((32, 16), Image.Resampling.BOX)
    expected = np.asarray(halved)[:, 8:24]
    found = imagenet.load(imagenet.Encoded("x", encoded(image, "PNG"), 0), resolution=16, preparation="adm")
    np.testing.assert_array_equal(found, expected)
    # Enlarged or reduced by less than two, it is bicubic alone.
    small = picture(1, (20, 24))
    found = imagenet.load(imagenet.Encoded("x", encoded(small, "PNG"), 0), resolution=16, preparation="adm")
    np.testing.assert_array_equal(found, np.asarray(small.resize((16, 19), Image.Resampling.BICUBIC))[1:17])


@pytest.mark.parametrize(
    ("mode", "kind"), [("RGB", "PNG"), ("L", "JPEG"), ("CMYK", "JPEG"), ("P", "PNG"), ("RGBA", "PNG")]
)
def test_images_that_are_not_what_they_are_called(mode, kind):
    image = picture(0)
    content = encoded(image.convert(mode), kind)
    found = imagenet.load(
        imagenet.Encoded("n02105855_2933.JPEG", content, 0), resolution=16, preparation="area"
    )
    expected = resizing.square_area(image.convert("L" if mode == "L" else "RGB").convert("RGB"), 16)
    assert found.shape == (16, 16, 3)
    # Palettes of 256 colours and JPEG's losses; a channel taken for another would be off by a hundred.
    assert np.abs(found.astype(int) - expected.astype(int)).mean() < 12


def test_orientation_marks_are_ignored():
    image = picture(0)
    exif = Image.Exif()
    exif[0x0112] = 3  # Turned by 180 degrees.
    file = io.BytesIO()
    image.save(file, "PNG", exif=exif)
    found = imagenet.load(imagenet.Encoded("x", file.getvalue(), 0), resolution=16, preparation="area")
    np.testing.assert_array_equal(found, resizing.square_area(image, 16))


def cut(manual_dir, directory, name, keep):
    for file in (imagenet.TRAIN_TAR, imagenet.TEST_TAR):
        content = (manual_dir / file).read_bytes()
        directory.mkdir(exist_ok=True)
        (directory / file).write_bytes(content[: keep(content)] if file == name else content)
    return directory


@pytest.mark.parametrize("name", [imagenet.TRAIN_TAR, imagenet.TEST_TAR])
def test_a_tar_that_is_cut_off_is_told_before_any_work(manual_dir, tmp_path, name):
    with tarfile.open(manual_dir / name) as whole:
        members = whole.getmembers()
    # Within a file, between two files, before the zeros that end it, and at the start.
    ends = [members[1].offset_data + 5, members[1].offset, members[-1].offset_data + 10**6, 0]
    last = members[-1]
    ends[2] = last.offset_data + -(-last.size // 512) * 512
    for number, end in enumerate(ends):
        directory = cut(manual_dir, tmp_path / f"{number}", name, lambda _, end=end: end)
        with pytest.raises(InputError, match=f"{name} is .*truncated") as error:
            imagenet.open_source(str(directory))
        assert "\n" not in str(error.value)


def test_an_image_that_cannot_be_read_is_named(manual_dir, tmp_path):
    directory = cut(manual_dir, tmp_path / "manual", "", None)
    classes = {f"{CLASSES[1]}.tar": tar({"bad.JPEG": encoded(picture(0))[:200]})}
    (directory / imagenet.TRAIN_TAR).write_bytes(tar(classes))
    with pytest.raises(InputError, match=r"bad\.JPEG: not a readable image"):
        prepared(directory, tmp_path / "data")
    assert not list((tmp_path / "data").glob("imagenet"))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "holds neither ILSVRC2012_img_train.tar nor a prepared imagenet2012"),
        ({imagenet.TRAIN_TAR: tar({})}, "has no ILSVRC2012_img_val.tar; get"),
        (
            {imagenet.TRAIN_TAR: tar({"cats.tar": b""}), imagenet.TEST_TAR: tar({})},
            "cats.tar is not the tar of an ILSVRC2012 class",
        ),
        (
            {imagenet.TRAIN_TAR: tar({}), imagenet.TEST_TAR: tar({"._ILSVRC2012_val_00000001.JPEG": b""})},
            "._ILSVRC2012_val_00000001.JPEG is not an ILSVRC2012 validation image",
        ),
        ({imagenet.TRAIN_TAR: b"text" * 300, imagenet.TEST_TAR: tar({})}, "not a tar file or is truncated"),
    ],
)
def test_what_is_no_imagenet(files, message, tmp_path):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        imagenet.open_source(str(tmp_path))
    assert "\n" not in str(error.value)


class Interrupted(BaseException):
    """As Ctrl-C is."""


def test_an_interrupted_preparation_goes_on_where_it_was(manual_dir, tmp_path, monkeypatch):
    """Shards that are whole are not made again; one that was begun is, and one that was cut off."""
    whole, _ = prepared(manual_dir, tmp_path / "whole")
    made, real = [], shards._write_one

    def write_one(shard, **how):
        if len(made) == 2:
            raise Interrupted
        made.append(shard.index)
        real(shard, **how)

    monkeypatch.setattr(shards, "_write_one", write_one)
    data_dir = tmp_path / "data"
    with pytest.raises(Interrupted):
        prepared(manual_dir, data_dir)
    assert not (data_dir / "imagenet").exists()
    first, second = sorted(
        data_dir.glob(".incomplete-imagenet-*/imagenet/16/1.0.0/*.array_record-0000?-of-0000?")
    )
    second.write_bytes(second.read_bytes()[:-10])
    kept = first.stat().st_mtime_ns
    again = []
    monkeypatch.setattr(
        shards, "_write_one", lambda shard, **how: (again.append(shard.index), real(shard, **how))
    )
    info, built = prepared(manual_dir, data_dir)
    assert built and again == [1, 2, 0]  # The test split's shard is the last.
    assert (info.path / first.name).stat().st_mtime_ns == kept
    assert info.fingerprints == whole.fingerprints
    assert {path.name for path in data_dir.iterdir()} == {"imagenet"}


def test_hosts_share_the_work(manual_dir, tmp_path, monkeypatch):
    """Each writes its part; the first one waits and completes, and it is the same data set as one host's."""
    whole, _ = prepared(manual_dir, tmp_path / "whole")
    data_dir = tmp_path / "data"
    assert prepared(manual_dir, data_dir, host=(1, 3)) == (None, False)
    assert not (data_dir / "imagenet").exists()

    def others(_):
        """While the first waits, the last comes to its end."""
        assert prepared(manual_dir, data_dir, host=(2, 3)) == (None, False)

    monkeypatch.setattr(shards.time, "sleep", others)
    info, built = prepared(manual_dir, data_dir, host=(0, 3))
    assert built and info.fingerprints == whole.fingerprints
    for host in range(3):
        assert prepared(manual_dir, data_dir, host=(host, 3)) == (info, False)


def test_hosts_share_only_a_bucket(manual_dir, bucket, tmp_path, monkeypatch):
    """Shard by shard, resumable; the tars come from a bucket too."""
    monkeypatch.setenv(layout.LOCAL_DATA, str(tmp_path / "copies"))
    whole, _ = prepared(manual_dir, tmp_path / "whole")
    place = bucket.path / "imagenet_of_two_hosts"
    for file in manual_dir.iterdir():
        files.write_whole(place / "tars" / file.name, file.read_bytes())
    tars, data_dir, real = str(place / "tars"), place / "data", shards._write_one
    assert prepared(tars, data_dir, host=(1, 2)) == (None, False)

    def again(*_, **__):
        raise AssertionError("this shard is whole")

    monkeypatch.setattr(shards, "_write_one", again)
    assert prepared(tars, data_dir, host=(1, 2)) == (None, False)
    monkeypatch.setattr(shards, "_write_one", real)
    info, built = prepared(tars, data_dir, host=(0, 2))
    assert built and info.fingerprints == whole.fingerprints and info.path == data_dir / "imagenet/16/1.0.0"
    assert prepared(tars, data_dir) == (info, False)
    assert [path.name for path in data_dir.iterdir()] == ["imagenet"]
    source = pipeline.open_split(data_dir=data_dir, dataset="imagenet", resolution=RESOLUTION, split="test")
    assert len(source) == 5


def test_an_interruption_after_the_last_shard_makes_none_again(manual_dir, tmp_path, monkeypatch):
    """While all is read once more, for the hash."""

    def interrupted(*_):
        raise Interrupted

    describe = preparation._describe
    monkeypatch.setattr(preparation, "_describe", interrupted)
    with pytest.raises(Interrupted):
        prepared(manual_dir, tmp_path)
    monkeypatch.setattr(preparation, "_describe", describe)
    monkeypatch.setattr(shards, "_write_one", interrupted)
    assert prepared(manual_dir, tmp_path)[1]


def test_a_disk_that_fills_leaves_nothing_for_complete(manual_dir, tmp_path, monkeypatch):
    class Full:
        def __init__(self, path, options):
            self._path = path

        def write(self, record):
            """Nothing arrives."""

        def close(self):
            writer = real(self._path, "group_size:1")
            writer.write(b"cut off")
            writer.close()

    real = shards.ArrayRecordWriter
    monkeypatch.setattr(shards, "ArrayRecordWriter", Full)
    with pytest.raises(InputError, match="No space left on device"):
        prepared(manual_dir, tmp_path / "data")
    assert not list((tmp_path / "data").rglob("*.array_record*"))


def test_a_disk_that_fills_as_arrayrecord_tells_it(manual_dir, tmp_path, monkeypatch):
    """By a RuntimeError, seen on a full disk."""

    def full(_, record):
        raise RuntimeError("write() failed: No space left on device; writing x.tmp; at byte 1560576")

    monkeypatch.setattr(shards.ArrayRecordWriter, "write", full)
    with pytest.raises(InputError, match="No space left on device"):
        prepared(manual_dir, tmp_path / "data")
    assert not list((tmp_path / "data").rglob("*.array_record*"))


def test_another_error_while_writing_stays_what_it_is(manual_dir, tmp_path, monkeypatch):
    def broken(_, record):
        raise RuntimeError("no luck")

    monkeypatch.setattr(shards.ArrayRecordWriter, "write", broken)
    with pytest.raises(RuntimeError, match="no luck"):
        prepared(manual_dir, tmp_path / "data")


@pytest.mark.parametrize("host", ["0/2", "3/2", "1", "a/b", "1/0"])
def test_hosts_are_numbered_from_one(host):
    with pytest.raises(InputError, match=f"--host={host}: must be K/N"):
        prepare._host(host)
    assert prepare._host("2/4") == (1, 4)


def entry(name="n01440764.tar", size=0, kind=tarfile.REGTYPE):
    made = tarfile.TarInfo(name)
    made.size, made.type = size, kind
    return made.tobuf(tarfile.GNU_FORMAT)


def negative():
    """An entry of minus 512 bytes, so that the next one is itself."""
    header = bytearray(entry())
    header[124:136] = b"\xff" * 10 + b"\xfe\x00"
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


DAMAGED_TARS = {
    "a file of terabytes": (entry(size=10**13), "a file of 10,000,000,000,000 bytes where"),
    "a negative size": (negative(), "a file of -512 bytes"),
    "long names of long names": (entry(kind=tarfile.GNUTYPE_LONGNAME) * 5000, "type 'L'"),
    "attributes of terabytes": (entry(size=10**13, kind=tarfile.XHDTYPE), "a file of 10,000,000,000,000"),
    "a sparse file": (entry(kind=tarfile.GNUTYPE_SPARSE), "type 'S'"),
    "too many files": (entry() * 101, "100 files"),
    "a name of two lines": (entry("a\nb.tar"), r"a\\nb\.tar is not the tar of an ILSVRC2012 class"),
    "a name outside": (entry("../../n01440764.tar"), "is not the tar of an ILSVRC2012 class"),
}


@pytest.mark.parametrize("kind", DAMAGED_TARS)
def test_a_damaged_tar_is_one_line(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(imagenet, "_MAX_MEMBERS", 100)
    content, message = DAMAGED_TARS[kind]
    (tmp_path / imagenet.TRAIN_TAR).write_bytes(content + bytes(1024))
    (tmp_path / imagenet.TEST_TAR).write_bytes(tar({}))
    found = refusal(lambda: imagenet.Tars(tmp_path))
    assert found is not None and imagenet.TRAIN_TAR in found and re.search(message, found), found


def test_links_folders_and_attributes_are_skipped():
    """Their headers may declare a size, but only attributes have content."""
    kinds = (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE)
    content = b"".join(entry("x", 700, kind) for kind in kinds)
    content += entry("x", 700, tarfile.XHDTYPE) + bytes(1024) + entry("file", 3) + b"abc" + bytes(509)
    (member,) = imagenet._members_of(io.BytesIO(content + bytes(1024)), "x")
    assert (member.name, member.size) == ("file", 3)
    assert content[member.offset : member.offset + 3] == b"abc"
