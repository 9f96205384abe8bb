"""Corrupt records in real files: what stands in for them, how many may be, and what is no corruption."""

import itertools
import json
import shutil

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from PIL import Image
from tensorflow_datasets.proto import tf_example_pb2

from mcm_jax.data import layout, pipeline, preparation
from mcm_jax.data.corruption import ReadableRecords
from mcm_jax.system.errors import InputError

WHERE = {"dataset": "folder/noise", "resolution": 8, "split": "train"}
SHARDS = (5, 8, 8)
COUNT = sum(SHARDS)
STORAGE = {"memory": 2**30, "disk": 0}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Images of noise, which zstd stores literally, in three files."""
    root = tmp_path_factory.mktemp("noise")
    rng = np.random.default_rng(0)
    for index in range(24):
        path = root / "images" / ("cats" if index % 2 else "dogs") / f"{index:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(path)
    plan = preparation.plan(dataset="folder", resolution=8, manual_dir=str(root / "images"), name="noise")
    preparation.prepare(plan, data_dir=root / "data")
    directory = root / "data/folder/noise_8" / layout.VERSION
    (only,) = directory.glob("folder-train*")
    records = stored(only)
    only.unlink()
    info = json.loads((directory / "dataset_info.json").read_text())
    info["splits"][0]["shardLengths"] = [str(length) for length in SHARDS]
    (directory / "dataset_info.json").write_text(json.dumps(info))
    for shard, length in enumerate(SHARDS):
        write(directory / name_of(shard), [records.pop(0) for _ in range(length)])
    assert not records
    return root / "data"


def stored(path):
    reader = ArrayRecordReader(str(path))
    return [bytes(reader.read([index])[0]) for index in range(reader.num_records())]


def write(path, records):
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()


def name_of(shard):
    return f"folder-train.array_record-{shard:05d}-of-{len(SHARDS):05d}"


def place(index):
    """The file that contains a record, and its number there."""
    shard = next(shard for shard in range(len(SHARDS)) if index < sum(SHARDS[: shard + 1]))
    return name_of(shard), index - sum(SHARDS[:shard])


@pytest.fixture(scope="module")
def whole(prepared):
    return pipeline.load_arrays(pipeline.open_split(data_dir=prepared, **WHERE))


@pytest.fixture
def copy(prepared, tmp_path):
    shutil.copytree(prepared, tmp_path / "data")
    return tmp_path / "data"


def files(data_dir):
    return data_dir / "folder/noise_8" / layout.VERSION


def damage(data_dir, whole, indices):
    """Flips one bit in each of these images."""
    for index in indices:
        path = files(data_dir) / place(index)[0]
        content = bytearray(path.read_bytes())
        start = content.find(whole[0][index].tobytes())
        assert start >= 0
        content[start + 100] ^= 1
        path.write_bytes(content)


def one_line(caught):
    message = str(caught.value)
    assert "\n" not in message and message.count("is damaged") == 1
    assert "remake the data set with: python -m mcm_jax.prepare --dataset=folder" in message
    assert message.endswith(" --overwrite")
    return message


def expected(whole, substitutes):
    """The arrays with these substitutions."""
    indices = [substitutes.get(index, index) for index in range(COUNT)]
    return whole[0][indices], whole[1][indices]


@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize(
    "substitutes",
    [
        {2: 3},
        {4: 5},  # From the end of a file to the next.
        {5: 6},  # The first one of a file.
        {7: 10, 8: 10, 9: 10},
        {COUNT - 1: 1, 0: 1},
    ],
)
def test_the_next_readable_record_stands_in(storage, substitutes, copy, whole, capsys):
    damage(copy, whole, substitutes)
    source = pipeline.open_split(
        data_dir=copy, **WHERE, in_memory_limit_bytes=STORAGE[storage], max_corrupt_records=len(substitutes)
    )
    for _ in range(2):
        images, labels = pipeline.load_arrays(source)
        np.testing.assert_array_equal(images, expected(whole, substitutes)[0])
        np.testing.assert_array_equal(labels, expected(whole, substitutes)[1])
    notes = capsys.readouterr().err.splitlines()
    assert len(notes) == len(substitutes)
    for index in substitutes:
        name = f"note: {files(copy)}: record {index} of split 'train' in {place(index)[0]} is corrupt: Corr"
        assert sum(note.startswith(name) for note in notes) == 1
    counts = [f"stands in for it ({n} of at most {len(notes)})" for n in range(1, len(notes) + 1)]
    assert all(note.endswith(count) for note, count in zip(notes, counts, strict=True))


@pytest.mark.parametrize("indices", [[3], [5], [2, 6, 14]])
def test_one_more_than_the_budget_is_an_error(indices, copy, whole, capsys):
    """Where all is read at once, and where Grain's threads read."""
    damage(copy, whole, indices)
    options = {} if len(indices) == 1 else {"max_corrupt_records": len(indices) - 1}
    with pytest.raises(InputError) as in_memory:
        pipeline.open_split(data_dir=copy, **WHERE, **options)

    def train():
        source = pipeline.open_split(data_dir=copy, **WHERE, in_memory_limit_bytes=0, **options)
        batches = pipeline.train_batches(source, batch_size=4, seed=0, flip=True)
        try:
            list(itertools.islice(batches, 10))
        except InputError:
            # Whoever goes on reading does not get past it.
            pipeline.load_arrays(source)

    with pytest.raises(InputError) as from_disk:
        train()
    for caught in (in_memory, from_disk):
        message = one_line(caught)
        assert any(
            f"record {index} of split 'train' in {place(index)[0]} is corrupt: Corrupted" in message
            for index in indices
        )
        budget = "; 3 were found, and max_corrupt_records=2 are skipped)"
        assert (budget in message) == (len(indices) == 3) and ("max_corrupt" in message) == (
            len(indices) == 3
        )
    assert capsys.readouterr().err.count("note: ") == 2 * (len(indices) - 1)


def test_processes_and_a_run_that_continues_read_the_same(copy, whole, capsys):
    damage(copy, whole, [3, 4, 16])
    options = {"seed": 7, "flip": True}
    clean = pipeline.ArraySource(*expected(whole, {3: 5, 4: 5, 16: 17}))
    wanted = list(itertools.islice(pipeline.train_batches(clean, batch_size=8, **options), 9))

    def start(process):
        source = pipeline.open_split(data_dir=copy, **WHERE, in_memory_limit_bytes=0, max_corrupt_records=3)
        share = {"batch_size": 4, "process_index": process, "process_count": 2}
        return pipeline.train_batches(source, **share, **options)

    for process in range(2):
        batches, mine = start(process), slice(4 * process, 4 * process + 4)
        for step, batch in enumerate(wanted):
            if step == 5:
                state, batches = batches.get_state(), start(process)
                batches.set_state(state)
            read = next(batches)
            np.testing.assert_array_equal(read["image"], batch["image"][mine])
            np.testing.assert_array_equal(read["label"], batch["label"][mine])


def altered(record, **values):
    example = tf_example_pb2.Example.FromString(record)
    for name, value in values.items():
        feature = example.features.feature[name]
        if value is None:
            del example.features.feature[name]
        elif isinstance(value, bytes):
            feature.bytes_list.value[:] = [value]
        else:
            feature.int64_list.value[:] = [value]
    return example.SerializeToString()


@pytest.mark.parametrize(
    ("alter", "reason"),
    [
        (lambda _: b"garbage", "Error parsing message"),
        (lambda record: record[: len(record) // 2], "Error parsing message"),
        (lambda record: altered(record, image=b"short"), "cannot reshape array of size 5"),
        (lambda record: altered(record, image=None), "has wrong type"),
        (lambda record: altered(record, label=2), "its label is 2, but there are 2 classes"),
        (lambda record: altered(record, label=-1), "its label is -1, but there are 2 classes"),
        (lambda record: altered(record, label=2**40), "its label is 1099511627776"),
        (lambda record: altered(record, label=None), "its label is None"),
    ],
)
def test_a_record_with_another_content_is_corrupt(alter, reason, copy, whole, capsys):
    name, number = place(6)
    records = stored(files(copy) / name)
    records[number] = alter(records[number])
    write(files(copy) / name, records)
    with pytest.raises(InputError) as caught:
        pipeline.open_split(data_dir=copy, **WHERE)
    assert f"record 6 of split 'train' in {name} is corrupt: " in one_line(caught)
    assert reason in str(caught.value) and capsys.readouterr().err == ""
    source = pipeline.open_split(data_dir=copy, **WHERE, max_corrupt_records=1)
    np.testing.assert_array_equal(source.images, expected(whole, {6: 7})[0])


class Stored:
    """Records in memory; reading some raises these errors."""

    def __init__(self, examples, errors):
        self.examples, self.errors, self.reads = examples, errors, []

    def __len__(self):
        return len(self.examples)

    def __iter__(self):
        raise NotImplementedError

    __getitem__ = __iter__

    def __getitems__(self, indices):
        self.reads.append(list(indices))
        for index in indices:
            if index in self.errors:
                raise self.errors[index]
        return [self.examples[index] for index in indices]


def readable(prepared, stored, **options):
    info = pipeline.describe(data_dir=prepared, dataset="folder/noise", resolution=8)
    options = {"shard_lengths": {"file": len(stored)}, "max_corrupt_records": 100} | options
    return ReadableRecords(stored, info, split="train", **options)


def examples(count, shape=(8, 8, 3), dtype=np.uint8):
    return [{"image": np.full(shape, index, dtype), "label": index % 2} for index in range(count)]


@pytest.mark.parametrize("wrong", [{"shape": (9, 8, 3)}, {"shape": (8, 8)}, {"dtype": np.int8}])
def test_an_image_of_another_form_is_corrupt(wrong, prepared, capsys):
    records = [*examples(2), *examples(1, **wrong), *examples(2)[1:]]
    found = readable(prepared, Stored(records, {}))[2]
    assert found is records[3]
    assert "its image is " in capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("open() failed: No such file or directory; opening /data/file"),
        RuntimeError("read() failed: Input/output error; reading /data/file"),
        RuntimeError(
            "Corrupted Riegeli/records file: chunk data hash mismatch (computed 0x1, stored 0x2), chunk at "
            "585576 with length 830; at byte 586406; Failed to read RiegeliFooterMetadata"
        ),
        OSError(5, "Input/output error"),
        MemoryError(),
    ],
)
def test_what_is_not_the_record_s_fault_is_not_skipped(error, prepared, capsys):
    records = readable(prepared, Stored(examples(4), {2: error}))
    for read in (lambda: records[2], lambda: records.__getitems__([1, 2])):
        with pytest.raises(type(error)) as caught:
            read()
        assert caught.value is error
    assert capsys.readouterr().err == ""


def test_a_file_whose_list_of_records_is_corrupt_is_refused_at_once(copy, whole, capsys):
    path = files(copy) / name_of(1)
    content = bytearray(path.read_bytes())
    last = whole[0][SHARDS[0] + SHARDS[1] - 1].tobytes()
    content[content.find(last) + len(last) + 150] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        pipeline.open_split(data_dir=copy, **WHERE, in_memory_limit_bytes=0, max_corrupt_records=100)
    assert "Failed to read Riegeli" in one_line(caught) and capsys.readouterr().err == ""


def test_a_split_without_a_readable_record_is_an_error(prepared, capsys):
    errors = {index: ValueError("no image") for index in range(3)}
    with pytest.raises(InputError) as caught:
        readable(prepared, Stored(examples(3), errors))[1]
    assert "record 0 of split 'train' in file is corrupt: no image; 3 were found" in one_line(caught)


def test_only_a_batch_with_a_corrupt_record_is_read_one_by_one(prepared, capsys):
    source = Stored(examples(6), {4: ValueError("no image")})
    records = readable(prepared, source)
    assert len(records) == 6
    assert [example["image"][0, 0, 0] for example in records.__getitems__([3, 2])] == [3, 2]
    assert source.reads == [[3, 2]]
    assert [example["image"][0, 0, 0] for example in records.__getitems__([4, 2])] == [5, 2]
    assert source.reads[1:] == [[4, 2], [4], [5], [2]]
    assert [example["image"][0, 0, 0] for example in records] == [0, 1, 2, 3, 5, 5]
