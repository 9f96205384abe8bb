"""Results as `mcm_jax.evaluate` writes them, and the runs they are of: read and checked."""

import dataclasses
import datetime
import json
import math
from pathlib import Path
from typing import Any

from mcm_jax.system.errors import InputError

# Names that other programs write; not imported from there, because a report needs neither JAX nor TFDS.
RESULTS = Path("evaluation") / "results.jsonl"
RUN_FILE = "run.json"
_INCEPTION = "inception-2015-12-05"
# What each network calls its Frechet distance; on Inception's features it is FID.
DISTANCES = {"efficientnet-lite0": "fd_effnet_lite0", _INCEPTION: "fid"}
NEAREST = "nearest_neighbour_distance"
OBJECTIVES = ("diffusion", "guidance", "cd", "ct", "progressive", "tract")
# Models of all of time, sampled with any number of steps.
_DIFFUSION_MODELS = ("diffusion", "guidance")

# Objects of a config that are looked into; the others are only compared.
_SECTIONS = ("data", "training")
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conditions:
    """What has to be equal for two distances to be compared, but for the sampling seeds."""

    dataset: str
    resolution: int
    data_preprocessing: str
    num_samples: int
    parameters: str
    label_rule: str
    guidance: float
    features_network: str
    features_sha256: str
    input_resolution: int | None  # None: the network has but one
    reference_sha256: str
    reference: str  # the split of the data set, or the file
    reference_count: int | None  # None: of a file, unknown

    @property
    def distance(self) -> str:
        """What the Frechet distance is called, without its count of samples."""
        return DISTANCES[self.features_network]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """One line of a results file. `run` is the run's directory, as seen from the one that holds all runs."""

    run: str
    directory: Path
    conditions: Conditions
    objective: str
    training_seed: int
    student_steps: int | None
    checkpoint_step: int
    steps: int
    sampler: str  # with what is unusual about it
    network_calls: int  # of one image
    seed: int
    metrics: dict[str, float]
    bounds: dict[str, float]
    rank_deficient: bool
    grid: str
    created: datetime.datetime
    versions: dict[str, str]


@dataclasses.dataclass(frozen=True)
class Run:
    """What `run.json` says: the settings of the training, and the data set."""

    config: dict[str, Any]
    dataset: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Collection:
    """Everything below one directory. `notes` are lines for the reader about what was left out."""

    results: tuple[Result, ...]
    runs: dict[str, Run]
    notes: tuple[str, ...]


def collect(runs: Path) -> Collection:
    """Reads every results file below `runs`, and the run.json beside each.

    A line that was cut off by a crash is skipped with a note; evaluating again leaves it in place.

    Raises:
      InputError: there is no directory or no result, or a file is damaged in another way.
    """
    if not runs.is_dir():
        raise InputError(f"--runs={runs}: there is no such directory; name the one that holds your runs")
    results: list[Result] = []
    settings: dict[str, Run] = {}
    notes: list[str] = []
    paths = sorted(runs.glob(f"**/{RESULTS}"))
    for path in paths:
        directory = path.parent.parent
        name = " ".join(str(directory.relative_to(runs)).split())
        name = runs.resolve().name if name == "." else name
        found, cut_off = read_file(path, run=name)
        results += found
        notes += cut_off
        if (directory / RUN_FILE).exists():
            settings[name] = read_run(directory / RUN_FILE)
        else:
            notes.append(f"{name} has no {RUN_FILE}: how it was trained is not known")
    if not results:
        raise InputError(
            f"--runs={runs}: no results in any {RESULTS} below it; "
            f"evaluate a run first: python -m mcm_jax.evaluate --workdir={runs}/RUN"
        )
    return Collection(tuple(results), settings, tuple(notes))


def read_file(path: Path, *, run: str) -> tuple[list[Result], list[str]]:
    """The results of one file, oldest line first, and a note for each line that was cut off."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} can't be read ({error.strerror})") from error
    results, notes = [], []
    for number, line in enumerate(content.split(b"\n"), start=1):
        place = f"{path}:{number}"
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode(), parse_constant=_refuse_constant)
        except ValueError as error:
            if _is_cut_off(line):
                notes.append(f"{place} is cut off and was skipped; evaluate that run again")
                continue
            raise InputError(f"{place} is damaged ({error}); remove that line and evaluate again") from error
        results.append(_result(record, place=place, run=run, directory=path.parent.parent))
    return results, notes


def read_run(path: Path) -> Run:
    """What a run.json says."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        config, dataset = content["config"], content["dataset"]
        sections = [config, dataset, *(config.get(name, {}) for name in _SECTIONS)]
        if not all(isinstance(section, dict) for section in sections):
            raise TypeError("config and dataset must be objects")
    except OSError as error:
        raise InputError(f"{path} can't be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged ({error}); restore it") from error
    return Run(config, dataset)


def read_grid(result: Result) -> bytes | None:
    """The PNG of the result's samples; None where there is none in the run's directory."""
    directory = result.directory.resolve()
    path = (directory / result.grid).resolve()
    if not path.is_relative_to(directory):
        return None
    try:
        content = path.read_bytes()
    except OSError:
        return None
    return content if content.startswith(_PNG_SIGNATURE) else None


def _refuse_constant(constant: str) -> None:
    raise ValueError(f"{constant} is not a number")


def _is_cut_off(line: bytes) -> bool:
    """Whether the line is the beginning of an object that does not end: what a crash leaves behind."""
    text = line.decode(errors="replace").strip()
    depth, in_string, escaped = 0, False, False
    for character in text:
        if in_string:
            in_string = escaped or character != '"'
            escaped = character == "\\" and not escaped
        elif character == '"':
            in_string = True
        else:
            depth += {"{": 1, "[": 1, "}": -1, "]": -1}.get(character, 0)
    return text.startswith("{") and depth > 0


def _result(record: Any, *, place: str, run: str, directory: Path) -> Result:
    """Checks one record; unknown fields are ignored."""
    fields = _Fields(record, place)
    features, reference = fields.section("features"), fields.section("reference")
    network, from_file = features.text("network"), "file" in reference.content
    if network not in DISTANCES:
        raise features.error("network", f"is {network!r}, not one of {', '.join(DISTANCES)}")
    objective = fields.text("objective")
    if objective not in OBJECTIVES:
        raise fields.error("objective", f"is {objective!r}, not one of {', '.join(OBJECTIVES)}")
    created = fields.text("created")
    try:
        date = datetime.datetime.fromisoformat(created)
    except ValueError as error:
        raise fields.error("created", f"is {created!r}, not a date") from error
    return Result(
        run=run,
        directory=directory,
        conditions=Conditions(
            dataset=fields.text("dataset"),
            resolution=fields.whole("resolution"),
            data_preprocessing=fields.text("data_preprocessing"),
            num_samples=fields.whole("num_samples"),
            parameters=fields.text("parameters"),
            label_rule=fields.text("label_rule"),
            guidance=fields.number("guidance"),
            features_network=network,
            features_sha256=features.text("sha256"),
            input_resolution=None if network == _INCEPTION else features.whole("input_resolution"),
            reference_sha256=reference.text("sha256"),
            reference=reference.text("file" if from_file else "split"),
            reference_count=None if from_file else reference.whole("count"),
        ),
        objective=objective,
        training_seed=fields.whole("training_seed"),
        student_steps=None if objective in _DIFFUSION_MODELS else fields.whole("student_steps"),
        checkpoint_step=fields.whole("checkpoint_step"),
        steps=fields.whole("steps"),
        sampler=_sampler(fields),
        network_calls=fields.whole("network_calls"),
        seed=fields.whole("seed"),
        metrics=fields.section("metrics").numbers(),
        bounds=fields.section("bounds").numbers(),
        rank_deficient=fields.truth("rank_deficient"),
        grid=fields.text("grid"),
        # A date without a zone is taken for UTC, which is what evaluate writes.
        created=date if date.tzinfo else date.replace(tzinfo=datetime.UTC),
        versions={name: str(version) for name, version in fields.section("versions").content.items()},
    )


def _sampler(fields: "_Fields") -> str:
    """'ddim', and what is unusual about it: 'addim with measured variance on the karras grid'."""
    text = fields.text("sampler")
    if fields.content.get("x_var") == "measured":
        eta, images = fields.number("x_var_eta"), fields.whole("x_var_images")
        text += f" with measured variance (eta {eta:g}, {images} images)"
    unusual = {"clip": ("every", ", clipped in every step"), "rounding": ("floor", ", rounded down")}
    added = "".join(words for name, (value, words) in unusual.items() if fields.content.get(name) == value)
    grid = fields.content.get("noise_grid", "schedule")
    on_grid = "" if grid == "schedule" else f"{',' if added else ''} on the {grid} grid"
    return f"{text}{added}{on_grid}"


class _Fields:
    """An object of a results file; every getter raises an InputError that names file, line and field."""

    def __init__(self, content: Any, place: str, prefix: str = ""):
        self.place, self.prefix = place, prefix
        if not isinstance(content, dict):
            raise self.error("", "is no JSON object")
        self.content: dict[str, Any] = content

    def error(self, name: str, problem: str) -> InputError:
        field = f"{self.prefix}{name}".rstrip(".") or "the line"
        return InputError(f"{self.place}: {field} {problem}; remove that line and evaluate the run again")

    def section(self, name: str) -> "_Fields":
        return _Fields(self._get(name, dict, "an object"), self.place, f"{self.prefix}{name}.")

    def text(self, name: str) -> str:
        return self._get(name, str, "text")

    def whole(self, name: str) -> int:
        value = self._get(name, int, "a whole number")
        if value < 0:
            raise self.error(name, f"is {value}, below zero")
        return value

    def truth(self, name: str) -> bool:
        return self._get(name, bool, "true or false")

    def number(self, name: str) -> float:
        value = self.content.get(name)
        return float(value) if type(value) is int else self._get(name, float, "a number")

    def numbers(self) -> dict[str, float]:
        return {name: self.number(name) for name in self.content}

    def _get(self, name: str, kind: type, words: str) -> Any:
        if name not in self.content:
            raise self.error(name, "is missing")
        # Not isinstance: true is an int to Python.
        if type(self.content[name]) is not kind:
            raise self.error(name, f"is {self.content[name]!r}, not {words}")
        if kind is float and not math.isfinite(self.content[name]):
            raise self.error(name, "is not finite")
        return self.content[name]
