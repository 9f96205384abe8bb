"""Paths of prepared data sets on disk, and the summary file that marks a data set as complete.

A data set is named by a string: 'openmoji', 'avatars', 'emoji', 'coco', 'imagenet', 'imagenet/adm' or
'imagenet/resized' (two other preparations of ImageNet), or 'folder/<name>' for a folder of images. TFDS puts
it into <data_dir>/<builder>/<config>/<version>/, here openmoji/32/1.0.0/, imagenet/64/1.0.0/,
imagenet/adm_64/1.0.0/, imagenet/resized_64/1.0.0/ and folder/pets_32/1.0.0/. `prepare` writes the summary
last and, on a local disk, renames the finished directory into place in one step: a directory is complete if
and only if it has a summary.
"""

import dataclasses
import json
import re
import shlex
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np
import tensorflow_datasets as tfds

from mcm_jax import records
from mcm_jax.system import files, json_text, paths
from mcm_jax.system.errors import InputError, reason
from mcm_jax.system.paths import Path, as_path

VERSION = "1.0.0"
SPLITS = ("train", "test")
# Captioned data sets have a third split: combinations of words that are never trained on.
HELD_OUT = "heldout"
SUMMARY_FILE = "summary.json"
DEFAULT_DATA_DIR = "data"
LOCAL_DATA = "MCM_LOCAL_DATA"  # environment variable: directory for copies of data sets in buckets
MINILM = "minilm"  # the text encoder that is installed
CAPTIONED = ("avatars", "emoji", "coco")  # data sets whose captions are embedded by default
DRAWN = ("openmoji", "avatars", "emoji")
COCO = "coco"
IMAGENETS = ("imagenet", "imagenet/adm", "imagenet/resized")
FOLDER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
ENCODER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")

# Feature name -> value: an image, a label, and any further features of the data set.
Example = dict[str, Any]


@runtime_checkable
class Records(Protocol):
    """TFDS's random-access interface to the examples of a split."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...

    def __getitems__(self, indices: Sequence[int]) -> Sequence[Example]: ...

    def __iter__(self) -> Iterator[Example]: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Encoding:
    """How a data set's captions are embedded (see `embeddings`).

    `encoder` is the encoder's name, `encoder_sha256` a hash of all that its results depend on. Each of at
    most `length` tokens has an embedding of size `width`, and a caption has one of size `pooled_width`.
    There are `num_captions` different captions, with this hash; `data` is a hash of their data set.
    """

    encoder: str
    encoder_sha256: str
    length: int
    width: int
    pooled_width: int
    num_captions: int
    captions_sha256: str
    data: str

    @property
    def input(self) -> tuple[str, int, int, int]:
        """What a network that was trained on the captions requires of others."""
        return self.encoder_sha256, self.length, self.width, self.pooled_width

    @classmethod
    def from_json(cls, fields: Any) -> "Encoding":
        """Builds the object from JSON fields; raises as `DatasetInfo.from_json`."""
        return cls(**_checked(cls, fields))


@dataclasses.dataclass(frozen=True, kw_only=True)
class DatasetInfo:
    """Describes a prepared data set: enough to size a model and to identify the data in a result.

    `fingerprints` maps each split to the SHA-256 of its images and labels in stored order; `class_counts`
    maps each split to its number of images per class; `source` identifies the files the images come from.
    `encoding` is None unless captions are what a network is conditioned on.
    """

    dataset: str
    resolution: int
    class_names: tuple[str, ...]
    num_examples: dict[str, int]
    class_counts: dict[str, tuple[int, ...]]
    fingerprints: dict[str, str]
    preprocessing: str
    source: str
    encoding: Encoding | None = None
    path: Path

    @classmethod
    def from_json(cls, fields: Any, *, path: Path) -> "DatasetInfo":
        """Builds the object from JSON fields, the inverse of `dataclasses.asdict`; `path` is the data's path.

        Raises:
          AttributeError, KeyError, TypeError, ValueError: `fields` do not describe a data set.
        """
        given = {name: value for name, value in fields.items() if name not in ("path", "encoding")}
        encoding = fields.get("encoding")
        encoding = None if encoding is None else Encoding.from_json(encoding)
        return cls(**_checked(cls, given), encoding=encoding, path=path)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)


def _checked(cls: type, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a dataclass, each as its type requires."""
    types = typing.get_type_hints(cls)
    return {name: records.checked(types[name], value, name) for name, value in fields.items()}


def image_feature(resolution: int) -> tfds.features.Tensor:
    """A uint8 image [r, r, 3] stored as its raw bytes."""
    return tfds.features.Tensor(shape=(resolution, resolution, 3), dtype=np.uint8, encoding="bytes")


def class_names_of(info: tfds.core.DatasetInfo) -> list[str]:
    """The class names declared in the features of a TFDS data set."""
    return cast(Mapping[str, tfds.features.ClassLabel], info.features)["label"].names


def captioned_features(resolution: int, *, class_name: str) -> tfds.features.FeaturesDict:
    """Features of captioned images of one class: image uint8 [r, r, 3], label, caption, and file name."""
    return tfds.features.FeaturesDict(
        {
            "image": image_feature(resolution),
            "label": tfds.features.ClassLabel(names=[class_name]),
            "caption": tfds.features.Text(),
            "file": tfds.features.Text(),
        }
    )


def stored_records(builder: tfds.core.DatasetBuilder, split: str, **options: Any) -> Records:
    """Calls `builder.as_data_source`; TFDS's decorator hides its parameters from type checkers."""
    return cast(Any, builder).as_data_source(split, **options)


def stored_dataset(
    builder: tfds.core.DatasetBuilder, split: tfds.core.ReadInstruction, **options: Any
) -> Iterable[Example]:
    """Calls `builder.as_dataset`, wrapped for the same reason as `stored_records`."""
    return cast(Any, builder).as_dataset(split=split, **options)


def config_name(dataset: str, resolution: int) -> str:
    """The config name: '32' for openmoji or imagenet, 'adm_32' for imagenet/adm, 'pets_32' for folder/pets.

    Raises:
      InputError: no data set has this name.
    """
    builder, _, name = dataset.partition("/")
    if dataset in (*DRAWN, COCO, "imagenet"):
        return str(resolution)
    if dataset in IMAGENETS or (builder == "folder" and FOLDER_NAME.fullmatch(name)):
        return f"{name}_{resolution}"
    raise InputError(
        f"data set {dataset!r} is unknown: use {', '.join((*DRAWN, COCO, *IMAGENETS))} or folder/<name> "
        "(letters, digits, _, -)"
    )


def dataset_dir(data_dir: str | Path, *, dataset: str, resolution: int) -> Path:
    """The directory of a data set at one resolution; it need not exist."""
    builder = dataset.partition("/")[0]
    return as_path(data_dir) / builder / config_name(dataset, resolution) / VERSION


def prepared_resolutions(data_dir: str | Path, *, dataset: str) -> list[int]:
    """The resolutions at which `data_dir` holds the complete data set, in ascending order."""
    parent = dataset_dir(data_dir, dataset=dataset, resolution=1).parent.parent
    pattern = re.compile(re.escape(config_name(dataset, 1)[:-1]) + r"(\d+)")
    matches = (
        pattern.fullmatch(path.parent.parent.name) for path in parent.glob(f"*/{VERSION}/{SUMMARY_FILE}")
    )
    return sorted(int(match[1]) for match in matches if match)


def prepare_command(data_dir: str | Path, *, dataset: str, resolution: int, overwrite: bool = False) -> str:
    """The command that prepares the data set; PATH is a placeholder for the user's folder."""
    builder, _, name = dataset.partition("/")
    folder = builder == "folder"
    named = builder if folder else dataset
    command = f"python -m mcm_jax.prepare --dataset={named} --resolution={resolution}"
    if builder in ("emoji", "folder", COCO, "imagenet"):
        command += " --manual_dir=PATH"
    if folder:
        command += f" --name={name}"
    if str(data_dir) != DEFAULT_DATA_DIR:
        command += f" --data_dir={shlex.quote(str(data_dir))}"
    return command + (" --overwrite" if overwrite else "")


def write_summary(info: DatasetInfo, directory: Path) -> None:
    """Writes the summary of `info` into `directory`; omits the path, so that the data can be moved."""
    fields = dataclasses.asdict(info)
    del fields["path"], fields["encoding"]  # It is stored beside the embeddings.
    files.write_whole(directory / SUMMARY_FILE, json.dumps(fields, indent=2) + "\n")


def read_summary(directory: Path) -> DatasetInfo:
    """Reads the summary written by `write_summary`.

    Raises:
      FileNotFoundError: there is no summary, so no complete data set.
      ValueError: the file is damaged.
    """
    try:
        text = files.read_bytes(directory / SUMMARY_FILE)
    except NotADirectoryError as error:
        raise FileNotFoundError(*error.args) from error
    try:
        return DatasetInfo.from_json(json_text.loads(text), path=directory)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{directory / SUMMARY_FILE} is damaged: {reason(error)}") from error


def describe(*, data_dir: str | Path, dataset: str, resolution: int) -> DatasetInfo:
    """Reads the description of a prepared data set from its summary alone, not from its records.

    Raises:
      InputError: the data set is missing or incomplete; the message gives the command that prepares it.
    """
    directory = dataset_dir(data_dir, dataset=dataset, resolution=resolution)
    command = prepare_command(data_dir, dataset=dataset, resolution=resolution)
    try:
        info = read_summary(directory)
    except FileNotFoundError:
        others = prepared_resolutions(data_dir, dataset=dataset)
        there = f" ({_and(others)} {'is' if len(others) == 1 else 'are'} there)" if others else ""
        raise InputError(
            f"data set {dataset} at resolution {resolution} is not in {data_dir}{there}; "
            f"prepare it with: {command}"
        ) from None
    except OSError as error:
        raise InputError(f"data set {dataset}: {directory} can't be read ({reason(error)})") from error
    except ValueError as error:
        raise InputError(f"data set {dataset}: {error}; remake it with: {command} --overwrite") from error
    return info


def damage_error(info: DatasetInfo, reason: object) -> InputError:
    """The error for a complete data set whose files were damaged after preparation."""
    data_dir = info.path.parents[2]
    command = prepare_command(data_dir, dataset=info.dataset, resolution=info.resolution, overwrite=True)
    line = " ".join(str(reason).split())
    copy = f"delete its local copy (see {LOCAL_DATA}), or " if paths.is_in_bucket(info.path) else ""
    return InputError(f"{info.path} is damaged ({line}); {copy}remake the data set with: {command}")


def _and(numbers: Iterable[int]) -> str:
    return ", ".join(str(number) for number in numbers)
