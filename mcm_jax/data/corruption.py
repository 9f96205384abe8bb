"""Reads records of which some may be corrupt: readable ones stand in for them, up to a budget."""

import bisect
import itertools
import sys
import threading
from collections.abc import Iterator, Sequence

import numpy as np
from google.protobuf.message import DecodeError

from mcm_jax.data import layout
from mcm_jax.data.layout import DatasetInfo, Example, Records


class _CorruptError(Exception):
    """At least one of the records is corrupt."""


class ReadableRecords:
    """The records of a split, where the next readable one stands in for a corrupt one.

    A record is corrupt if its checksum is wrong, or if it contains no image and label of the data set. Its
    replacement depends only on the files: all processes, and a run that continues, read the same. Every
    corrupt record is counted once and named on stderr.
    """

    def __init__(
        self,
        records: Records,
        info: DatasetInfo,
        *,
        split: str,
        shard_lengths: dict[str, int],
        max_corrupt_records: int,
    ):
        """Reads nothing yet.

        Args:
          shard_lengths: number of records of each file, by its name, in stored order.
          max_corrupt_records: number of corrupt records that are skipped; one more is an InputError.
        """
        self._records, self._info, self._split = records, info, split
        self._shards, self._ends = list(shard_lengths), list(itertools.accumulate(shard_lengths.values()))
        self._max_corrupt_records = max_corrupt_records
        self._corrupt: set[int] = set()
        # Grain reads on several threads.
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[Example]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Example:
        while True:
            try:
                return self._read([index])[0]
            except _CorruptError as error:
                self._count(index, " ".join(str(error).split()))
            index = (index + 1) % len(self)

    def __getitems__(self, indices: Sequence[int]) -> Sequence[Example]:
        try:
            return self._read(indices)
        except _CorruptError:
            return [self[index] for index in indices]

    def _read(self, indices: Sequence[int]) -> Sequence[Example]:
        try:
            examples = self._records.__getitems__(indices)
            for example in examples:
                self._check(example)
        except (DecodeError, ValueError) as error:
            raise _CorruptError(error) from error
        except RuntimeError as error:
            if _is_wrong_checksum(str(error)):
                raise _CorruptError(error) from error
            raise
        return examples

    def _check(self, example: Example) -> None:
        image, label, r = example["image"], example["label"], self._info.resolution
        if image.shape != (r, r, 3) or image.dtype != np.uint8:
            raise ValueError(f"its image is {image.dtype}{list(image.shape)}, not uint8[{r}, {r}, 3]")
        if label is None or not 0 <= label < self._info.num_classes:
            raise ValueError(f"its label is {label}, but there are {self._info.num_classes} classes")

    def _count(self, index: int, reason: str) -> None:
        with self._lock:
            new = index not in self._corrupt
            self._corrupt.add(index)
            count = len(self._corrupt)
        most, shard = self._max_corrupt_records, self._shards[bisect.bisect_right(self._ends, index)]
        record = f"record {index} of split {self._split!r} in {shard} is corrupt: {reason}"
        if count > most or count == len(self):
            found = f"; {count} were found, and max_corrupt_records={most} are skipped" if most else ""
            raise layout.damage_error(self._info, record + found)
        if new:
            print(
                f"note: {self._info.path}: {record}; the next readable record stands in for it "
                f"({count} of at most {most})",
                file=sys.stderr,
                flush=True,
            )


def _is_wrong_checksum(message: str) -> bool:
    """Whether one record is corrupt, as opposed to a whole file that cannot be opened or read.

    Riegeli, which reads the files, raises RuntimeError for all of these. Its message contains "Failed to read
    RiegeliFooterMetadata" or "RiegeliPostscript" if a file's list of records is corrupt.
    """
    return message.startswith("Corrupted Riegeli/records file: ") and "Failed to read" not in message
