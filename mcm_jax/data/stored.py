"""A data set that TFDS has prepared elsewhere, read part by part, with its images still encoded."""

import importlib.util
from collections.abc import Iterator, Sequence
from typing import Any

import tensorflow_datasets as tfds

from mcm_jax.data import layout
from mcm_jax.system.errors import InputError


class Stored:
    """The data set in TFDS's directory, on disk or in a bucket (gs://); picklable.

    Attributes:
      fingerprint: identifies the files.
    """

    def __init__(self, data_dir: str, name: str, *, splits: Sequence[str], instead: str = "no prepared"):
        """Opens the data set.

        Args:
          data_dir: TFDS's directory, or the data set's own directory in it.
          splits: the splits that will be read.
          instead: beginning of the message if the directory does not hold the data set.

        Raises:
          InputError: the directory holds no such data set, or it lacks a split.
        """
        if "://" in data_dir:
            _require_tensorflow(f"--manual_dir={data_dir} is a URL")
        try:
            self._builder = tfds.builder(name, data_dir=data_dir, try_gcs=False)
            if not self._builder.info.splits:
                raise FileNotFoundError("it has no splits")
        except (OSError, ValueError, AssertionError, tfds.core.DatasetNotFoundError) as error:
            why = " ".join(str(error).split())[:200]
            raise InputError(f"--manual_dir={data_dir} holds {instead} {name} ({why})") from error
        if not self._is_array_record:
            _require_tensorflow(f"--manual_dir={data_dir}: its {name} is stored as TFRecord")
        missing = [split for split in splits if split not in self._builder.info.splits]
        if missing:
            raise InputError(f"--manual_dir={data_dir}: its {name} has no split {missing[0]}")
        lengths = {split: self._lengths(split) for split in splits}
        self.fingerprint = f"{name} {self._builder.version} {lengths}"

    @property
    def _is_array_record(self) -> bool:
        return self._builder.info.file_format == tfds.core.FileFormat.ARRAY_RECORD

    @property
    def class_names(self) -> list[str]:
        """The names of the classes, of a data set with labels."""
        return layout.class_names_of(self._builder.info)

    def _lengths(self, split: str) -> list[int]:
        return self._builder.info.splits[split].shard_lengths

    def parts(self, split: str) -> list[range]:
        """The indices of the examples in each of its files."""
        result, start = [], 0
        for length in self._lengths(split):
            result.append(range(start, start + length))
            start += length
        return result

    def read(self, split: str, part: range) -> Iterator[dict[str, Any]]:
        """The examples of a part, with the encoded bytes of their images."""
        raw = {"image": tfds.decode.SkipDecoding()}
        if self._is_array_record:
            stored = layout.stored_records(self._builder, split, decoders=raw)
            yield from (stored[index] for index in part)
        else:
            stretch = tfds.core.ReadInstruction(split, from_=part.start, to=part.stop, unit="abs")
            yield from tfds.as_numpy(layout.stored_dataset(self._builder, stretch, decoders=raw))


def _require_tensorflow(why: str) -> None:
    """Raises InputError if TensorFlow, which is an extra, is not installed."""
    if importlib.util.find_spec("tensorflow") is None:
        raise InputError(f"{why}, which TFDS reads with TensorFlow; install it: pip install tensorflow")
