"""COCO's images and captions are read from TFDS's own data set, in both of its file formats."""

import io

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from mcm_jax.data import coco, pipeline, preparation, resizing
from mcm_jax.system.errors import InputError

COUNTS = {"train": 5, "val": 2, "test": 3, "restval": 4}


def image(split, n):
    pixels = np.random.default_rng([len(split), n]).integers(0, 256, (20, 24, 3), np.uint8)
    return pixels[..., 0] if n == 1 else pixels  # Some of COCO's are grey.


def examples(split):
    for n in range(COUNTS[split]):
        texts = [] if n == 2 else [f" caption {n}\n of {split} ", "another caption"]
        yield (
            n,
            {
                "image": np.atleast_3d(image(split, n)).repeat(3 if n == 1 else 1, axis=2),
                "image/filename": f"COCO_{split}_{n}.jpg",
                "image/id": n,
                "captions": [{"text": text, "id": place} for place, text in enumerate(texts)],
                "objects": [],
            },
        )


def write(data_dir, file_format, splits=tuple(COUNTS)):
    """A data set of the true features through TFDS's own builder, without its downloads."""
    builder = tfds.builder(coco.NAME, data_dir=data_dir, try_gcs=False, file_format=file_format)
    builder._split_generators = lambda dl_manager: {split: examples(split) for split in splits}
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))
    return data_dir


@pytest.fixture(scope="module", params=["tfrecord", "array_record"])
def tfds_dir(request, tmp_path_factory):
    return write(tmp_path_factory.mktemp(request.param), request.param)


def plan(directory, **changed):
    return preparation.plan(dataset="coco", resolution=8, manual_dir=str(directory), workers=0, **changed)


def test_images_and_captions(tfds_dir, tmp_path):
    info, built = preparation.prepare(plan(tfds_dir), data_dir=tmp_path)
    assert built and info.num_examples == {"train": 5, "test": 9}
    for split, names in (("train", ["train"]), ("test", ["val", "test", "restval"])):
        source = pipeline.open_split(
            data_dir=tmp_path, dataset="coco", resolution=8, split=split, in_memory_limit_bytes=0
        )
        everything = np.arange(len(source))
        records = source.records.__getitems__(everything.tolist())
        files = [record["file"].decode() for record in records]
        expected = {f"COCO_{name}_{n}.jpg": (name, n) for name in names for n in range(COUNTS[name])}
        assert sorted(files) == sorted(expected)
        for file, record, caption in zip(files, records, source.captions(everything), strict=True):
            name, n = expected[file]
            assert caption == ("" if n == 2 else f"caption {n} of {name}")
            # TFDS stores them as JPEG.
            stored = Image.fromarray(image(name, n)).convert("RGB")
            buffer = io.BytesIO()
            stored.save(buffer, "JPEG", quality=95)
            near = resizing.square_area(Image.open(buffer).convert("RGB"), 8)
            assert np.abs(near.astype(int) - record["image"]).mean() < 12


def test_the_next_command(tfds_dir, tmp_path):
    info, _ = preparation.prepare(plan(tfds_dir), data_dir=tmp_path)
    text = preparation.report(info, built=True, data_dir=str(tmp_path))
    assert "--config=text_to_image:teacher --config.data.dataset=coco --config.data.resolution=8" in text


def test_a_split_is_missing(tmp_path):
    with pytest.raises(InputError, match="its coco_captions/2014 has no split restval"):
        plan(write(tmp_path, "array_record", splits=("train", "val", "test")))


def test_nothing_there(tmp_path):
    with pytest.raises(InputError, match="holds no prepared coco_captions/2014"):
        plan(tmp_path)
    with pytest.raises(InputError, match="needs --manual_dir=PATH"):
        preparation.plan(dataset="coco", resolution=8)
