"""Results grouped by what may be compared, and averaged over training seeds."""

import dataclasses
import json
import math
import re
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mcm_jax.reporting.results import DISTANCES, OBJECTIVES, Collection, Conditions, Result, Run

# Settings that do not change what is learned, or that a result states itself.
_NOT_LEARNED = {
    "": ("seed", "teacher_checkpoint", "mesh", "sampling"),
    "data": ("data_dir",),
    "model": ("remat", "saved", "unroll", "attention"),
    "training": ("log_every_steps", "checkpoint_every_steps", "keep_checkpoints", "sample_every_steps"),
}


_COUNTED = re.compile(
    rf"(test_images_|untrained_network_)?({'|'.join(DISTANCES.values())})_(?P<count>50k|[0-9]+)"
)


@dataclasses.dataclass(frozen=True)
class Group:
    """Results that may stand in one table: equal conditions, and every run sampled with the same seeds."""

    conditions: Conditions
    seeds: tuple[int, ...]
    results: tuple[Result, ...]

    @property
    def distance(self) -> str:
        """Name of the distance of all samples."""
        count = self.conditions.num_samples
        return f"{self.conditions.distance}_{'50k' if count == 50_000 else count}"

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
    found = _COUNTED.fullmatch(name)
    if found is None:
        return None
    return 50_000 if found.group("count") == "50k" else int(found.group("count"))


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


def _evaluated(result: Result) -> tuple[Any, ...]:
    """What was evaluated and how, but for checkpoint and sampling seed."""
    return (result.run, result.conditions, result.steps, result.sampler)


def _newest(results: Iterable[Result]) -> list[Result]:
    """Results that differ in their date or in what was asked for as one, in the order they were read.

    Of every number the newest counts.
    """
    same: dict[Any, list[Result]] = {}
    for result in results:
        same.setdefault((*_evaluated(result), result.checkpoint_step, result.seed), []).append(result)
    kept = []
    for ones in same.values():
        ones.sort(key=lambda one: one.created)
        metrics = {name: value for one in ones for name, value in one.metrics.items()}
        bounds = {name: value for one in ones for name, value in one.bounds.items()}
        kept.append(dataclasses.replace(ones[-1], metrics=metrics, bounds=bounds))
    return kept


def _recipe(run: str, runs: Mapping[str, Run]) -> str:
    """All settings that influence what the run learned, but for the seeds, as text; "" if not known.

    Those of its teacher are part of it, and of the teacher's teacher.
    """
    if run not in runs:
        return ""
    teacher = runs[run].config.get("teacher_checkpoint")
    if teacher is not None:
        # Recorded as seen from where the training was started, so that only its name can be relied on. Stages
        # of one training stand side by side and have the same names in every training.
        found = [name for name in runs if Path(name).name == Path(str(teacher)).name and name != run]
        siblings = [name for name in found if Path(name).parent == Path(run).parent]
        there = {_recipe(name, runs) for name in siblings or found}
        teacher = there.pop() if len(there) == 1 else str(teacher)
    return json.dumps([_settings(runs[run]), teacher])


def _settings(run: Run) -> str:
    config = {name: value for name, value in run.config.items() if name not in _NOT_LEARNED[""]}
    for section, names in _NOT_LEARNED.items():
        if section in config:
            config[section] = {k: v for k, v in config[section].items() if k not in names}
    return json.dumps([config, run.dataset.get("fingerprints")], sort_keys=True)
