"""Training batches from prepared records: read, shuffle, shard, flip, convert to float (Grain)."""

import abc
import contextlib
import dataclasses
import functools
from collections.abc import Callable, Generator, Iterator, Sequence

import grain
import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Bool, Int, Int32, Int64, UInt8

from mcm_jax.data import embeddings, layout
from mcm_jax.data.corruption import ReadableRecords
from mcm_jax.data.embeddings import Embeddings
from mcm_jax.data.layout import DatasetInfo, Example, Records, stored_records
from mcm_jax.data.local_copy import local_copy
from mcm_jax.data.pixels import to_float, to_uint8
from mcm_jax.system.errors import InputError
from mcm_jax.system.paths import Path

__all__ = [
    "ArraySource",
    "DatasetInfo",
    "RecordSource",
    "Source",
    "blocks",
    "describe",
    "load_arrays",
    "open_split",
    "random_examples",
    "random_indices",
    "to_float",
    "to_uint8",
    "train_batches",
]

# Number of images read at a time when reading a whole split.
BLOCK = 1024
# Grain requires a length; no training run reaches 2**62 batches.
_ENDLESS = 2**62


class Source(abc.ABC):
    """Random access to the examples of a split: {'image': uint8 [r, r, 3], 'label': int32 scalar}."""

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def gather(
        self, indices: Int[np.ndarray, " N"]
    ) -> tuple[UInt8[np.ndarray, "N r r 3"], Int32[np.ndarray, " N"]]:
        """The images and labels at `indices`, stacked into new arrays."""

    def batch(self, indices: Int[np.ndarray, " N"]) -> dict[str, np.ndarray]:
        """The examples at `indices` in new arrays, with their embedded captions if there are any."""
        images, labels = self.gather(indices)
        return {"image": images, "label": labels}

    def __getitem__(self, index: int) -> Example:
        return {name: values[0] for name, values in self.batch(np.array([range(len(self))[index]])).items()}


@dataclasses.dataclass(frozen=True, eq=False)
class ArraySource(Source):
    """A split held in memory."""

    images: UInt8[np.ndarray, "N r r 3"]
    labels: Int32[np.ndarray, " N"]

    def __len__(self) -> int:
        return len(self.labels)

    def gather(
        self, indices: Int[np.ndarray, " N"]
    ) -> tuple[UInt8[np.ndarray, "N r r 3"], Int32[np.ndarray, " N"]]:
        return self.images[indices], self.labels[indices]


@dataclasses.dataclass(frozen=True, eq=False)
class RecordSource(Source):
    """A split read from its ArrayRecord files on every access, through TFDS but without TensorFlow."""

    records: Records

    def __len__(self) -> int:
        return len(self.records)

    def gather(
        self, indices: Int[np.ndarray, " N"]
    ) -> tuple[UInt8[np.ndarray, "N r r 3"], Int32[np.ndarray, " N"]]:
        return _stacked(self.records.__getitems__(indices.tolist()))

    def captions(self, indices: Int[np.ndarray, " N"]) -> list[str]:
        """The captions of the examples at `indices`, of a data set that has captions."""
        return [example["caption"].decode() for example in self.records.__getitems__(indices.tolist())]


def _stacked(examples: Sequence[Example]) -> tuple[UInt8[np.ndarray, "N r r 3"], Int32[np.ndarray, " N"]]:
    images = np.stack([example["image"] for example in examples])
    return images, np.array([example["label"] for example in examples], np.int32)


@dataclasses.dataclass(frozen=True, eq=False)
class CaptionedArrays(ArraySource):
    """A split held in memory, with the row of each example's caption in `embeddings`."""

    rows: Int32[np.ndarray, " N"]
    embeddings: Embeddings

    def batch(self, indices: Int[np.ndarray, " N"]) -> dict[str, np.ndarray]:
        return {**super().batch(indices), **self.embeddings.gather(self.rows[indices])}


@dataclasses.dataclass(frozen=True, eq=False)
class CaptionedRecords(RecordSource):
    """A split read on every access, with embedded captions."""

    embeddings: Embeddings

    def batch(self, indices: Int[np.ndarray, " N"]) -> dict[str, np.ndarray]:
        images, labels, rows = self._with_rows(indices)
        return {"image": images, "label": labels, **self.embeddings.gather(rows)}

    def in_memory(self) -> CaptionedArrays:
        """The same split held in memory."""
        images, labels, rows = _whole(self._with_rows, len(self))
        return CaptionedArrays(images, labels, rows, self.embeddings)

    def _with_rows(self, indices: Int[np.ndarray, " N"]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Images, labels, and the rows of their captions in `embeddings`."""
        examples = self.records.__getitems__(indices.tolist())
        rows = self.embeddings.rows([example["caption"].decode() for example in examples])
        return *_stacked(examples), rows


def describe(
    *, data_dir: str | Path, dataset: str, resolution: int, encoder: str | None = None
) -> DatasetInfo:
    """Reads the description of a prepared data set, and of its captions as embedded by `encoder`.

    Raises:
      InputError: the data set or its embedded captions are missing; the message gives the command.
    """
    info = layout.describe(data_dir=data_dir, dataset=dataset, resolution=resolution)
    return info if encoder is None else embeddings.describe(info, encoder)


def open_split(
    *,
    data_dir: str | Path,
    dataset: str,
    resolution: int,
    split: str,
    encoder: str | None = None,
    in_memory_limit_bytes: int = 2**30,
    max_corrupt_records: int = 0,
) -> ArraySource | RecordSource:
    """Opens one split of a prepared data set.

    A split of at most `in_memory_limit_bytes` is decoded once and held as arrays, because decoding an
    example (70 us) costs more than its share of a small network's train step. A larger split is read on
    demand.

    Args:
      encoder: the text encoder whose embeddings of the captions belong to each example; None: none.
      max_corrupt_records: number of corrupt records that are skipped (see `ReadableRecords`). Reading one
        more, now or later, raises InputError. Statistics need all images, so the default is 0.

    Raises:
      InputError: the data set is missing, incomplete or damaged, or the split does not exist or is empty.
    """
    info = describe(data_dir=data_dir, dataset=dataset, resolution=resolution, encoder=encoder)
    if split not in info.num_examples:
        raise InputError(f"data set {dataset} has no split {split!r}, only {', '.join(info.num_examples)}")
    if not info.num_examples[split]:
        raise InputError(f"data set {dataset}: split {split!r} is empty; prepare it from more images")
    place = local_copy(info.path)
    with _reporting_damage(info):
        records = _open_records(info, split, place, max_corrupt_records)
        on_demand = len(records) * resolution**2 * 3 > in_memory_limit_bytes
        if encoder is not None:
            captioned = CaptionedRecords(
                records, Embeddings(info, in_memory_limit_bytes=in_memory_limit_bytes)
            )
            return captioned if on_demand else captioned.in_memory()
        source = RecordSource(records)
        return source if on_demand else ArraySource(*load_arrays(source))


def _open_records(info: DatasetInfo, split: str, place: Path, max_corrupt_records: int) -> ReadableRecords:
    """Opens TFDS's data source of a split in `place` and reads the first record of every shard.

    The reads detect damaged files early: TFDS opens files only on the first read and trusts its own metadata
    for their lengths.
    """
    builder = tfds.builder_from_directory(place)
    records = stored_records(builder, split)
    if len(records) != info.num_examples[split]:
        raise ValueError(f"{len(records)} records of {info.num_examples[split]}")
    shards = builder.info.splits[split]
    lengths = shards.shard_lengths
    readable = ReadableRecords(
        records,
        info,
        split=split,
        shard_lengths={path.name: length for path, length in zip(shards.filepaths, lengths, strict=True)},
        max_corrupt_records=max_corrupt_records,
    )
    readable.__getitems__([sum(lengths[:shard]) for shard, length in enumerate(lengths) if length])
    return readable


@contextlib.contextmanager
def _reporting_damage(info: DatasetInfo) -> Generator[None, None, None]:
    """Reports a failure to open a complete data set as damage to its files after preparation."""
    try:
        yield
    except InputError:
        raise
    except (OSError, LookupError, ValueError, RuntimeError) as error:
        raise layout.damage_error(info, error) from error


def blocks(
    source: Source, *, size: int = BLOCK
) -> Iterator[tuple[UInt8[np.ndarray, "_ r r 3"], Int32[np.ndarray, " _"]]]:
    """Yields all images and labels of a split in stored order, `size` at a time, to bound memory."""
    for start in range(0, len(source), size):
        yield source.gather(np.arange(start, min(start + size, len(source))))


def load_arrays(source: Source) -> tuple[UInt8[np.ndarray, "N r r 3"], Int32[np.ndarray, " N"]]:
    """All images and labels of a split, in stored order."""
    if isinstance(source, ArraySource):
        return source.images, source.labels
    images, labels = _whole(source.gather, len(source))
    return images, labels


def _whole(gather: Callable[[np.ndarray], tuple[np.ndarray, ...]], count: int) -> tuple[np.ndarray, ...]:
    """gather(0, ..., count - 1), read BLOCK at a time into arrays that are allocated once."""
    indices = np.arange(count)
    wholes = tuple(np.empty((count, *one.shape[1:]), one.dtype) for one in gather(indices[:1]))
    for start in range(0, count, BLOCK):
        chunk = indices[start : start + BLOCK]
        for whole, part in zip(wholes, gather(chunk), strict=True):
            whole[chunk] = part
    return wholes


def random_examples(
    source: Source, num: int, *, seed: int = 0
) -> tuple[UInt8[np.ndarray, "N r r 3"], Int32[np.ndarray, " N"]]:
    """Draws `num` examples without replacement and returns their images and labels in stored order.

    Returns all examples if the split has at most `num`. Only the drawn examples are read.
    """
    return source.gather(random_indices(source, num, seed=seed))


def random_indices(source: Source, num: int, *, seed: int = 0) -> Int[np.ndarray, " _"]:
    """Draws at most `num` indices without replacement, in ascending order.

    A random draw is needed because stored order is not random: some data sets are stored class by class.
    """
    rng = np.random.default_rng(seed)
    return np.sort(rng.choice(len(source), min(num, len(source)), replace=False))


@dataclasses.dataclass(frozen=True)
class _Order:
    """The endless training order: position p is example `permutation(p // n)[p % n]`, flipped or not.

    Every epoch has its own permutation and its own coin flip for every position. Both depend only on
    (seed, epoch), so any process can compute any part of the order at any time.
    """

    num_examples: int
    seed: int

    def at(
        self, positions: Int64[np.ndarray, " B"]
    ) -> tuple[Int64[np.ndarray, " B"], Bool[np.ndarray, " B"]]:
        """The example index at each position, and whether the example is flipped there."""
        epochs, offsets = np.divmod(positions, self.num_examples)
        indices = np.empty_like(positions)
        flipped = np.empty(positions.shape, bool)
        for epoch in np.unique(epochs):
            permutation, coins = _epoch(self.num_examples, self.seed, int(epoch))
            here = epochs == epoch
            indices[here], flipped[here] = permutation[offsets[here]], coins[offsets[here]]
        return indices, flipped


@functools.lru_cache(maxsize=4)
def _epoch(num_examples: int, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng((seed, epoch))
    return rng.permutation(num_examples), rng.random(num_examples) < 0.5


@dataclasses.dataclass(frozen=True)
class _Batches:
    """Random access to this process's batches, for Grain to iterate over.

    The elements are batches, not examples: Grain's own chain of shuffle, repeat and batch spends 35 us of
    Python time per example, this class 2 to 4 us (measured at 16x16, batch 128).
    """

    source: Source
    order: _Order
    batch_size: int
    flip: bool
    process_index: int
    process_count: int

    def __len__(self) -> int:
        return _ENDLESS

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        start = (index * self.process_count + self.process_index) * self.batch_size
        indices, flipped = self.order.at(np.arange(start, start + self.batch_size))
        batch = self.source.batch(indices)
        images = batch["image"]
        if self.flip:
            images[flipped] = images[flipped, :, ::-1]
        return batch | {"image": to_float(images)}


def train_batches(
    source: Source,
    *,
    batch_size: int,
    seed: int,
    flip: bool,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int | None = None,
) -> grain.DatasetIterator[dict[str, np.ndarray]]:
    """Endless batches {'image': float32 [B, r, r, 3] in [-1, 1], 'label': int32 [B]} of one process.

    Embedded captions add 'tokens', 'mask' and 'pooled', see `Embeddings.gather`.

    Each epoch is a new permutation of all examples. A batch may span two epochs, so that no example is
    dropped or repeated. Global batch i is the range [i G, (i + 1) G) of that order, where
    G = batch_size * process_count, and each process returns its own part. Which examples are in global
    batch i, and which of them are flipped, depends only on seed, i and G.

    The iterator's `get_state()` returns a small dict of JSON values; after `set_state`, the iterator yields
    exactly the batches that would have followed. It reads ahead on `num_threads` threads (default: 1 from
    memory, 8 from disk; 0: no read-ahead).

    Args:
      source: a split from `open_split`.
      batch_size: number of examples per batch in this process.
      seed: non-negative, the same in all processes.
      flip: mirror each image left to right with probability 1/2.
      process_index, process_count: the index of this process and the number of training processes.

    Raises:
      InputError: the split is empty, or batch_size, seed or the process is out of range.
    """
    if not len(source):
        raise InputError("the training split is empty; prepare the data set from more images")
    if batch_size < 1:
        raise InputError(f"batch size {batch_size} per process: it must be at least 1")
    if seed < 0:
        raise InputError(f"data seed {seed}: it must not be negative")
    if not 0 <= process_index < process_count:
        raise InputError(f"process {process_index} of {process_count}: processes are numbered from 0")
    batches = _Batches(source, _Order(len(source), seed), batch_size, flip, process_index, process_count)
    if num_threads is None:
        num_threads = 1 if isinstance(source, ArraySource) else 8
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=2 * num_threads)
    return iter(grain.MapDataset.source(batches).to_iter_dataset(options))
