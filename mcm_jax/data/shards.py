"""Writes a TFDS data set shard by shard: in parallel over processes and hosts, and on from where it stopped.

A shard is written under another name, then renamed, and a note with its size and count beside it says that it
is whole. Hosts share the directory, each does every n-th shard, and whoever finds all of them there completes
the data set.
"""

import concurrent.futures
import dataclasses
import errno
import functools
import json
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from mcm_jax.data import progress
from mcm_jax.files import write_whole

# One record a group, as TFDS writes them: single records are read at random.
_OPTIONS = "group_size:1"


@dataclasses.dataclass(frozen=True)
class Shard:
    """One file: the n-th of `count` of its split. `examples` are what `features` encodes, in order."""

    split: str
    index: int
    count: int
    examples: Callable[[], Iterator[dict[str, Any]]]  # picklable

    def path(self, directory: Path, name: str) -> Path:
        """Where TFDS looks for it."""
        return directory / f"{name}-{self.split}.array_record-{self.index:05d}-of-{self.count:05d}"


def write(
    shards: Sequence[Shard],
    directory: Path,
    *,
    name: str,
    features: tfds.features.FeaturesDict,
    workers: int | None = None,
    host: int = 0,
    hosts: int = 1,
) -> int:
    """Writes the shards of this host that are not there yet; returns how many of all are still missing.

    Args:
      name: of the data set.
      workers: processes; None: one a core; 0: this one.

    Raises:
      InputError: what reading the examples raises.
      OSError: of the disk.
    """
    directory.mkdir(parents=True, exist_ok=True)
    own = [shard for shard in shards[host::hosts] if not _is_whole(shard.path(directory, name))]
    work = functools.partial(_write_one, directory=directory, name=name, features=features)
    if workers == 0:
        for shard in progress.bar(own, "shards"):
            work(shard)
    elif own:
        _in_parallel(work, own, workers or os.cpu_count() or 1)
    return sum(not _is_whole(shard.path(directory, name)) for shard in shards)


def complete(
    shards: Sequence[Shard], directory: Path, *, name: str, features: tfds.features.FeaturesDict, **info: Any
) -> None:
    """Writes what TFDS needs besides the shards, which must all be there.

    info: for `tfds.core.DatasetInfo`, such as description.
    """
    notes: dict[str, list[dict[str, int]]] = {}
    for shard in shards:
        note = json.loads(_note(shard.path(directory, name)).read_text())
        notes.setdefault(shard.split, []).append(note)
    template = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    splits = [
        tfds.core.SplitInfo(
            name=split,
            shard_lengths=[note["examples"] for note in found],
            num_bytes=sum(note["bytes"] for note in found),
            filename_template=tfds.core.ShardedFileTemplate(
                data_dir=directory,
                template=template,
                dataset_name=name,
                split=split,
                filetype_suffix="array_record",
            ),
        )
        for split, found in notes.items()
    ]
    tfds.folder_dataset.write_metadata(
        data_dir=directory,
        features=features,
        split_infos=splits,
        filename_template=template,
        check_data=False,
        **info,
    )
    for shard in shards:
        _note(shard.path(directory, name)).unlink()


def _write_one(shard: Shard, *, directory: Path, name: str, features: tfds.features.FeaturesDict) -> None:
    path = shard.path(directory, name)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    count = 0
    try:
        writer = ArrayRecordWriter(str(temporary), _OPTIONS)
        try:
            for example in shard.examples():
                writer.write(features.serialize_example(example))
                count += 1
        finally:
            writer.close()
        # The writer is not asked whether the disk was full: the file is.
        if ArrayRecordReader(str(temporary)).num_records() != count:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.rename(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    write_whole(_note(path), json.dumps({"examples": count, "bytes": path.stat().st_size}))


def _note(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def _is_whole(path: Path) -> bool:
    """Whether a shard was written to its end, and is as long as it was then."""
    try:
        note = json.loads(_note(path).read_text())
        return path.stat().st_size == note["bytes"]
    except (OSError, ValueError, KeyError):
        return False


def _in_parallel(work: Callable[[Shard], None], shards: Sequence[Shard], workers: int) -> None:
    # Processes that are forked from one that has imported this and started no threads yet.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with concurrent.futures.ProcessPoolExecutor(min(workers, len(shards)), mp_context=context) as pool:
        futures = [pool.submit(work, shard) for shard in shards]
        try:
            done = concurrent.futures.as_completed(futures)
            for future in progress.bar(done, "shards", total=len(shards)):
                future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
