"""Groups comparable results and averages them over training seeds."""

import dataclasses
import json
import math
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path

from mcm_jax.records import OBJECTIVES, caption_score_of, count_of, student_sampler, with_count
from mcm_jax.reporting.results import Collection, Conditions, RunDescription, RunResult

# Settings that do not affect learning, or that each result states itself.
_NOT_LEARNED = {
    "": ("seed", "teacher_checkpoint", "mesh", "sampling"),
    "data": ("data_dir", "in_memory_gb", "max_corrupt_records"),
    "model": ("remat", "saved", "unroll", "attention"),
    "adm": ("remat", "attention"),
    "edm2": ("remat", "attention"),
    "training": (
        *("log_every_steps", "checkpoint_every_steps", "checkpoint_every_minutes", "keep_checkpoints"),
        *("keep_every_steps", "sample_every_steps", "metrics_to", "hang_minutes"),
    ),
}


@dataclasses.dataclass(frozen=True)
class Group:
    """Results that may share a table: they have equal conditions and equal sampling seeds."""

    conditions: Conditions
    seeds: tuple[int, ...]
    results: tuple[RunResult, ...]

    @property
    def distance(self) -> str:
        """The name of the distance over all samples."""
        return with_count(self.conditions.distance, self.conditions.num_samples)

    @property
    def distances(self) -> tuple[str, ...]:
        """The names of all distances, in descending order of sample count."""
        names = {name for result in self.results for name in result.metrics if count_of(name) is not None}
        return tuple(sorted(names, key=lambda name: -(count_of(name) or 0)))

    @property
    def caption_scores(self) -> tuple[str, ...]:
        """The names of all scores by captions, sorted."""
        names = {name for result in self.results for name in result.metrics}
        return tuple(sorted(name for name in names if caption_score_of(name) is not None))

    @property
    def rank_deficient(self) -> bool:
        """Whether any result's covariance was singular."""
        return any(result.rank_deficient for result in self.results)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over training seeds; its standard error is None if there is a single seed."""

    objective: str
    student_steps: int | None
    trained_for: tuple[int, ...] = ()  # all numbers of steps of a student of several
    steps: int
    sampler: str  # records.Sampling.label
    mean: float
    standard_error: float | None
    count: int
    runs: tuple[str, ...]

    @property
    def as_trained(self) -> bool:
        """Whether a student was sampled with the steps and the sampler that it was trained for."""
        return (self.steps, self.sampler) == (self.student_steps, student_sampler(self.objective))


def group(collection: Collection) -> tuple[list[Group], list[str]]:
    """Returns groups of comparable results, the largest first, and notes on omitted results.

    If the same samples were evaluated twice, the newest values count; of a run's checkpoints, the last one.
    """
    results, notes = _newest(collection.results), []
    last: dict[tuple[object, ...], int] = {}
    for result in results:
        last[_evaluated(result)] = max(last.get(_evaluated(result), 0), result.checkpoint_step)
    chosen = [result for result in results if result.checkpoint_step == last[_evaluated(result)]]
    for run in sorted({result.run for result in results if result not in chosen}):
        notes.append(f"{run} was evaluated at several checkpoints; only the last one is shown")
    seeds: dict[tuple[object, ...], set[int]] = {}
    for result in chosen:
        seeds.setdefault(_evaluated(result), set()).add(result.seed)
    members: dict[tuple[Conditions, tuple[int, ...]], list[RunResult]] = {}
    for result in chosen:
        members.setdefault((result.conditions, tuple(sorted(seeds[_evaluated(result)]))), []).append(result)
    groups = [
        Group(conditions, sampling_seeds, tuple(group_results))
        for (conditions, sampling_seeds), group_results in members.items()
    ]
    return sorted(groups, key=_order), notes


def _order(group: Group) -> tuple[object, ...]:
    """Sort key: larger groups first; the other fields make the order independent of the order of files."""
    c = group.conditions
    return (-len(group.results), c.dataset, c.resolution, c.num_samples, repr(c), group.seeds)


def estimates(
    group: Group, metric: str, descriptions: Mapping[str, RunDescription]
) -> tuple[list[Estimate], list[str]]:
    """Returns a metric's mean and standard error over training seeds, by objective and steps, and notes.

    Runs are averaged only if they differ in nothing but their seed: their settings in run.json, their
    teachers' settings, and the checkpoint steps must be equal. A run's value is its mean over sampling seeds.
    If two such runs also have equal training seeds, only the newest counts, with a note.
    """
    cells: dict[tuple[object, ...], dict[str, list[RunResult]]] = {}
    for result in group.results:
        if metric in result.metrics:
            kind = (OBJECTIVES.index(result.objective), result.student_steps or 0)
            sampling = (result.sampling.steps, result.sampling.label)
            key = (*kind, *sampling, result.checkpoint_step, _recipe(result.run, descriptions))
            cells.setdefault(key, {}).setdefault(result.run, []).append(result)
    notes, found = [], []
    for key in sorted(cells):
        by_seed: dict[int, str] = {}
        for run, results in sorted(cells[key].items(), key=lambda item: max(r.created for r in item[1])):
            seed = results[0].training_seed
            if seed in by_seed:
                notes.append(f"{by_seed[seed]} is omitted: {run} is the same training with the same seed")
            by_seed[seed] = run
        found.append(_estimate([cells[key][by_seed[seed]] for seed in sorted(by_seed)], metric))
    return found, notes


def _estimate(results: list[list[RunResult]], metric: str) -> Estimate:
    """Averages over runs; `results` has one list of results per run."""
    values = [statistics.fmean(result.metrics[metric] for result in of_run) for of_run in results]
    first = results[0][0]
    return Estimate(
        objective=first.objective,
        student_steps=first.student_steps,
        trained_for=first.trained_for,
        steps=first.sampling.steps,
        sampler=first.sampling.label,
        mean=statistics.fmean(values),
        standard_error=standard_error(values),
        count=len(values),
        runs=tuple(of_run[0].run for of_run in results),
    )


def standard_error(values: list[float]) -> float | None:
    """The standard error sqrt(sum (v - mean)^2 / (n - 1) / n) of a mean; None if n < 2."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def bounds(group: Group) -> dict[str, tuple[float, float]]:
    """The lowest and highest value of each floor and ceiling in the group.

    The two differ if a bound depends on more than the conditions, such as the untrained network's score.
    """
    values: dict[str, list[float]] = {}
    for result in group.results:
        for name, value in result.bounds.items():
            values.setdefault(name, []).append(value)
    return {name: (min(several), max(several)) for name, several in sorted(values.items())}


def grids(group: Group) -> dict[int, list[RunResult]]:
    """The results whose sample grids use the same noise, by training seed; sorted by objective and steps.

    All of them use the group's first sampling seed.
    """
    same_noise = [result for result in group.results if result.seed == group.seeds[0]]
    same_noise.sort(
        key=lambda r: (
            *(OBJECTIVES.index(r.objective), r.student_steps or 0),
            *(r.sampling.steps, r.sampling.label, r.run),
        )
    )
    by_seed: dict[int, list[RunResult]] = {}
    for result in same_noise:
        by_seed.setdefault(result.training_seed, []).append(result)
    return dict(sorted(by_seed.items()))


def _evaluated(result: RunResult) -> tuple[object, ...]:
    """A key for what was evaluated and how, without the checkpoint and the sampling seed."""
    return (result.run, result.conditions, result.sampling.steps, result.sampling.label)


def _newest(results: Iterable[RunResult]) -> list[RunResult]:
    """Merges results that differ only in their date or in the requested metrics, and preserves their order.

    The newest value of each metric and bound counts.
    """
    same: dict[tuple[object, ...], list[RunResult]] = {}
    for result in results:
        same.setdefault((*_evaluated(result), result.checkpoint_step, result.seed), []).append(result)
    merged = []
    for repeated in same.values():
        repeated.sort(key=lambda result: result.created)
        metrics = {name: value for result in repeated for name, value in result.metrics.items()}
        bounds = {name: value for result in repeated for name, value in result.bounds.items()}
        merged.append(dataclasses.replace(repeated[-1], metrics=metrics, bounds=bounds))
    return merged


def _recipe(run: str, descriptions: Mapping[str, RunDescription]) -> str:
    """All settings that influence what the run learned, except seeds, as text; "" if unknown.

    They include the settings of its teacher, the teacher's teacher, and so on.
    """
    if run not in descriptions:
        return ""
    teacher = descriptions[run].config.get("teacher_checkpoint")
    if teacher is not None:
        # The path is relative to the directory in which training was started, so only its last part is
        # reliable. The stages of a training are siblings and have the same names in every training.
        found = [name for name in descriptions if Path(name).name == Path(str(teacher)).name and name != run]
        siblings = [name for name in found if Path(name).parent == Path(run).parent]
        recipes = {_recipe(name, descriptions) for name in siblings or found}
        teacher = recipes.pop() if len(recipes) == 1 else str(teacher)
    return json.dumps([_settings(descriptions[run]), teacher])


def _settings(run: RunDescription) -> str:
    config = {name: value for name, value in run.config.items() if name not in _NOT_LEARNED[""]}
    for section, names in _NOT_LEARNED.items():
        if isinstance(config.get(section), dict):
            config[section] = {k: v for k, v in config[section].items() if k not in names}
    return json.dumps([config, run.dataset.get("fingerprints")], sort_keys=True)
