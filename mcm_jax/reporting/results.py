"""Reads and validates the results that `mcm_jax.evaluate` writes, and the descriptions of their runs."""

import dataclasses
import io

from PIL import Image

from mcm_jax import records
from mcm_jax.config.upgrade import upgraded
from mcm_jax.data import images
from mcm_jax.records import EXPORTED_FILE, RESULTS, RUN_FILE, JsonObject, RecordError, Result
from mcm_jax.system import files, json_text
from mcm_jax.system.errors import InputError, printable, reason
from mcm_jax.system.paths import Path, resolved

# Config sections whose settings are read; the others are only compared.
_SECTIONS = ("data", "training")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conditions:
    """Everything that must be equal, besides the sampling seeds, for two distances to be comparable."""

    dataset: str
    resolution: int
    data_preprocessing: str
    num_samples: int
    parameters: str
    label_rule: str
    guidance: float
    features: records.Features
    reference: records.Reference

    @property
    def distance(self) -> str:
        """The name of the Frechet distance, without the number of samples."""
        return records.DISTANCES[self.features.network]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunResult(Result):
    """A result and the run that it belongs to."""

    run: str  # the run's directory, relative to the directory of all runs
    directory: Path

    @property
    def conditions(self) -> Conditions:
        """The conditions under which this result's distances are comparable."""
        return Conditions(
            dataset=self.dataset,
            resolution=self.resolution,
            data_preprocessing=self.data_preprocessing,
            num_samples=self.num_samples,
            parameters=self.parameters,
            label_rule=self.label_rule,
            guidance=self.sampling.guidance,
            features=self.features,
            reference=self.reference,
        )


@dataclasses.dataclass(frozen=True)
class RunDescription:
    """The content of a run's `run.json`: its training settings and its data set."""

    config: JsonObject
    dataset: JsonObject


@dataclasses.dataclass(frozen=True)
class Collection:
    """All results and runs in a directory; `notes` tell the reader what was omitted."""

    results: tuple[RunResult, ...]
    descriptions: dict[str, RunDescription]  # by run
    notes: tuple[str, ...]


def collect(runs: Path) -> Collection:
    """Reads every results file below `runs`, and the run.json of each run.

    A line truncated by a crash is skipped with a note; it stays in the file when the run is evaluated again.

    Raises:
      InputError: the directory does not exist or holds no results, or a file is otherwise damaged.
    """
    if not runs.is_dir():
        raise InputError(f"--runs={runs}: there is no such directory; give the one that holds your runs")
    results: list[RunResult] = []
    descriptions: dict[str, RunDescription] = {}
    notes: list[str] = []
    for path in files.find(runs, RESULTS):
        directory = path.parent.parent
        name = " ".join(str(directory.relative_to(runs)).split())
        name = resolved(runs).name if name == "." else name
        found, skipped = read_file(path)
        results += [RunResult(**vars(result), run=name, directory=directory) for result in found]
        notes += skipped
        described = [directory / file for file in (RUN_FILE, EXPORTED_FILE) if (directory / file).exists()]
        if described:
            descriptions[name] = read_run(described[0])
        else:
            notes.append(f"{name} has no {RUN_FILE}, so its training is unknown")
    if not results:
        raise InputError(
            f"--runs={runs}: there are no results in any {RESULTS} below it; "
            f"evaluate a run first: python -m mcm_jax.evaluate --workdir={runs}/RUN"
        )
    return Collection(tuple(results), descriptions, tuple(notes))


def read_file(path: Path) -> tuple[list[Result], list[str]]:
    """Returns the results in one file, oldest first, and a note for each truncated line.

    Raises:
      InputError: the file can't be read, or a line is otherwise damaged.
    """
    try:
        lines = files.read_lines(path)
    except OSError as error:
        raise InputError(f"{path} can't be read ({reason(error)})") from error
    results, notes = [], []
    for number, line in enumerate(lines, start=1):
        place = f"{printable(path)}:{number}"
        if not line.strip():
            continue
        try:
            results.append(Result.from_json(json_text.loads(line.decode())))
        except RecordError as error:
            raise InputError(
                f"{place}: {reason(error)}; remove that line and evaluate the run again"
            ) from error
        except ValueError as error:
            if not _is_truncated(line):
                raise InputError(
                    f"{place} is damaged ({reason(error)}); remove that line and evaluate the run again"
                ) from error
            notes.append(f"{place} is truncated and was skipped; evaluate that run again")
    return results, notes


def read_run(path: Path) -> RunDescription:
    """Reads a run.json, or the config.json of an exported model.

    Raises:
      InputError: the file can't be read or is damaged.
    """
    try:
        content = json_text.loads(files.read_bytes(path))
        config, dataset = content["config"], content["dataset"]
        sections = [config, dataset, *(config.get(name, {}) for name in _SECTIONS)]
        if not all(isinstance(section, dict) for section in sections):
            raise TypeError("config and dataset must be objects")
        config = upgraded(config)
    except OSError as error:
        raise InputError(f"{path} can't be read ({reason(error)})") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{printable(path)} is damaged ({reason(error)}); restore it") from error
    return RunDescription(config, dataset)


def read_grid(result: RunResult) -> bytes | None:
    """The PNG of the result's sample grid; None if the run's directory does not hold it."""
    directory = resolved(result.directory)
    try:
        path = resolved(directory / result.grid)
        # A pipe in place of the file would never end.
        if not (path.is_relative_to(directory) and path.is_file()):
            return None
        content = files.read_bytes(path)
        with images.naming(path), Image.open(io.BytesIO(content), formats=["PNG"]) as image:
            image.load()
    # ValueError: a path with a NUL, or an InputError of `naming`; RuntimeError: links in a circle.
    except (OSError, ValueError, RuntimeError):
        return None
    return content


def _is_truncated(line: bytes) -> bool:
    """Whether the line is the beginning of a JSON object without its end, as after a crash."""
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
