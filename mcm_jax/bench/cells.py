"""Cells: small measurements, each stored as soon as it finishes, so that an interrupted bench can resume."""

import dataclasses
import datetime
import json
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import ml_collections

from mcm_jax.diffusion.sampling import Sampler
from mcm_jax.fields import Settings
from mcm_jax.records import JsonObject
from mcm_jax.system import json_text, versions
from mcm_jax.system.errors import InputError, reason, shortened
from mcm_jax.system.files import append_line, read_lines
from mcm_jax.system.paths import Path

Values = dict[str, float]
# Config fields and values, such as ("consistency.xvar_frac", 0.0).
Overrides = tuple[tuple[str, object], ...]

RESULTS = "results.jsonl"
# The JSON key of a problem.
_PROBLEM = "setting"


@dataclasses.dataclass(frozen=True)
class Cell:
    """One model of one problem, and how it is sampled.

    Attributes:
      problem: name of the problem.
      system: cd, ct or progressive: a student. diffusion: the diffusion model from which a mixture's students
        start. teacher: the model that students distil: a mixture's closed-form denoiser, or OpenMoji's
        trained diffusion model. data: new samples of a mixture.
      steps: the student's steps; for the other systems, the sampler's.
      seed: training and sampling seed.
      overrides: config fields that differ from the problem's, such as ("consistency.xvar_frac", 0.0).
      sampler: the sampler of the evaluation.
    """

    problem: str
    system: str
    steps: int
    seed: int
    overrides: Overrides = ()
    sampler: Sampler = "ddim"

    @property
    def label(self) -> str:
        """A unique, readable name: one word for everything that distinguishes the cell from others."""
        changed = [f"{name.rsplit('.', 1)[-1]}={value}" for name, value in self.overrides]
        sampler = [] if self.sampler == "ddim" else [self.sampler]
        return " ".join([self.problem, self.system, str(self.steps), *sampler, *changed, f"seed {self.seed}"])

    @property
    def shared(self) -> Overrides:
        """The overrides that a student's teacher must have too: the noise schedule and its embedding."""
        return tuple(
            (name, value)
            for name, value in self.overrides
            if name.startswith("schedule.") or name == "model.noise_scale"
        )

    def override(self, config: ml_collections.ConfigDict) -> None:
        """Sets the overridden fields in `config`."""
        for name, value in self.overrides:
            section, field = name.split(".")
            setattr(getattr(config, section), field, value)

    def to_json(self) -> dict[str, object]:
        """The cell as a JSON object."""
        fields = dataclasses.asdict(self)
        return {_PROBLEM: fields.pop("problem"), **fields}

    @classmethod
    def from_json(cls, content: JsonObject) -> "Cell":
        """The inverse of `to_json`; raises KeyError, TypeError or ValueError if `content` is not a cell."""
        fields = dict(content)
        overrides = tuple((name, _hashable(value)) for name, value in fields.pop("overrides"))
        return cls(problem=fields.pop(_PROBLEM), overrides=overrides, **fields)


class Store:
    """A JSON-lines file of finished cells."""

    def __init__(self, path: Path, problems: Mapping[str, Settings]):
        """Reads the file if it exists.

        Args:
          problems: name -> a dataclass that determines how the problem's cells are measured.

        Raises:
          InputError: the file holds something else, or results of another problem with the same name, such as
            results of a quick run.
        """
        self.path = path
        self._problems = {
            name: json.loads(json.dumps(dataclasses.asdict(problem))) for name, problem in problems.items()
        }
        self._values: dict[Cell, Values] = {}
        self.seconds: dict[Cell, float] = {}
        if not path.exists():
            return
        try:
            lines = read_lines(path)
        except OSError as error:
            raise InputError(f"{path} can't be read ({reason(error)}); choose another --out") from error
        for number, line in enumerate(lines, start=1):
            try:
                record = json_text.loads(line)
            except ValueError:
                continue  # Truncated by a crash; the cell will be measured again.
            self._read(record, place=f"{path}:{number}")

    def _read(self, record: Any, *, place: str) -> None:
        try:
            cell, problem, seconds = (
                Cell.from_json(record["cell"]),
                record[_PROBLEM],
                float(record["seconds"]),
            )
            values = {name: float(value) for name, value in record["values"].items()}
            values["distance"]  # Every cell must have one.
            hash(cell)  # Fails if a field is a list.
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{place} is not a result of the bench ({reason(error)}); remove it") from error
        if problem != self._problems.get(cell.problem, problem):
            raise InputError(
                f"{place} was measured with {shortened(str(problem))}, but the problem is now "
                f"{self._problems[cell.problem]}; choose another --out"
            )
        self._values[cell], self.seconds[cell] = values, seconds

    def __contains__(self, cell: Cell) -> bool:
        return cell in self._values

    def __getitem__(self, cell: Cell) -> Values:
        return self._values[cell]

    def add(self, cell: Cell, values: Values, *, seconds: float) -> None:
        """Stores a cell's values; a crash never leaves only a part of them."""
        record = {
            "cell": cell.to_json(),
            _PROBLEM: self._problems[cell.problem],
            "values": values,
            "seconds": round(seconds, 2),
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "versions": versions.record("jax", "flax", "mcm_jax"),
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        append_line(self.path, record)
        self._values[cell], self.seconds[cell] = values, seconds


def _hashable(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def run(cells: Iterable[Cell], store: Store, measure: Callable[[Cell], Values]) -> None:
    """Measures each cell that the store does not hold, in the given order, and prints its values."""
    cells = list(dict.fromkeys(cells))
    left = [cell for cell in cells if cell not in store]
    if len(left) < len(cells):
        print(f"{len(cells) - len(left)} of {len(cells)} cells are already done", flush=True)
    started = time.monotonic()
    for number, cell in enumerate(left, start=1):
        start = time.monotonic()
        values = measure(cell)
        store.add(cell, values, seconds=time.monotonic() - start)
        spent = time.monotonic() - started
        text = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        minutes = spent / number * (len(left) - number) / 60
        print(f"{number}/{len(left)}  {cell.label}: {text}  ({minutes:.0f} min left)", flush=True)
