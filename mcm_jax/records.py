"""Defines the records of results, and the names of files, distances and bounds.

`evaluation` writes records, `reporting` reads them. Each field is declared once, here. Its class determines
its name in the file, its check when read, and whether it identifies a measurement:

- fields of `Sampling`, `Features`, `Reference` and `Measurement` describe what was measured; records that
  differ in one of them are different measurements;
- fields of `Outcome` and `Result` contain the results.

Fields with a default may be missing in files of older versions. This module imports only the standard
library, so that reports start without JAX and TensorFlow.
"""

import dataclasses
import datetime
import functools
import hashlib
import math
import re
import types
import typing
from pathlib import Path
from typing import Any, ClassVar, Literal, TypedDict, TypeVar

# A JSON object as read from or written to a file; readers check the fields that they need.
JsonObject = dict[str, Any]

# Files in a run's directory.
RUN_FILE = "run.json"
# In place of RUN_FILE, in a folder written by `mcm_jax.export`; has all that RUN_FILE has.
EXPORTED_FILE = "config.json"
RESULTS = Path("evaluation") / "results.jsonl"

Objective = Literal[
    "diffusion",
    "guidance",
    "cd",
    "ct",
    "scd",
    "sct",
    "moments",
    "ayf",
    "meanflow",
    "shortcut",
    "progressive",
    "tract",
]
# In the order in which tables list them.
OBJECTIVES: tuple[Objective, ...] = typing.get_args(Objective)
# The others are students of few steps.
DIFFUSION_MODELS: tuple[Objective, ...] = ("diffusion", "guidance")
# Students of any number of steps.
FLOW_MAPS: tuple[Objective, ...] = ("ayf", "meanflow")


def student_sampler(objective: Objective | str) -> Literal["ddim", "ddpm"]:
    """The sampler that an objective's students are trained for."""
    return "ddpm" if objective == "moments" else "ddim"


EFFICIENTNET: Literal["efficientnet-lite0"] = "efficientnet-lite0"
INCEPTION: Literal["inception-2015-12-05"] = "inception-2015-12-05"
DINOV2: Literal["dinov2-vitl14"] = "dinov2-vitl14"
# Any other size of DINOv2; its hash tells which.
DINOV2_OTHER: Literal["dinov2-other"] = "dinov2-other"
# Names of the Frechet distance on each network's features; with Inception it is FID.
DISTANCES = {
    EFFICIENTNET: "fd_effnet_lite0",
    INCEPTION: "fid",
    DINOV2: "fd_dinov2",
    DINOV2_OTHER: "fd_dinov2_other",
}
NEAREST = "nearest_neighbour_distance"
# Scores of samples by their captions, as in --metrics.
ATTRIBUTES, CLIP_SCORE, NEAREST_OF_TEN = CAPTION_SCORES = ("attributes", "clip_score", "nearest_of_ten")
# Prefixes of the names of bounds.
TEST_IMAGES, MEAN_IMAGE, UNTRAINED_NETWORK = "test_images", "mean_image", "untrained_network"
HELD_OUT_IMAGES, OTHER_CAPTIONS = "heldout_images", "other_captions"

_DISTANCE_WITH_COUNT = re.compile(
    rf"(({TEST_IMAGES}|{UNTRAINED_NETWORK})_)?({'|'.join(DISTANCES.values())})_(?P<count>50k|[0-9]{{1,18}})"
)


def with_count(name: str, count: int) -> str:
    """Appends the number of images to a metric's name: 'fid_2048', 'fid_50k'."""
    return f"{name}_50k" if count == 50_000 else f"{name}_{count}"


def count_of(name: str) -> int | None:
    """Number of images in the name of a Frechet distance (metric or bound); None for other names."""
    found = _DISTANCE_WITH_COUNT.fullmatch(name)
    if found is None:
        return None
    return 50_000 if found.group("count") == "50k" else int(found.group("count"))


def caption_score_of(name: str) -> str | None:
    """A metric's name without the number of images if it scores captions: 'attributes'; None for others.

    Examples:
      >>> caption_score_of("clip_score_vit_2000"), caption_score_of("fid_2000")
      ('clip_score_vit', None)
    """
    score, _, count = name.rpartition("_")
    known = score.startswith(CAPTION_SCORES) and count.removesuffix("k").isdecimal()
    return score if known else None


_Record = TypeVar("_Record", bound="Record")
_Value = TypeVar("_Value")


class RecordError(ValueError):
    """An invalid record; the message begins with the field's name."""


class Record:
    """A frozen dataclass that is written as a JSON object and checked when it is read."""

    # Every subclass is a dataclass.
    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]

    def to_json(self) -> dict[str, object]:
        """Returns the object for the file; the fields of a `flat` nested record are merged into it."""
        content: dict[str, object] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.metadata.get("flat"):
                content |= value.to_json()
            else:
                content[field.name] = _plain(value)
        return content

    @classmethod
    def from_json(cls: type[_Record], content: object, *, prefix: str = "") -> _Record:
        """The inverse of `to_json`; ignores unknown fields.

        Args:
          prefix: prefix of field names in messages, for example 'features.'.

        Raises:
          RecordError: a field is missing, has the wrong type, or holds a number that is not finite.
        """
        if not isinstance(content, dict):
            raise RecordError(f"{prefix.rstrip('.') or 'the line'} is not a JSON object")
        values: dict[str, object] = {}
        for field in dataclasses.fields(cls):
            kind = _types(cls)[field.name]
            if field.metadata.get("flat") and _is_record(kind):
                values[field.name] = kind.from_json(content, prefix=prefix)
            elif field.name in content:
                values[field.name] = checked(kind, content[field.name], prefix + field.name)
            elif field.default is dataclasses.MISSING:
                raise RecordError(f"{prefix}{field.name} is missing")
        try:
            return cls(**values)
        except RecordError as error:
            raise RecordError(f"{prefix}{error}") from error


def lists_times(noise_grid: str) -> bool:
    """Whether a noise grid lists its times, such as '1,1/2,1/4', and has no name."""
    return noise_grid[:1].isdecimal()


class SamplingOptions(TypedDict, total=False):
    """The settings of a `Sampling` that a user may choose; if None or missing, the run's own is used."""

    steps: int | None
    sampler: str | None
    noise_grid: str | None
    x_var: str | None
    guidance: int | float | None
    rounding: str | None


_FLAT = {"flat": True}


def _usual(*values: _Value, otherwise: str) -> _Value:
    """A setting whose usual values are omitted from labels; `otherwise` describes any other value."""
    return dataclasses.field(default=values[0], metadata={"usual": values, "otherwise": otherwise})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling(Record):
    """How images are sampled: SamplingSettings, resolved for one run."""

    steps: int
    sampler: str
    noise_grid: str = _usual("schedule", otherwise="{noise_grid} grid")
    # None if the sampler uses no variance.
    x_var: str | None = _usual(
        *(None, "analytic"), otherwise="{x_var} variance with eta {x_var_eta:g} over {x_var_images} images"
    )
    # These two only if the variance is measured.
    x_var_eta: float | None = None
    x_var_images: int | None = None
    guidance: float
    # The model that guidance leads away from, by its published file or its workdir, and its checkpoint's
    # identity; None: the run itself, without condition.
    guide: str | None = _usual(None, otherwise="guided by {guide}")
    guide_checkpoint: str | None = None
    clip: str = _usual("last", otherwise="clipped in {clip} step")
    rounding: str = _usual("nearest", otherwise="{rounding} rounding")  # of pixels to bytes
    network_calls: int  # for one image

    def __post_init__(self) -> None:
        if self.x_var not in (None, "analytic") and None in (self.x_var_eta, self.x_var_images):
            raise RecordError(f"x_var is {self.x_var!r}, but x_var_eta or x_var_images is missing")

    @property
    def unusual(self) -> dict[str, str]:
        """Phrases that describe the settings with unusual values, by setting."""
        return {
            field.name: field.metadata["otherwise"].format(**vars(self))
            for field in dataclasses.fields(self)
            if "usual" in field.metadata and getattr(self, field.name) not in field.metadata["usual"]
        }

    @property
    def grid_name(self) -> str:
        """The noise grid in names of files: its own name, or a hash of its times, which may be many."""
        if not lists_times(self.noise_grid):
            return self.noise_grid
        return f"times{hashlib.sha256(self.noise_grid.encode()).hexdigest()[:12]}"

    @property
    def label(self) -> str:
        """The sampler and its unusual settings: 'ddim', 'heun (karras grid)'."""
        return f"{self.sampler} ({', '.join(self.unusual.values())})" if self.unusual else self.sampler


@dataclasses.dataclass(frozen=True, kw_only=True)
class Features(Record):
    """The network that computes the features to compare."""

    network: Literal["efficientnet-lite0", "inception-2015-12-05", "dinov2-vitl14", "dinov2-other"]
    sha256: str  # of the weights
    input_resolution: int | None = None  # None: the network supports only one

    def __post_init__(self) -> None:
        if self.network == EFFICIENTNET and self.input_resolution is None:
            raise RecordError("input_resolution is missing")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reference(Record):
    """The images that samples are compared with: a split of a prepared data set, or a published file."""

    # Not compared, because sha256 covers them and files of older versions do not contain them.
    dataset: str | None = dataclasses.field(default=None, compare=False)
    resolution: int | None = dataclasses.field(default=None, compare=False)
    split: str | None = None
    file: str | None = None
    count: int | None = None  # number of images; None: unknown, for a file
    sha256: str

    def __post_init__(self) -> None:
        if self.file is None:
            for name in ("split", "count"):
                if getattr(self, name) is None:
                    raise RecordError(f"{name} is missing")

    @property
    def name(self) -> str:
        """The name of the file or the split."""
        return self.file or self.split or ""


# The kind of published files that contain consistency models, not diffusion models.
CONSISTENCY = "consistency"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Origin(Record):
    """A published file that a run's parameters, or those of its first teacher, come from."""

    kind: str
    file: str
    sha256: str
    source: str
    licence: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measurement(Record):
    """Everything that the results of an evaluated run depend on."""

    version: int = 0  # of the code that computes features and statistics
    workdir: str = ""
    objective: Objective
    dataset: str
    resolution: int
    data_preprocessing: str
    training_seed: int
    # Of a student of several numbers, or of any, the one it is sampled with; None: a diffusion model.
    student_steps: int | None = None
    trained_for: tuple[int, ...] = ()  # all numbers of steps of a student of several; (): one number, or any
    checkpoint_step: int
    checkpoint: str | None = None  # its identity (a hash); None: unknown
    parameters: str
    label_rule: str
    seed: int
    sampling: Sampling = dataclasses.field(metadata=_FLAT)
    origin: Origin | None = None  # None: no parameters come from a published file
    guide_origin: Origin | None = None  # the same for the guide, in sampling or in training
    num_samples: int
    untrained_num: int = 0  # samples of the untrained network
    asked: tuple[str, ...] = ()  # names of the requested metrics, as in --metrics
    caption_scores: tuple[str, ...] = ()  # NAME HASH of each score that compares samples with captions
    features: Features
    reference: Reference

    def __post_init__(self) -> None:
        if self.student_steps is None and self.objective not in DIFFUSION_MODELS:
            raise RecordError("student_steps is None, not a whole number")

    @property
    def as_trained(self) -> bool:
        """Whether a student was sampled with the steps and the sampler that it was trained for."""
        trained = (self.student_steps, student_sampler(self.objective))
        return (self.sampling.steps, self.sampling.label) == trained

    def same_measurement(self, other: "Measurement") -> bool:
        """Whether both have the same inputs, regardless of their outcomes."""
        names = [field.name for field in dataclasses.fields(Measurement)]
        return all(getattr(self, name) == getattr(other, name) for name in names)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImagesMeasurement(Record):
    """Everything that the results of images from elsewhere depend on."""

    images: str  # name of the file or folder
    sha256: str  # of the images
    image_size: tuple[int, ...] = ()  # height and width in pixels; (): unknown
    rounding: str | None = None  # of pixels to bytes; None: unknown
    num_samples: int
    asked: tuple[str, ...] = ()
    features: Features
    reference: Reference


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome(Record):
    """The measured values, with date and software versions."""

    metrics: dict[str, float]
    bounds: dict[str, float]
    rank_deficient: bool  # a covariance had fewer images than dimensions
    features_seconds: float = 0.0
    created: datetime.datetime
    versions: dict[str, str]


# The fields of the last base class come first.
@dataclasses.dataclass(frozen=True, kw_only=True)
class Result(Outcome, Measurement):
    """One line of a run's RESULTS."""

    grid: str  # image of the first samples; path relative to the run's directory
    sampling_seconds: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImagesResult(Outcome, ImagesMeasurement):
    """One line of `evaluate --images --results=FILE`."""


@functools.cache
def _types(cls: type[Record]) -> dict[str, object]:
    return typing.get_type_hints(cls)


def _is_record(kind: object) -> typing.TypeGuard[type[Record]]:
    return isinstance(kind, type) and issubclass(kind, Record)


def _plain(value: object) -> object:
    """Converts a field's value for JSON; a nested record omits fields that are None."""
    if isinstance(value, Record):
        return {name: field for name, field in value.to_json().items() if field is not None}
    if isinstance(value, datetime.datetime):
        return value.isoformat(timespec="seconds")
    return list(value) if isinstance(value, tuple) else value


_WORDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}


def checked(kind: object, value: object, name: str) -> Any:
    """Converts a JSON value to the type `kind` of the field `name`.

    Raises:
      RecordError: the value has another type.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        (kind,) = (one for one in arguments if one is not types.NoneType)
        return None if value is None else checked(kind, value, name)
    if origin is Literal:
        if value not in arguments:
            raise RecordError(f"{name} is {value!r}, not one of {', '.join(arguments)}")
        return value
    if origin is tuple:
        if not isinstance(value, list):
            raise RecordError(f"{name} is {value!r}, not a list")
        return tuple(checked(arguments[0], one, name) for one in value)
    if origin is dict or _is_record(kind):
        if not isinstance(value, dict):
            raise RecordError(f"{name} is {value!r}, not an object")
        if _is_record(kind):
            return kind.from_json(value, prefix=f"{name}.")
        return {key: checked(arguments[1], one, f"{name}.{key}") for key, one in value.items()}
    if kind is datetime.datetime:
        return _date(value, name)
    assert isinstance(kind, type)
    return _scalar(kind, value, name)


def _scalar(kind: type, value: object, name: str) -> object:
    if kind is float and type(value) is int:
        value = float(value)
    # isinstance would accept True as an int.
    if type(value) is not kind:
        raise RecordError(f"{name} is {value!r}, not {_WORDS[kind]}")
    if isinstance(value, float) and not math.isfinite(value):
        raise RecordError(f"{name} is not finite")
    if isinstance(value, int) and value < 0:
        raise RecordError(f"{name} is {value}, below zero")
    return value


def _date(value: object, name: str) -> datetime.datetime:
    """Parses a date; without a time zone it is UTC, as written by evaluation."""
    try:
        date = datetime.datetime.fromisoformat(str(_scalar(str, value, name)))
    except RecordError:
        raise
    except ValueError as error:
        raise RecordError(f"{name} is {value!r}, not a date") from error
    return date if date.tzinfo else date.replace(tzinfo=datetime.UTC)
