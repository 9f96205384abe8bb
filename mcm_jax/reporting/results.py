"""Results as `mcm_jax.evaluate` writes them: read, checked, grouped by what may be compared, and averaged."""

import dataclasses
import datetime
import json
import math
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mcm_jax.errors import InputError

# Names that other programs write; not imported from there, because a report needs neither JAX nor TFDS.
RESULTS = Path("evaluation") / "results.jsonl"
RUN_FILE = "run.json"
DISTANCE = "fd_effnet_lite0"
NEAREST = "nearest_neighbour_distance"
OBJECTIVES = ("diffusion", "cd", "ct")

# Settings that do not change what is learned, or that a result states itself.
_NOT_LEARNED = {
    "": ("seed", "teacher_checkpoint", "mesh", "sampling"),
    "data": ("data_dir",),
    "training": ("log_every_steps", "checkpoint_every_steps", "keep_checkpoints", "sample_every_steps"),
}
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
    input_resolution: int
    reference_sha256: str
    reference_split: str
    reference_count: int


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
    sampler: str
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


@dataclasses.dataclass(frozen=True)
class Group:
    """Results that may stand in one table: equal conditions, and every run sampled with the same seeds."""

    conditions: Conditions
    seeds: tuple[int, ...]
    results: tuple[Result, ...]

    @property
    def distance(self) -> str:
        """Name of the distance of all samples."""
        return f"{DISTANCE}_{self.conditions.num_samples}"

    @property
    def distances(self) -> tuple[str, ...]:
        """Names of the distances there are, all samples first, then of their first few."""
        names = {name for result in self.results for name in result.metrics if count_of(name) is not None}
        return tuple(sorted(names, key=lambda name: -(count_of(name) or 0)))

    @property
    def rank_deficient(self) -> bool:
        """Whether a covariance of some result was singular."""
        return any(result.rank_deficient for result in self.results)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """One cell of a table: mean over training seeds; standard error None with a single seed."""

    objective: str
    student_steps: int | None
    steps: int
    sampler: str
    mean: float
    standard_error: float | None
    count: int
    runs: tuple[str, ...]

    @property
    def as_trained(self) -> bool:
        """Whether a student is sampled the way it was trained for."""
        return self.student_steps == self.steps and self.sampler == "ddim"


def count_of(name: str) -> int | None:
    """The number of images at the end of a distance's name, bound or metric; None if it has none."""
    head, _, count = name.rpartition("_")
    return int(count) if head.endswith(DISTANCE) and count.isdecimal() else None


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
        sections = [config, dataset, *(config.get(name, {}) for name in _NOT_LEARNED if name)]
        if not all(isinstance(section, dict) for section in sections):
            raise TypeError("config and dataset must be objects")
    except OSError as error:
        raise InputError(f"{path} can't be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged ({error}); restore it") from error
    return Run(config, dataset)


def group(collection: Collection) -> tuple[list[Group], list[str]]:
    """What may be compared, the largest group first; and notes on what was left out.

    Of two evaluations of the same thing the newest counts, and of a run's checkpoints the last.
    """
    results, notes = _newest(collection.results), []
    last: dict[Any, int] = {}
    for result in results:
        last[_evaluated(result)] = max(last.get(_evaluated(result), 0), result.checkpoint_step)
    kept = [result for result in results if result.checkpoint_step == last[_evaluated(result)]]
    for run in sorted({result.run for result in results if result not in kept}):
        notes.append(f"{run} was evaluated at several checkpoints; only the last one is shown")
    seeds: dict[Any, set[int]] = {}
    for result in kept:
        seeds.setdefault(_evaluated(result), set()).add(result.seed)
    members: dict[tuple[Conditions, tuple[int, ...]], list[Result]] = {}
    for result in kept:
        members.setdefault((result.conditions, tuple(sorted(seeds[_evaluated(result)]))), []).append(result)
    groups = [
        Group(conditions, sampling_seeds, tuple(group_results))
        for (conditions, sampling_seeds), group_results in members.items()
    ]
    groups.sort(key=lambda g: (-len(g.results), dataclasses.astuple(g.conditions), g.seeds))
    return groups, notes


def estimates(group: Group, metric: str, runs: Mapping[str, Run]) -> tuple[list[Estimate], list[str]]:
    """Mean and standard error over training seeds of one metric, teacher first, then CD and CT by steps.

    Runs are averaged only if they differ in nothing but their seed: their settings in run.json, those of
    their teacher and the checkpoint's step are equal. A run's value is its mean over the sampling seeds.
    Of two runs that are equal even in their seed the newest counts, with a note.
    """
    cells: dict[Any, dict[str, list[Result]]] = {}
    for result in group.results:
        if metric in result.metrics:
            what = (OBJECTIVES.index(result.objective), result.student_steps or 0)
            key = (*what, result.steps, result.sampler, result.checkpoint_step, _recipe(result.run, runs))
            cells.setdefault(key, {}).setdefault(result.run, []).append(result)
    notes, found = [], []
    for key in sorted(cells):
        by_seed: dict[int, str] = {}
        for run, results in sorted(cells[key].items(), key=lambda item: max(r.created for r in item[1])):
            seed = results[0].training_seed
            if seed in by_seed:
                notes.append(f"{by_seed[seed]} is the same training as {run}, down to the seed: left out")
            by_seed[seed] = run
        chosen = [cells[key][by_seed[seed]] for seed in sorted(by_seed)]
        values = [statistics.fmean(result.metrics[metric] for result in results) for results in chosen]
        first = chosen[0][0]
        estimate = Estimate(
            objective=first.objective,
            student_steps=first.student_steps,
            steps=first.steps,
            sampler=first.sampler,
            mean=statistics.fmean(values),
            standard_error=standard_error(values),
            count=len(values),
            runs=tuple(results[0].run for results in chosen),
        )
        found.append(estimate)
    return found, notes


def standard_error(values: list[float]) -> float | None:
    """sqrt(sum (v - mean)^2 / (n - 1) / n); None where n < 2."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def bounds(group: Group) -> dict[str, tuple[float, float]]:
    """Lowest and highest value of each floor and ceiling in the group.

    They differ where they depend on more than the conditions, as the untrained network's does.
    """
    values: dict[str, list[float]] = {}
    for result in group.results:
        for name, value in result.bounds.items():
            values.setdefault(name, []).append(value)
    return {name: (min(several), max(several)) for name, several in sorted(values.items())}


def grids(group: Group) -> dict[int, list[Result]]:
    """Results whose pictures show the same noise, by training seed: teacher, CD, CT; each by steps.

    All are of the group's first sampling seed.
    """
    same_noise = [result for result in group.results if result.seed == group.seeds[0]]
    same_noise.sort(
        key=lambda r: (OBJECTIVES.index(r.objective), r.student_steps or 0, r.steps, r.sampler, r.run)
    )
    by_seed: dict[int, list[Result]] = {}
    for result in same_noise:
        by_seed.setdefault(result.training_seed, []).append(result)
    return dict(sorted(by_seed.items()))


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


def _evaluated(result: Result) -> tuple[Any, ...]:
    """What was evaluated and how, but for checkpoint and sampling seed."""
    return (result.run, result.conditions, result.steps, result.sampler)


def _newest(results: Iterable[Result]) -> list[Result]:
    """Of results that differ in nothing but their date the newest, in the order they were read."""
    kept: dict[Any, Result] = {}
    for result in results:
        key = (*_evaluated(result), result.checkpoint_step, result.seed)
        if key not in kept or result.created >= kept[key].created:
            kept[key] = result
    return list(kept.values())


def _recipe(run: str, runs: Mapping[str, Run]) -> str:
    """All settings that influence what the run learned, but for the seeds, as text; "" if not known."""
    if run not in runs:
        return ""
    teacher = runs[run].config.get("teacher_checkpoint")
    if teacher is not None:
        # Recorded as seen from where the training was started, so that only its name can be relied on.
        there = {_settings(runs[name]) for name in runs if Path(name).name == Path(str(teacher)).name}
        teacher = there.pop() if len(there) == 1 else str(teacher)
    return json.dumps([_settings(runs[run]), teacher])


def _settings(run: Run) -> str:
    config = {name: value for name, value in run.config.items() if name not in _NOT_LEARNED[""]}
    for section, names in _NOT_LEARNED.items():
        if section in config:
            config[section] = {k: v for k, v in config[section].items() if k not in names}
    return json.dumps([config, run.dataset.get("fingerprints")], sort_keys=True)


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
            features_network=features.text("network"),
            features_sha256=features.text("sha256"),
            input_resolution=features.whole("input_resolution"),
            reference_sha256=reference.text("sha256"),
            reference_split=reference.text("split"),
            reference_count=reference.whole("count"),
        ),
        objective=objective,
        training_seed=fields.whole("training_seed"),
        student_steps=None if objective == "diffusion" else fields.whole("student_steps"),
        checkpoint_step=fields.whole("checkpoint_step"),
        steps=fields.whole("steps"),
        sampler=fields.text("sampler"),
        seed=fields.whole("seed"),
        metrics=fields.section("metrics").numbers(),
        bounds=fields.section("bounds").numbers(),
        rank_deficient=fields.truth("rank_deficient"),
        grid=fields.text("grid"),
        # A date without a zone is taken for UTC, which is what evaluate writes.
        created=date if date.tzinfo else date.replace(tzinfo=datetime.UTC),
        versions={name: str(version) for name, version in fields.section("versions").content.items()},
    )


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
