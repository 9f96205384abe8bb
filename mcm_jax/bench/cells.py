"""Cells: small runs whose results are stored as they end, so that a bench resumes."""

import dataclasses
import datetime
import json
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_collections

from mcm_jax.system import software
from mcm_jax.system.errors import InputError
from mcm_jax.system.files import append_line

Values = dict[str, float]


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run and how it is sampled.

    `overrides` are fields of the config that differ from the setting's, as ("consistency.xvar_frac", 0.0).
    """

    setting: str
    system: str  # an objective, or "exact": the closed-form denoiser, which nobody trains
    steps: int  # of the student, or of the sampler of a model of all of time
    seed: int
    overrides: tuple[tuple[str, Any], ...] = ()
    sampler: str = "ddim"

    @property
    def label(self) -> str:
        """One word for each thing that tells it from other cells, for people and for directories."""
        changed = [f"{name.rsplit('.', 1)[-1]}={value}" for name, value in self.overrides]
        sampler = [] if self.sampler == "ddim" else [self.sampler]
        return " ".join([self.setting, self.system, str(self.steps), *sampler, *changed, f"seed {self.seed}"])

    @property
    def schedule(self) -> tuple[tuple[str, Any], ...]:
        """The overrides of the noise schedule, which a student's teacher must share."""
        return tuple((name, value) for name, value in self.overrides if name.startswith("schedule."))

    def override(self, config: ml_collections.ConfigDict) -> None:
        """Sets the overrides' fields."""
        for name, value in self.overrides:
            section, field = name.split(".")
            config[section][field] = value


class Store:
    """A JSON-lines file of finished cells."""

    def __init__(self, path: Path, settings: Mapping[str, Any]):
        """settings: by name; each a dataclass that says how its cells are measured.

        Raises:
          InputError: the file is none of ours, or has results of another setting of the same name, such as
            those of a quick run.
        """
        self.path = path
        self._settings = {
            name: json.loads(json.dumps(dataclasses.asdict(setting))) for name, setting in settings.items()
        }
        self._values: dict[Cell, Values] = {}
        self.seconds: dict[Cell, float] = {}
        if not path.exists():
            return
        try:
            lines = path.read_text().splitlines()
        except OSError as error:
            raise InputError(f"{path} can't be read ({error.strerror}); choose another --out") from error
        for number, line in enumerate(lines, start=1):
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue  # Cut off by a crash: its cell is measured again.
            try:
                fields = record["cell"]
                overrides = tuple((name, _hashable(value)) for name, value in fields.pop("overrides"))
                cell = Cell(overrides=overrides, **fields)
                values, seconds, setting = record["values"], float(record["seconds"]), record["setting"]
                values = {name: float(value) for name, value in values.items()}
                values["distance"]  # all cells have it
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise InputError(f"{path}:{number} is no result of the bench ({error}); remove it") from error
            if setting != self._settings.get(cell.setting, setting):
                raise InputError(
                    f"{path}:{number} was measured with {setting}, now it would be "
                    f"{self._settings[cell.setting]}; choose another --out"
                )
            self._values[cell], self.seconds[cell] = values, seconds

    def __contains__(self, cell: Cell) -> bool:
        return cell in self._values

    def __getitem__(self, cell: Cell) -> Values:
        return self._values[cell]

    def add(self, cell: Cell, values: Values, *, seconds: float) -> None:
        """Stores one more; complete or absent in the file."""
        record = {
            "cell": dataclasses.asdict(cell),
            "setting": self._settings[cell.setting],
            "values": values,
            "seconds": round(seconds, 2),
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "versions": software.versions("jax", "flax", "mcm_jax"),
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        append_line(self.path, record)
        self._values[cell], self.seconds[cell] = values, seconds


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def run(cells: Iterable[Cell], store: Store, measure: Callable[[Cell], Values]) -> None:
    """Measures every cell that the store lacks, in the order given; tells each as it ends."""
    cells = list(dict.fromkeys(cells))
    left = [cell for cell in cells if cell not in store]
    if len(left) < len(cells):
        print(f"{len(cells) - len(left)} of {len(cells)} cells are done already", flush=True)
    started = time.monotonic()
    for number, cell in enumerate(left, start=1):
        start = time.monotonic()
        values = measure(cell)
        store.add(cell, values, seconds=time.monotonic() - start)
        spent = time.monotonic() - started
        told = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        minutes = spent / number * (len(left) - number) / 60
        print(f"{number}/{len(left)}  {cell.label}: {told}  ({minutes:.0f} min left)", flush=True)
