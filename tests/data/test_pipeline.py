import itertools
import json
import shutil
import subprocess
import sys

import grain
import numpy as np
import orbax.checkpoint as ocp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mcm_jax.data import layout, pipeline, preparation
from mcm_jax.data.pixels import to_uint8
from mcm_jax.system.errors import InputError

sizes = st.integers(1, 30)
batch_sizes = st.integers(1, 12)
process_counts = st.integers(1, 4)
seeds = st.integers(0, 2**32)
few = settings(max_examples=60, deadline=None)


def numbered(count: int, *, resolution: int = 2) -> pipeline.ArraySource:
    """Example i has label i, and images that differ from each other and from their mirror images."""
    shape = (count, resolution, resolution, 3)
    images = np.broadcast_to(np.arange(count, dtype=np.uint8)[:, None, None, None], shape).copy()
    images[:, :, 0] += 100
    return pipeline.ArraySource(images, np.arange(count, dtype=np.int32))


def batches(source, count, **options):
    options = {"seed": 0, "flip": False, "num_threads": 0} | options
    return list(itertools.islice(pipeline.train_batches(source, **options), count))


def labels(batch_list):
    return np.concatenate([batch["label"] for batch in batch_list]).tolist()


def is_mirrored(batch):
    """For examples of `numbered`: is the bright column on the right?"""
    return batch["image"][:, 0, 0, 0] < batch["image"][:, 0, -1, 0]


@few
@given(sizes, batch_sizes, seeds)
def test_every_epoch_shows_every_example_once(size, batch_size, seed):
    shown = labels(batches(numbered(size), -(-3 * size // batch_size), batch_size=batch_size, seed=seed))
    for epoch in range(3):
        assert sorted(shown[epoch * size : (epoch + 1) * size]) == list(range(size))


def test_epochs_and_seeds_differ_in_order():
    first, second = (batch["label"].tolist() for batch in batches(numbered(200), 2, batch_size=200))
    other = batches(numbered(200), 1, batch_size=200, seed=1)[0]["label"].tolist()
    assert first != second and first != other and second != other and first != sorted(first)


@few
@given(sizes, batch_sizes, process_counts, seeds)
def test_processes_share_each_global_batch(size, batch_size, process_count, seed):
    """Disjoint positions, and together the very batch, flips included, that one process would have."""
    source, steps = numbered(size), 4
    shared = {"seed": seed, "flip": True}
    alone = batches(source, steps, batch_size=batch_size * process_count, **shared)
    parts = [
        batches(
            source, steps, batch_size=batch_size, process_index=index, process_count=process_count, **shared
        )
        for index in range(process_count)
    ]
    for step in range(steps):
        together = np.concatenate([part[step]["image"] for part in parts])
        np.testing.assert_array_equal(together, alone[step]["image"])
        assert labels([part[step] for part in parts]) == alone[step]["label"].tolist()


@pytest.mark.parametrize("num_threads", [0, 1, 4])
def test_restored_iterator_continues_bit_for_bit(num_threads):
    options = {"batch_size": 5, "seed": 3, "flip": True, "num_threads": num_threads}
    whole = batches(numbered(7), 9, **options)
    first = pipeline.train_batches(numbered(7), **options)
    for _ in range(4):
        next(first)
    state = json.loads(json.dumps(first.get_state()))
    next(first)
    second = pipeline.train_batches(numbered(7), **options)
    second.set_state(state)
    for expected in whole[4:]:
        batch = next(second)
        np.testing.assert_array_equal(batch["image"], expected["image"])
        np.testing.assert_array_equal(batch["label"], expected["label"])


def test_iterator_is_saved_and_restored_by_orbax(tmp_path):
    options = {"batch_size": 5, "seed": 3, "flip": True}
    saved = pipeline.train_batches(numbered(7), **options)
    next(saved)
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(1, args=ocp.args.Composite(data=grain.checkpoint.CheckpointSave(saved)))
        expected = next(saved)
    restored = pipeline.train_batches(numbered(7), **options)
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.restore(1, args=ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(restored)))
    np.testing.assert_array_equal(next(restored)["image"], expected["image"])


def test_images_are_scaled_and_kept_whole_without_flip():
    source = numbered(50)
    batch = batches(source, 1, batch_size=50)[0]
    assert batch["image"].dtype == np.float32 and batch["label"].dtype == np.int32
    np.testing.assert_array_equal(to_uint8(batch["image"]), source.images[batch["label"]])


def test_half_of_the_images_are_mirrored_and_nothing_else():
    source, images_before = numbered(100), numbered(100).images
    several = batches(source, 40, batch_size=100, flip=True)
    mirrored = np.stack([is_mirrored(batch) for batch in several])
    for batch, flips in zip(several, mirrored, strict=True):
        plain = source.images[batch["label"]]
        expected = np.where(flips[:, None, None, None], plain[:, :, ::-1], plain)
        np.testing.assert_array_equal(to_uint8(batch["image"]), expected)
    assert abs(mirrored.mean() - 0.5) < 4 * 0.5 / mirrored.size**0.5
    by_label = np.stack([flips[np.argsort(b["label"])] for b, flips in zip(several, mirrored, strict=True)])
    assert (by_label.any(0) & ~by_label.all(0)).all(), "an example is always or never mirrored"
    np.testing.assert_array_equal(source.images, images_before)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"batch_size": 0}, "batch size 0"),
        ({"seed": -1}, "seed -1"),
        ({"process_index": 2, "process_count": 2}, "process 2 of 2"),
    ],
)
def test_bad_options_are_named(change, word):
    with pytest.raises(InputError, match=word):
        pipeline.train_batches(numbered(3), **({"batch_size": 1, "seed": 0, "flip": False} | change))


def test_empty_source_is_refused():
    with pytest.raises(InputError, match="empty"):
        pipeline.train_batches(numbered(0), batch_size=1, seed=0, flip=False)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Twelve images in two classes, prepared at 4x4 and 6x6."""
    root = tmp_path_factory.mktemp("prepared")
    rng = np.random.default_rng(0)
    for index in range(12):
        path = root / "images" / ("cats" if index % 3 else "dogs") / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8)).save(path)
    for resolution in (4, 6):
        chosen = preparation.plan(
            dataset="folder", resolution=resolution, manual_dir=str(root / "images"), name="pets"
        )
        preparation.prepare(chosen, data_dir=root / "data")
    return root


@pytest.fixture
def copy(prepared, tmp_path):
    """A copy to damage: its data_dir, and the directory of folder/pets at 4x4."""
    shutil.copytree(prepared / "data", tmp_path / "data")
    return tmp_path / "data", tmp_path / "data" / "folder" / "pets_4" / layout.VERSION


def open_pets(data_dir, split="train", **options):
    return pipeline.open_split(data_dir=data_dir, dataset="folder/pets", resolution=4, split=split, **options)


def test_describe_and_data_agree(prepared):
    info = pipeline.describe(data_dir=prepared / "data", dataset="folder/pets", resolution=4)
    assert (info.class_names, info.num_classes) == (("cats", "dogs"), 2)
    stored = []
    for split in layout.SPLITS:
        images, label = pipeline.load_arrays(open_pets(prepared / "data", split))
        assert len(images) == info.num_examples[split] and images.shape[1:] == (4, 4, 3)
        assert np.bincount(label, minlength=2).tolist() == list(info.class_counts[split])
        stored += [(image.tobytes(), int(each)) for image, each in zip(images, label, strict=True)]
    pictures = sorted((prepared / "images").rglob("*.png"))
    names = [(np.asarray(Image.open(path)).tobytes(), int(path.parent.name == "dogs")) for path in pictures]
    assert sorted(stored) == sorted(names)


def test_memory_and_disk_give_the_same_batches(prepared):
    memory = open_pets(prepared / "data")
    disk = open_pets(prepared / "data", in_memory_limit_bytes=len(memory) * 48 - 1)
    assert isinstance(memory, pipeline.ArraySource) and isinstance(disk, pipeline.RecordSource)
    assert isinstance(
        open_pets(prepared / "data", in_memory_limit_bytes=len(memory) * 48), pipeline.ArraySource
    )
    assert disk[0]["image"].dtype == np.uint8 and disk[-1]["label"].dtype == np.int32
    with pytest.raises(IndexError):
        disk[len(disk)]
    options = {"batch_size": 4, "seed": 0, "flip": True}
    threaded = pipeline.train_batches(disk, **options)
    for expected, batch in zip(batches(memory, 5, **options), threaded, strict=False):
        np.testing.assert_array_equal(batch["image"], expected["image"])
        np.testing.assert_array_equal(batch["label"], expected["label"])


def test_missing_data_names_the_command_and_what_is_there(prepared):
    with pytest.raises(InputError) as caught:
        pipeline.describe(data_dir=prepared / "data", dataset="folder/pets", resolution=8)
    message = str(caught.value)
    assert "(4, 6 are there)" in message and "\n" not in message
    command = (
        "python -m mcm_jax.prepare --dataset=folder --resolution=8 --manual_dir=PATH --name=pets --data_dir="
    )
    assert command in message
    with pytest.raises(InputError, match=r"prepare --dataset=openmoji --resolution=8$"):
        pipeline.describe(data_dir="data", dataset="openmoji", resolution=8)


@pytest.mark.parametrize("dataset", ["cifar", "folder", "folder/", "folder/../x", "openmoji/32", ""])
def test_unknown_data_set_is_refused(tmp_path, dataset):
    with pytest.raises(InputError, match="is unknown"):
        pipeline.describe(data_dir=tmp_path, dataset=dataset, resolution=8)


def test_names_that_end_in_numbers_are_kept_apart(prepared, tmp_path):
    """folder/pets at 16 lies in pets_16, folder/pets_16 at 4 in pets_16_4."""
    shutil.copytree(prepared / "data" / "folder" / "pets_4", tmp_path / "folder" / "pets_16_4")
    assert layout.prepared_resolutions(tmp_path, dataset="folder/pets") == []
    assert layout.prepared_resolutions(tmp_path, dataset="folder/pets_16") == [4]


def test_no_summary_means_not_prepared(copy):
    data_dir, directory = copy
    (directory / layout.SUMMARY_FILE).unlink()
    with pytest.raises(InputError, match="prepare it with"):
        open_pets(data_dir)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"class_names": 1}'])
def test_damaged_summary_is_named(copy, content):
    data_dir, directory = copy
    (directory / layout.SUMMARY_FILE).write_text(content)
    with pytest.raises(InputError, match=r"summary.json is damaged.*--overwrite"):
        open_pets(data_dir)


@pytest.mark.parametrize("in_memory_limit_bytes", [0, 2**30])
@pytest.mark.parametrize("damage", ["missing", "cut", "no info"])
def test_damaged_records_are_named(copy, damage, in_memory_limit_bytes):
    data_dir, directory = copy
    shard = next(directory.glob("folder-train*"))
    if damage == "missing":
        shard.unlink()
    elif damage == "cut":
        shard.write_bytes(shard.read_bytes()[:100])
    else:
        (directory / "dataset_info.json").unlink()
    with pytest.raises(InputError, match=r"damaged.*prepare.*--name=pets.*--overwrite"):
        open_pets(data_dir, in_memory_limit_bytes=in_memory_limit_bytes)


def test_empty_and_unknown_splits_are_named(copy):
    data_dir, directory = copy
    with pytest.raises(InputError, match="no split 'valid', only train, test"):
        open_pets(data_dir, "valid")
    fields = json.loads((directory / layout.SUMMARY_FILE).read_text())
    fields["num_examples"]["test"] = 0
    (directory / layout.SUMMARY_FILE).write_text(json.dumps(fields))
    with pytest.raises(InputError, match="'test' is empty"):
        open_pets(data_dir, "test")


def test_reading_imports_no_tensorflow(prepared):
    program = f"""if True:
        import sys
        from mcm_jax.data import pipeline
        where = dict(data_dir={str(prepared / "data")!r}, dataset="folder/pets", resolution=4, split="train")
        source = pipeline.open_split(**where, in_memory_limit_bytes=0)
        next(pipeline.train_batches(source, batch_size=2, seed=0, flip=True))
        sys.exit("tensorflow" in sys.modules)
    """
    assert subprocess.run([sys.executable, "-c", program], timeout=120, check=False).returncode == 0
