"""Scores samples of a run, or images from other programs, against a reference."""

import copy
import dataclasses
import datetime
import functools
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mcm_jax import fields, records
from mcm_jax.config.settings import Config
from mcm_jax.data import layout, pipeline
from mcm_jax.evaluation import caption_scores as scores_by_captions
from mcm_jax.evaluation import captioned, image_files, protocol, published
from mcm_jax.evaluation.features import Extractor, FeatureNetwork
from mcm_jax.evaluation.references import VERSION, Blocks, Cache, Reference, content_hash
from mcm_jax.evaluation.unfinished import Arrays, Unfinished
from mcm_jax.fields import Affects
from mcm_jax.records import (
    RESULTS,
    ImagesResult,
    JsonObject,
    Measurement,
    Result,
    SamplingOptions,
)
from mcm_jax.runs import workdirs
from mcm_jax.system import distributed, json_text, progress, versions
from mcm_jax.system.errors import InputError
from mcm_jax.system.files import append_line, read_lines
from mcm_jax.system.paths import Path, as_path, resolved
from mcm_jax.system.pictures import image_grid, save_png

if TYPE_CHECKING:
    from mcm_jax.runs.run import Run  # Slow to import.

# Number of samples in memory at a time, which bounds memory for any total number of samples.
_BLOCK = 1024
_GRID_IMAGES, _GRID_COLUMNS = 64, 8
# Smallest side of a sample in the grid, in pixels.
_GRID_TILE = 48


@dataclasses.dataclass(frozen=True)
class SampleRequest:
    """Which samples to draw: their number, their seed, and further arguments of `runs.run.Run.sample`."""

    num: int
    seed: int = 0
    untrained_num: int = 0  # number of samples from the untrained network; 0: none
    caption_split: str | None = None  # split from which captions are drawn; None: test
    settings: SamplingOptions = dataclasses.field(default_factory=SamplingOptions)


class Evaluator:
    """Computes results that share a feature network, references and metrics.

    Several processes sample and extract features together, and each process holds all features: summing over
    them is a small part of the work and gives the same sums in every process. Only the first process writes.
    """

    def __init__(
        self,
        network: FeatureNetwork,
        metrics: Sequence[str],
        cache_dir: Path,
        *,
        explicit: bool = False,
        reference: Path | None = None,
        reference_split: str = "train",
        caption_scores: captioned.CaptionScores | None = None,
    ):
        """Computes or loads the reference, if one is given.

        Args:
          explicit: the user named the metrics, so a metric that the reference does not support is an error;
            unsupported default metrics are omitted with a note instead.
          caption_scores: those of runs on captions; None: without a CLIP score.
          reference: a published file, or the directory of a prepared data set; None: each run's own data set.

        Raises:
          InputError: the reference does not exist, or was computed with other features.
        """
        self.metrics, self._explicit = [name for name in protocol.METRICS if name in metrics], explicit
        self.extractor, self.cache = Extractor(network), Cache(cache_dir)
        self._omitted: set[tuple[str, str]] = set()
        self._references: dict[tuple[str | int, ...], Reference] = {}
        self.caption_scores = caption_scores or captioned.CaptionScores(metrics, explicit=explicit)
        self.given: Reference | None = None
        if reference is not None and reference.is_dir():
            self.given = self._prepared(reference, reference_split)
        elif reference is not None:
            single_images = not set(protocol.OF_SINGLE_IMAGES).isdisjoint(self.metrics)
            self.given = published.read(reference, self.extractor, self.cache, single_images=single_images)

    def stored(self, run: "Run", measurement: Measurement) -> Result | None:
        """The newest result of this measurement in the run's file; None if there is none."""
        try:
            lines = read_lines(workdir_of(run) / RESULTS)
        except FileNotFoundError:
            return None
        for line in reversed(lines):
            try:
                result = Result.from_json(json_text.loads(line))
            # A line that a crash truncated or an older version wrote raises ValueError.
            except ValueError:
                continue
            if result.same_measurement(measurement):
                return result
        return None

    def measurement(self, run: "Run", parameters: str, request: SampleRequest) -> Measurement:
        """Everything that a result of these samples depends on.

        Raises:
          InputError: the user named a metric that the reference does not support.
        """
        reference, scores = self._compared(run), self.caption_scores.of(run.dataset, self.extractor)
        self.require(reference)
        comparison = self._comparison(reference)
        comparison["asked"] += tuple(score.name for score in scores if score.name not in self.metrics)
        sampling = run.sampling(**request.settings)
        return Measurement(
            version=VERSION,
            workdir=resolved(workdir_of(run)).name,
            objective=run.objective,
            dataset=run.dataset.dataset,
            resolution=run.dataset.resolution,
            data_preprocessing=run.dataset.preprocessing,
            training_seed=run.seed,
            origin=run.origin,
            guide_origin=run.guide_origin(sampling),
            student_steps=_as_trained(run.config, sampling.steps),
            trained_for=run.student_steps if len(run.student_steps) > 1 else (),
            checkpoint_step=run.checkpoint_step,
            checkpoint=workdirs.checkpoint_identity(workdir_of(run), run.checkpoint_step),
            parameters=parameters,
            label_rule=run.label_rule(request.caption_split),
            seed=request.seed,
            sampling=sampling,
            num_samples=request.num,
            untrained_num=request.untrained_num,
            caption_scores=tuple(f"{score.name} {score.sha256}" for score in scores),
            **comparison,
        )

    def _comparison(self, reference: Reference) -> JsonObject:
        """The fields of a measurement that state what is compared with what."""
        return {
            "asked": tuple(self.metrics),
            "features": records.Features(**self.extractor.network.description),
            "reference": records.Reference(**reference.description),
        }

    def require(self, reference: Reference, *, labelled: bool = True) -> None:
        """Raises InputError if the user named a metric that the reference or the images do not support.

        An unsupported default metric is omitted with a note.
        """
        for metric in self.metrics:
            reason = protocol.unavailable_reason(metric, reference, labelled=labelled)
            if reason is not None and self._explicit:
                raise InputError(f"--metrics={metric}: {reason}; omit it or use another reference")
            if reason is not None and (metric, reason) not in self._omitted:
                distributed.say(f"note: {metric} is omitted: {reason}")
                self._omitted.add((metric, reason))

    def score(
        self, run: "Run", measurement: Measurement, request: SampleRequest, *, again: bool = False
    ) -> Result:
        """Samples a run and scores the samples; appends the result to the run's file and saves a sample grid.

        Resumes an interrupted call of the same measurement; with `again` it starts over.
        """
        workdir, reference, test = workdir_of(run), self._compared(run), None
        if self.given is None and run.dataset.num_examples.get("test", 0) >= 2:
            test = self._reference(run.dataset, "test", run.blocks)
        also_first = 0 if test is None else test.count or 0
        tally = protocol.Tally(
            self.extractor,
            reference,
            num=request.num,
            metrics=measurement.asked,
            also_first=also_first,
            caption_scores=self.caption_scores.of(run.dataset, self.extractor),
        )
        # Everything that the accumulated sums depend on.
        identity = {**measurement.to_json(), "also_first": also_first, "versions": _versions()}
        unfinished = Unfinished(workdir / RESULTS.parent / f"unfinished_{content_hash(identity)[:16]}.npz")
        if again:
            unfinished.finish()
        seconds, first_images = _sample_into(tally, run, request, unfinished)
        scores = tally.scores()
        grid = RESULTS.parent / grid_name(measurement)
        if distributed.is_first():
            scale = -(-_GRID_TILE // first_images.shape[1])
            save_png(image_grid(first_images, _GRID_COLUMNS, scale=scale), workdir / grid)
        bounds = {} if self.given else self._bounds(run, measurement, request, reference, test)
        bounds |= self._caption_bounds(run, request)
        result = Result(
            **vars(measurement),
            **_outcome(scores, bounds),
            grid=str(grid),
            sampling_seconds=round(seconds, 3),
        )
        if distributed.is_first():
            append_line(workdir / RESULTS, result.to_json())
        unfinished.finish()
        return result

    def _compared(self, run: "Run") -> Reference:
        return self.given or self._reference(run.dataset, "train", run.blocks)

    def _bounds(
        self,
        run: "Run",
        measurement: Measurement,
        request: SampleRequest,
        reference: Reference,
        test: Reference | None,
    ) -> dict[str, float]:
        num = min(request.untrained_num, request.num)

        def untrained() -> Blocks:
            yield run.untrained().sample(
                num, seed=request.seed, caption_split=request.caption_split, **request.settings
            )

        return protocol.floors_and_ceilings(
            self.extractor,
            self.cache,
            reference=reference,
            reference_images=lambda: run.blocks("train"),
            test=test,
            untrained_images=untrained,
            untrained_num=num,
            untrained_identity=_untrained_identity(run, measurement),
        )

    def _caption_bounds(self, run: "Run", request: SampleRequest) -> dict[str, float]:
        split, found, encoding = request.caption_split or "test", {}, run.dataset.encoding
        for score in self.caption_scores.of(run.dataset, self.extractor):
            identity = {
                "bound": score.name,
                "score": score.sha256,
                "images": run.dataset.fingerprints[split],
                "captions": None if encoding is None else encoding.captions_sha256,
            }
            found |= self.cache.numbers(
                identity, functools.partial(scores_by_captions.bounds, score, run.dataset, split)
            )
        return found

    def score_images(self, images: image_files.ImageFiles) -> ImagesResult:
        """Scores images that were made elsewhere, against the reference given to the constructor."""
        if self.given is None:
            raise ValueError("there is no reference to compare images with")
        self.require(self.given, labelled=images.has_labels)
        scores = protocol.evaluate_samples(
            images.blocks(_BLOCK), self.extractor, self.given, num=images.num, metrics=self.metrics
        )
        return ImagesResult(
            **images.description,
            num_samples=images.num,
            **self._comparison(self.given),
            **_outcome(scores, {}),
        )

    def _prepared(self, directory: Path, split: str) -> Reference:
        """The reference computed from a split of the prepared data set in `directory`."""
        try:
            info = layout.read_summary(directory)
        except (OSError, ValueError) as error:
            raise InputError(
                f"--reference={directory} is not a prepared data set ({error}); give the directory that "
                f"holds {layout.SUMMARY_FILE}"
            ) from error
        place = {"dataset": info.dataset, "resolution": info.resolution}
        parents = resolved(directory).parents
        data_dir = parents[2] if len(parents) > 2 else directory
        if resolved(layout.dataset_dir(data_dir, **place)) != resolved(directory):
            raise InputError(
                f"--reference={directory}: {info.dataset} at {info.resolution} must lie in "
                f"DIR/{layout.dataset_dir('', **place)}; move it back there"
            )
        if split not in info.fingerprints:
            raise InputError(
                f"--reference_split={split}: {directory} has only {', '.join(info.fingerprints)}; choose one "
                "of these"
            )

        def blocks(split: str) -> Blocks:
            return pipeline.blocks(pipeline.open_split(data_dir=data_dir, **place, split=split))

        return self._reference(info, split, blocks)

    def _reference(self, info: layout.DatasetInfo, split: str, blocks: Callable[[str], Blocks]) -> Reference:
        identity = {
            "fingerprint": info.fingerprints[split],
            "dataset": info.dataset,
            "resolution": info.resolution,
            "preprocessing": str(info.preprocessing),
        }
        # Load each reference only once: with its features it can be as large as all samples.
        key = (split, *identity.values())
        if key not in self._references:
            count = -(-info.num_examples[split] // pipeline.BLOCK)
            reference = self.cache.reference(
                self.extractor,
                split=split,
                identity=identity,
                images=lambda: progress.bar(blocks(split), f"features of {split} images", total=count),
            )
            dataset = {"dataset": info.dataset, "resolution": info.resolution}
            self._references[key] = dataclasses.replace(
                reference, description={**dataset, **reference.description}
            )
        return self._references[key]


def workdir_of(run: "Run") -> Path:
    """The directory that holds the run's results; raises ValueError for a run without a directory."""
    if run.workdir is None:
        raise ValueError("a run without a directory has no place for results")
    return as_path(run.workdir)


def _outcome(scores: protocol.Scores, bounds: dict[str, float]) -> JsonObject:
    """The fields of a `records.Outcome`."""
    return {
        "metrics": scores.metrics,
        "bounds": bounds,
        "rank_deficient": scores.rank_deficient,
        "features_seconds": round(scores.features_seconds, 3),
        "created": datetime.datetime.now(datetime.UTC).replace(microsecond=0),
        "versions": _versions(),
    }


def _versions() -> dict[str, str]:
    return versions.record("jax", "flax", "mcm_jax")


def _as_trained(config: Config, steps: int) -> int | None:
    """The number of steps that a student sampled with `steps` was trained for; None: it is no student.

    A flow map was trained for any.
    """
    trained = config.student_steps or (steps,)
    return (steps if steps in trained else max(trained)) if config.is_student else None


def grid_name(measurement: Measurement) -> str:
    """The file name of the sample grid; contains every sampling setting that differs from the usual one."""
    sampling = measurement.sampling
    words = [f"samples_step{measurement.checkpoint_step}", measurement.parameters]
    words.append(f"{sampling.sampler}{sampling.steps}")
    words += [
        sampling.grid_name if name == "noise_grid" else str(getattr(sampling, name))
        for name in sampling.unusual
    ]
    words += [f"g{sampling.guidance:g}"] if sampling.guidance else []
    words += [measurement.label_rule] if measurement.label_rule == "heldout_captions" else []
    return "_".join([*words, f"seed{measurement.seed}.png"])


def _sample_into(
    tally: protocol.Tally, run: "Run", request: SampleRequest, unfinished: Unfinished
) -> tuple[float, np.ndarray]:
    """Adds the run's samples to the tally, saving progress and resuming an interrupted evaluation.

    Returns:
      (seconds spent on sampling, the first images).
    """

    def check(arrays: Arrays) -> None:
        copy.copy(tally).restore(arrays)
        _ = arrays["seconds"], arrays["first_images"]

    seconds, first_images = 0.0, np.zeros((0,), np.uint8)
    arrays = unfinished.read(check)
    if arrays is not None:
        tally.restore(arrays)
        seconds, first_images = float(arrays["seconds"]), arrays["first_images"]
        distributed.say(f"continuing an interrupted evaluation after {tally.count} samples")
    for first in progress.bar(range(tally.count, request.num, _BLOCK), "samples and their features"):
        start = time.monotonic()
        num = min(_BLOCK, request.num - first)
        drawn: dict[str, Any] = {"seed": request.seed, "first": first, "caption_split": request.caption_split}
        images, labels = run.sample(num, **drawn, **request.settings)
        seconds += time.monotonic() - start
        if first == 0:
            first_images = images[:_GRID_IMAGES].copy()
        tally.update(images, labels, run.drawn_captions(num, **drawn) if tally.needs_captions else None)
        also = {"seconds": np.array(seconds), "first_images": first_images}
        unfinished.save_if_due(lambda also=also: tally.arrays() | also)
    return seconds, first_images


def _untrained_identity(run: "Run", measurement: Measurement) -> JsonObject:
    """Everything that samples of the untrained network depend on; runs with equal settings share results."""
    config = fields.flat(run.config, Affects.SAMPLES) | {"training_seed": run.config.seed}
    sampled = {"label_rule": measurement.label_rule, **measurement.sampling.to_json()}
    return {"config": config, "dataset": run.config.data.dataset, "seed": measurement.seed, **sampled}
