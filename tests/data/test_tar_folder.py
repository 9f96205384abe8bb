"""Tars of captioned images: keys, captions, notes, and the prepared data set."""

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from mcm_jax.data import pipeline, preparation, tar_folder
from mcm_jax.system.errors import InputError


def png(seed):
    content = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (12, 10, 3), np.uint8)
    Image.fromarray(pixels).save(content, "PNG")
    return content.getvalue()


def write(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return path


FIRST = {
    **{f"{n:04d}.png": png(n) for n in range(40)},
    **{f"{n:04d}.txt": f" number {n}\n".encode() for n in range(40)},
}
SECOND = {
    "a/b.c.png": png(100),
    "a/b.json": json.dumps({"caption": "from JSON", "url": "x"}).encode(),
    "bare.PNG": png(101),
    "broken.png": png(102),
    "broken.txt": b"\xff",
    "no_caption.png": png(103),
    "no_caption.json": b"[]",
    "lonely.txt": b"no image",
    "damaged.png": png(104)[:60],
    "damaged.txt": b"a damaged image",
    "copy.png": png(0),
}


@pytest.fixture
def directory(tmp_path):
    (tmp_path / "tars").mkdir()
    write(tmp_path / "tars" / "00000.tar", FIRST)
    write(tmp_path / "tars" / "00001.tar", SECOND)
    return tmp_path / "tars"


def plan(directory):
    return preparation.plan(dataset="folder", resolution=8, manual_dir=str(directory), name="web")


def test_images_and_captions(directory, tmp_path):
    chosen = plan(directory)
    assert chosen.notes[0] == "skipped, as no image belongs to them: 1 .txt"
    assert chosen.notes[2:] == (
        "2 images without a caption get an empty one: 00001.tar/bare.PNG; 00001.tar/copy.png",
    )
    assert chosen.notes[1].startswith("2 captions are skipped: 00001.tar/broken: ")
    assert chosen.notes[1].endswith("00001.tar/no_caption: it has no caption")
    info, _ = preparation.prepare(chosen, data_dir=tmp_path / "data")
    found, splits = {}, {}
    for split in ("train", "test"):
        source = pipeline.open_split(
            data_dir=tmp_path / "data",
            dataset="folder/web",
            resolution=8,
            split=split,
            in_memory_limit_bytes=0,
        )
        everything = np.arange(len(source))
        records = source.records.__getitems__(everything.tolist())
        for record, caption in zip(records, source.captions(everything), strict=True):
            found[record["file"].decode()] = caption
            splits[record["file"].decode()] = split
    assert found == {
        **{f"00000.tar/{n:04d}.png": f"number {n}" for n in range(40)},
        "00001.tar/a/b.c.png": "from JSON",
        "00001.tar/bare.PNG": "",
        "00001.tar/broken.png": "",
        "00001.tar/no_caption.png": "",
        "00001.tar/copy.png": "",
    }
    assert splits["00001.tar/copy.png"] == splits["00000.tar/0000.png"]
    assert 0 < info.num_examples["test"] < 15


def test_an_image_that_cannot_be_decoded_is_named_once(directory, capsys):
    listing = tar_folder.list_tars(tar_folder.find(directory))
    for shard in tar_folder.shards(listing, resolution=8, label="web"):
        assert all("damaged" not in example["file"] for example in shard.examples())
    assert capsys.readouterr().err.count("note: skipped: 00001.tar/damaged.png") == 1


def test_another_caption_is_another_source(directory):
    before = plan(directory).source
    write(directory / "00000.tar", FIRST | {"0003.txt": b"another"})
    assert plan(directory).source != before


def test_bad_tars(directory):
    (directory / "00002.tar").write_bytes((directory / "00000.tar").read_bytes()[:-20_000])
    with pytest.raises(InputError, match=r"00002\.tar is not a tar file or is truncated"):
        plan(directory)
    for path in directory.iterdir():
        path.unlink()
    write(directory / "one.tar", {"a.png": png(0), "b.txt": b"b"})
    with pytest.raises(InputError, match="hold fewer than two images"):
        plan(directory)
    assert tar_folder.find(directory / "missing") == []
