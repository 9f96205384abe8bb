"""Embedded captions of a prepared data set: computed once by a text encoder, stored beside the records.

A directory <data_dir>/captions/<data set>/<encoder>/ contains each different caption once: captions.jsonl
lists them, record n of embeddings.array_record embeds the n-th, and summary.json, which is written last,
names the encoder. A record holds the embeddings of the caption's tokens in float16, without padding, and then
its pooled embedding in float32.
"""

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import pathlib
import tempfile
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Protocol, cast, runtime_checkable

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from etils import epath
from jaxtyping import Int, Int32

from mcm_jax.data import layout
from mcm_jax.data.layout import DatasetInfo, Encoding
from mcm_jax.data.local_copy import local_copy, place
from mcm_jax.system import files, json_text, progress
from mcm_jax.system.errors import InputError, reason
from mcm_jax.system.paths import Path

_CAPTIONS, _EMBEDDINGS = "captions.jsonl", "embeddings.array_record"
_BLOCK = 256
_OPTIONS = "group_size:1"  # Records are read one by one, in random order.


# Strings -> (tokens [B, L, D], mask [B, L], pooled [B, P]), see `mcm_jax.text.encoders.Encoder.encode`.
Encode = Callable[[Sequence[str]], tuple[np.ndarray, np.ndarray, np.ndarray]]


@runtime_checkable
class Encoder(Protocol):
    """A text encoder, see `mcm_jax.text.encoders.Encoder`."""

    name: str
    sha256: str
    length: int
    width: int
    pooled_width: int

    def tokenize(
        self, strings: Sequence[str], /
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]: ...

    def encode(self, strings: Sequence[str], /) -> tuple[np.ndarray, np.ndarray, np.ndarray]: ...


def directory(info: DatasetInfo, encoder: str) -> Path:
    """The directory of a data set's captions, embedded by the encoder of this name; it need not exist."""
    data_dir = info.path.parents[2]
    return data_dir / "captions" / info.path.parents[1].name / info.path.parents[0].name / encoder


def write(info: DatasetInfo, encoder: Encoder, *, any_length: bool = False) -> tuple[Encoding, int]:
    """Embeds the captions of all splits of a data set, unless this encoder has done so.

    Args:
      any_length: whether stored embeddings with another number of tokens are accepted.

    Returns:
      The encoding, and the number of captions that were cut because they are too long; 0 if nothing was done.

    Raises:
      InputError: the data set has no captions, the directory has embeddings by another encoder of the same
        name, or an embedding overflows.
    """
    if not layout.ENCODER_NAME.fullmatch(encoder.name):
        raise InputError(
            f"text encoder {encoder.name!r}: its name may contain only letters, digits, '.', _ and -; rename "
            "its directory"
        )
    target = directory(info, encoder.name)
    if (existing := _existing(target, info, encoder, any_length=any_length)) is not None:
        return existing, 0
    parent = _staging(target)
    with (
        files.writing_to(parent, "--data_dir"),
        tempfile.TemporaryDirectory(dir=parent, prefix=".incomplete-") as temporary,
    ):
        staging = pathlib.Path(temporary) / "captions"
        staging.mkdir()
        encoding, cut = _write_files(staging, info, encoder)
        if isinstance(target, epath.Path):
            files.publish_tree(staging, target, last=layout.SUMMARY_FILE)
        else:
            # Embeddings of an earlier preparation, or what an interrupted deletion has left.
            files.remove_tree(target)
            files.move_directory(staging, target)
    return encoding, cut


def _write_files(staging: pathlib.Path, info: DatasetInfo, encoder: Encoder) -> tuple[Encoding, int]:
    """Writes all files into an empty directory and returns as `write`."""
    distinct, cut = list(dict.fromkeys(_captions(info))), 0
    lines = "".join(json.dumps(caption) + "\n" for caption in distinct)
    files.write_whole(staging / _CAPTIONS, lines)
    writer = ArrayRecordWriter(str(staging / _EMBEDDINGS), _OPTIONS)
    for start in progress.bar(range(0, len(distinct), _BLOCK), "embedding captions"):
        block = distinct[start : start + _BLOCK]
        cut += int(encoder.tokenize(block)[2].sum())
        for record in _records(block, encoder.encode, encoder.name):
            writer.write(record)
    writer.close()
    # The writer does not report a full disk.
    if ArrayRecordReader(str(staging / _EMBEDDINGS)).num_records() != len(distinct):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(staging))
    encoding = Encoding(
        encoder=encoder.name,
        encoder_sha256=encoder.sha256,
        length=encoder.length,
        width=encoder.width,
        pooled_width=encoder.pooled_width,
        num_captions=len(distinct),
        captions_sha256=hashlib.sha256(lines.encode()).hexdigest(),
        data=_identity(info),
    )
    files.write_whole(staging / layout.SUMMARY_FILE, json.dumps(dataclasses.asdict(encoding)) + "\n")
    return encoding, cut


def _identity(info: DatasetInfo) -> str:
    """A hash of the images and of the files that they, and their captions, come from."""
    return hashlib.sha256(json.dumps([info.source, info.fingerprints], sort_keys=True).encode()).hexdigest()


def _captions(info: DatasetInfo) -> Iterator[str]:
    builder = tfds.builder_from_directory(local_copy(info.path))
    if "caption" not in cast(Mapping[str, object], builder.info.features):
        raise InputError(f"data set {info.dataset} has no captions to embed; prepare it without --encoder")
    for split in info.num_examples:
        for example in layout.stored_records(builder, split):
            yield example["caption"].decode()


def _existing(target: Path, info: DatasetInfo, encoder: Encoder, *, any_length: bool) -> Encoding | None:
    """What is stored in `target`, unless it belongs to an earlier preparation of the data set."""
    try:
        existing = _read_summary(target)
    except FileNotFoundError:
        return None
    if existing.data != _identity(info):
        return None
    if existing.encoder_sha256 != encoder.sha256:
        raise InputError(
            f"{target} contains embeddings by another encoder of that name (its hash is "
            f"{existing.encoder_sha256[:12]}, now {encoder.sha256[:12]}); delete it, or rename the "
            "encoder's directory"
        )
    if existing.length != encoder.length and not any_length:
        raise InputError(
            f"{target} contains embeddings of up to {existing.length} tokens, not {encoder.length}; delete "
            f"it, or pass --caption_length={existing.length}"
        )
    return existing


def _staging(target: Path) -> pathlib.Path:
    """An existing local directory, on the file system of `target` if that is local."""
    if isinstance(target, epath.Path):
        return place()
    target.parent.mkdir(parents=True, exist_ok=True)
    return target.parent


def _records(captions: Sequence[str], encode: Encode, name: str) -> list[bytes]:
    """The stored embeddings of captions; an empty one has no tokens and a zero pooled embedding."""
    tokens, mask, pooled = encode(captions)
    empty = np.array([not caption.strip() for caption in captions], bool)
    tokens = tokens.astype("<f2")
    if not np.isfinite(tokens).all():
        raise InputError(f"text encoder {name}: an embedding exceeds float16, the format it is stored in")
    mask, pooled = mask & ~empty[:, None], np.where(empty[:, None], 0, pooled).astype("<f4")
    return [
        embedded[exists].tobytes() + whole.tobytes()
        for embedded, exists, whole in zip(tokens, mask, pooled, strict=True)
    ]


def _read_summary(directory: Path) -> Encoding:
    text = files.read_bytes(directory / layout.SUMMARY_FILE)
    try:
        return Encoding.from_json(json_text.loads(text))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        path = directory / layout.SUMMARY_FILE
        raise InputError(f"{path} is damaged ({reason(error)}); delete {directory}") from error


def describe(info: DatasetInfo, encoder: str) -> DatasetInfo:
    """Adds the encoding of the captions to the description of a data set.

    Raises:
      InputError: the captions are not embedded by this encoder; the message gives the command.
    """
    if not layout.ENCODER_NAME.fullmatch(encoder):
        raise InputError(
            f"config.data.encoder={encoder}: it must be {layout.MINILM}, or the name of the encoder's "
            "directory without its path"
        )
    try:
        encoding = _read_summary(directory(info, encoder))
        if encoding.data == _identity(info):
            return dataclasses.replace(info, encoding=encoding)
    except FileNotFoundError:
        pass
    command = layout.prepare_command(info.path.parents[2], dataset=info.dataset, resolution=info.resolution)
    source = encoder if encoder == layout.MINILM else f"DIRECTORY/{encoder}"
    raise InputError(
        f"the captions of {info.dataset} at resolution {info.resolution} are not embedded by {encoder}; "
        f"repeat the command that prepared them, with --encoder={source} ({command} --encoder={source})"
    )


class Embeddings:
    """The embedded captions of a data set, held in memory if they are few."""

    def __init__(self, info: DatasetInfo, *, in_memory_limit_bytes: int):
        """Opens the captions of a data set that `describe` has described.

        Raises:
          InputError: the files are damaged.
        """
        if info.encoding is None:
            raise ValueError("the description has no encoding")
        self.encoding = info.encoding
        self._place = directory(info, info.encoding.encoder)
        copy = local_copy(self._place)
        with self._reporting_damage():
            text = files.read_bytes(copy / _CAPTIONS)
            if hashlib.sha256(text).hexdigest() != self.encoding.captions_sha256:
                raise ValueError(f"{_CAPTIONS} has changed")
            self.captions: list[str] = [json_text.loads(line) for line in text.splitlines()]
            self._reader = ArrayRecordReader(str(copy / _EMBEDDINGS))
            if not len(self.captions) == self._reader.num_records() == self.encoding.num_captions:
                raise ValueError(f"not {self.encoding.num_captions} captions and embeddings")
        self._rows = {caption: row for row, caption in enumerate(self.captions)}
        self._stored: list[bytes] | None = None
        if files.size(copy / _EMBEDDINGS) <= in_memory_limit_bytes:
            count = len(self.captions)
            blocks = [range(start, min(start + _BLOCK, count)) for start in range(0, count, _BLOCK)]
            self._stored = [record for block in blocks for record in self._read(block)]

    @contextlib.contextmanager
    def _reporting_damage(self) -> Generator[None, None, None]:
        try:
            yield
        except (OSError, ValueError, RuntimeError) as error:
            raise InputError(f"{self._place} is damaged ({reason(error)}); delete it") from error

    def _read(self, rows: Sequence[int]) -> list[bytes]:
        with self._reporting_damage():
            return self._reader.read(rows)

    def rows(self, captions: Sequence[str]) -> Int32[np.ndarray, " N"]:
        """The row of each caption.

        Raises:
          InputError: a caption is not among those that were embedded.
        """
        try:
            return np.array([self._rows[caption] for caption in captions], np.int32)
        except KeyError as error:
            raise InputError(
                f"the caption {error} is not embedded: the records are newer than the embeddings; delete the "
                f"embeddings by {self.encoding.encoder} and make them again"
            ) from None

    def gather(self, rows: Int[np.ndarray, " N"]) -> dict[str, np.ndarray]:
        """The embeddings at these rows, padded: tokens [N, L, D] float16, mask [N, L], pooled [N, P]."""
        chosen = [int(row) for row in rows]
        found = self._read(chosen) if self._stored is None else [self._stored[row] for row in chosen]
        return pad(found, self.encoding)


def pad(stored: Sequence[bytes], encoding: Encoding) -> dict[str, np.ndarray]:
    """Arrays of a batch from stored records; see the module's docstring."""
    tokens = np.zeros((len(stored), encoding.length, encoding.width), np.float16)
    mask = np.zeros((len(stored), encoding.length), bool)
    pooled = np.zeros((len(stored), encoding.pooled_width), np.float32)
    for n, record in enumerate(stored):
        end = len(record) - 4 * encoding.pooled_width
        embedded = np.frombuffer(record[:end], "<f2").reshape(-1, encoding.width)
        tokens[n, : len(embedded)], mask[n, : len(embedded)] = embedded, True
        pooled[n] = np.frombuffer(record[end:], "<f4")
    return {"tokens": tokens, "mask": mask, "pooled": pooled}


def embed(
    prompts: Sequence[str], encode: Encode, encoding: Encoding
) -> Callable[[slice], dict[str, np.ndarray]]:
    """Embeds prompts like captions, rounding included, each different one once.

    Returns:
      A function from a slice of the prompts to what `Embeddings.gather` returns.
    """
    distinct, stored = list(dict.fromkeys(prompts)), []
    for start in range(0, len(distinct), _BLOCK):
        stored += _records(distinct[start : start + _BLOCK], encode, encoding.encoder)
    of = dict(zip(distinct, stored, strict=True))
    return lambda part: pad([of[prompt] for prompt in prompts[part]], encoding)
