"""Writes a TFDS data set shard by shard, in parallel over processes and hosts, and resumes if interrupted.

Each shard is written under a temporary name and then renamed, or uploaded to a bucket. A note in another
directory, which records the shard's size and count, then marks it as complete. All hosts share both
directories. Each of n hosts writes every n-th shard, and the first host completes the data set once all
shards exist.
"""

import concurrent.futures
import dataclasses
import errno
import functools
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from etils import epath

from mcm_jax.data import local_copy
from mcm_jax.data.layout import Example
from mcm_jax.system import json_text, progress
from mcm_jax.system.files import move_into, read_bytes, size, write_whole
from mcm_jax.system.host import keep_freed_pages
from mcm_jax.system.paths import Path

# One record per group, as in TFDS, because single records are read in random order.
_OPTIONS = "group_size:1"


@dataclasses.dataclass(frozen=True)
class Shard:
    """One file, number `index` of `count` in its split; `examples` yields its examples in order."""

    split: str
    index: int
    count: int
    examples: Callable[[], Iterator[Example]]  # picklable


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a data set is written: directories for shards and notes, its name, and its record features."""

    directory: Path
    notes: Path
    name: str
    features: tfds.features.FeaturesDict

    def path(self, shard: Shard) -> Path:
        """The path at which TFDS looks for a shard."""
        number = f"{shard.index:05d}-of-{shard.count:05d}"
        return self.directory / f"{self.name}-{shard.split}.array_record-{number}"

    def note(self, shard: Shard) -> Path:
        """The path of a shard's note, outside `directory`, which must hold only the data set."""
        return self.notes / f"{self.path(shard).name}.json"

    def is_whole(self, shard: Shard) -> bool:
        """Whether a shard was written completely and its size has not changed since."""
        try:
            note = json_text.loads(read_bytes(self.note(shard)))
            return size(self.path(shard)) == note["bytes"]
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return False


def write(
    shards: Sequence[Shard], place: Place, *, workers: int | None = None, host: int = 0, hosts: int = 1
) -> None:
    """Writes this host's shards, except those that are already complete.

    Args:
      workers: number of processes; None: one per core; 0: write in this process.
      host, hosts: the index of this host, from 0, and the number of hosts.

    Raises:
      InputError: an example cannot be read.
      OSError: the disk is full or cannot be written to.
    """
    place.directory.mkdir(parents=True, exist_ok=True)
    own = [shard for shard in shards[host::hosts] if not place.is_whole(shard)]
    work = functools.partial(_write_one, place=place)
    if workers == 0:
        for shard in progress.bar(own, "shards"):
            work(shard)
    elif own:
        _in_parallel(work, own, workers or os.cpu_count() or 1)


def wait(shards: Sequence[Shard], place: Place, *, every_seconds: float = 10.0) -> None:
    """Waits until the other hosts have written their shards."""
    missing = [shard for shard in shards if not place.is_whole(shard)]
    if missing:
        print(f"waiting for {len(missing)} shards of other hosts", file=sys.stderr, flush=True)
    while missing:
        time.sleep(every_seconds)
        missing = [shard for shard in missing if not place.is_whole(shard)]


def complete(shards: Sequence[Shard], place: Place, **info: str) -> None:
    """Writes the metadata that TFDS needs; all shards must exist.

    Args:
      info: further fields of `tfds.core.DatasetInfo`, such as description.
    """
    notes: dict[str, list[dict[str, int]]] = {}
    for shard in shards:
        notes.setdefault(shard.split, []).append(json_text.loads(read_bytes(place.note(shard))))
    template = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    splits = [
        tfds.core.SplitInfo(
            name=split,
            shard_lengths=[note["examples"] for note in found],
            num_bytes=sum(note["bytes"] for note in found),
            filename_template=tfds.core.ShardedFileTemplate(
                data_dir=tfds.core.as_path(place.directory),
                template=template,
                dataset_name=place.name,
                split=split,
                filetype_suffix="array_record",
            ),
        )
        for split, found in notes.items()
    ]
    tfds.folder_dataset.write_metadata(
        data_dir=place.directory,
        features=place.features,
        split_infos=splits,
        filename_template=template,
        check_data=False,
        **info,
    )


def _write_one(shard: Shard, *, place: Place) -> None:
    path = place.path(shard)
    # ArrayRecord's writer can't write to a bucket.
    directory = local_copy.place() if isinstance(path, epath.Path) else path.parent
    temporary = directory / f".{path.name}.{os.getpid()}.tmp"
    count = 0
    try:
        writer = ArrayRecordWriter(str(temporary), _OPTIONS)
        try:
            for example in shard.examples():
                writer.write(place.features.serialize_example(example))
                count += 1
        finally:
            writer.close()
        # The writer does not report a full disk, so check the file.
        if ArrayRecordReader(str(temporary)).num_records() != count:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        bytes_written = temporary.stat().st_size
        move_into(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    write_whole(place.note(shard), json.dumps({"examples": count, "bytes": bytes_written}))


def _in_parallel(work: Callable[[Shard], None], shards: Sequence[Shard], workers: int) -> None:
    # Workers fork from a server process that has imported this module and started no threads.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with concurrent.futures.ProcessPoolExecutor(
        min(workers, len(shards)), mp_context=context, initializer=keep_freed_pages
    ) as pool:
        futures = [pool.submit(work, shard) for shard in shards]
        try:
            done = concurrent.futures.as_completed(futures)
            for future in progress.bar(done, "shards", total=len(shards)):
                future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
