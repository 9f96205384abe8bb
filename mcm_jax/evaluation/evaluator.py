"""Results: samples of a run, or images from elsewhere, scored against a reference and kept."""

import copy
import dataclasses
import datetime
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mcm_jax.data import layout, pipeline
from mcm_jax.evaluation import image_files, protocol, published
from mcm_jax.evaluation.features import Extractor, FeatureNetwork
from mcm_jax.evaluation.references import VERSION, Blocks, Cache, Reference, content_hash
from mcm_jax.evaluation.unfinished import Arrays, Unfinished
from mcm_jax.runs import workdirs
from mcm_jax.system import distributed, progress, software
from mcm_jax.system.errors import InputError
from mcm_jax.system.files import append_line
from mcm_jax.system.pictures import image_grid, save_png

RESULTS = Path("evaluation") / "results.jsonl"
_TRAINING_ONLY = (
    *("objective", "teacher_checkpoint", "teacher_guidance", "diffusion", "consistency", "optimizer"),
    *("training", "mesh"),
)
# Samples held at a time: bounds memory at any number.
_BLOCK = 1024
_GRID_IMAGES, _GRID_COLUMNS = 64, 8
# Smallest side a sample is drawn at in the grid.
_GRID_TILE = 48


@dataclasses.dataclass(frozen=True)
class Draws:
    """How many samples, of which seed, and how many of the untrained network (0: none)."""

    num: int
    seed: int = 0
    untrained_num: int = 0


class Evaluator:
    """What all results of one command share: the feature network, the references, the metrics.

    Several processes sample and extract features together, and each has all features: the sums over them are
    a small part of the work, and equal in all. The first one writes.
    """

    def __init__(
        self,
        network: FeatureNetwork,
        metrics: Sequence[str],
        cache_dir: Path,
        *,
        asked: bool = False,
        reference: Path | None = None,
        reference_split: str = "train",
    ):
        """Where no reference is given, computes nothing yet.

        Args:
          asked: the metrics were asked for: one that a reference can't give is the user's mistake.
          reference: a published file, or directory of a prepared data set; None: every run's own data set.

        Raises:
          InputError: there is no such reference, or it is of other features.
        """
        self.metrics, self._asked = [name for name in protocol.METRICS if name in metrics], asked
        self.extractor, self.cache = Extractor(network), Cache(cache_dir)
        self._references: dict[tuple[Any, ...], Reference] = {}
        self.given: Reference | None = None
        if reference is not None and reference.is_dir():
            self.given = self._prepared(reference, reference_split)
        elif reference is not None:
            single_images = not set(protocol.OF_SINGLE_IMAGES).isdisjoint(self.metrics)
            self.given = published.read(reference, self.extractor, single_images=single_images)

    def stored(self, run: Any, inputs: dict[str, Any]) -> dict[str, Any] | None:
        """The newest result of these inputs in the run's file."""
        workdir = Path(run.workdir)
        try:
            lines = (workdir / RESULTS).read_bytes().split(b"\n")
        except FileNotFoundError:
            return None
        # As they come back from the file: tuples are lists there.
        inputs = json.loads(json.dumps(inputs))
        for line in reversed(lines):
            try:
                record = json.loads(line)
                if all(record[name] == value for name, value in inputs.items()):
                    return record
            except (ValueError, KeyError, TypeError):  # Cut off, or of an older version.
                continue
        return None

    def inputs(self, run: Any, parameters: str, draws: Draws, how: dict[str, Any]) -> dict[str, Any]:
        """All that a result depends on, as the record says it.

        Raises:
          InputError: a metric was asked for that the reference can't give.
        """
        reference = self._compared(run)
        self.require(reference)
        return {
            "version": VERSION,
            "workdir": Path(run.workdir).resolve().name,
            "objective": run.objective,
            "dataset": run.dataset.dataset,
            "resolution": run.dataset.resolution,
            "data_preprocessing": run.dataset.preprocessing,
            "training_seed": run.seed,
            "student_steps": run.student_steps,
            "checkpoint_step": run.checkpoint_step,
            "checkpoint": workdirs.checkpoint_identity(Path(run.workdir), run.checkpoint_step),
            "parameters": parameters,
            "label_rule": run.label_rule,
            "seed": draws.seed,
            **run.sampling_record(**how),
            "num_samples": draws.num,
            "untrained_num": draws.untrained_num,
            "asked": self.metrics,
            "features": self.extractor.network.description,
            "reference": reference.description,
        }

    def require(self, reference: Reference, *, labelled: bool = True) -> None:
        """Raises InputError for a metric that was asked for and that reference or images can't give."""
        for metric in self.metrics if self._asked else ():
            reason = protocol.lacking(metric, reference, labelled=labelled)
            if reason is not None:
                raise InputError(f"--metrics={metric}: {reason}; leave it out or take another reference")

    def score(
        self, run: Any, inputs: dict[str, Any], draws: Draws, how: dict[str, Any], *, again: bool = False
    ) -> dict[str, Any]:
        """Samples a run and scores the samples; appends the record to the run's file and draws its grid.

        Goes on from what an interrupted call with the same inputs has kept, unless it is to begin `again`.
        """
        workdir, reference, test = Path(run.workdir), self._compared(run), None
        if self.given is None and run.dataset.num_examples.get("test", 0) >= 2:
            test = self._reference(run.dataset, "test", run.blocks)
        also_first = 0 if test is None else test.count
        tally = protocol.Tally(
            self.extractor, reference, num=draws.num, metrics=self.metrics, also_first=also_first
        )
        # All that the sums depend on.
        name = content_hash({**inputs, "also_first": also_first, "versions": _versions()})[:16]
        unfinished = Unfinished(workdir / RESULTS.parent / f"unfinished_{name}.npz")
        if again:
            unfinished.finish()
        seconds, first_images = _sample_into(tally, run, draws, how, unfinished)
        scores = tally.scores()
        grid = RESULTS.parent / grid_name(inputs)
        if distributed.is_first():
            scale = -(-_GRID_TILE // first_images.shape[1])
            save_png(image_grid(first_images, _GRID_COLUMNS, scale=scale), workdir / grid)
        record = {
            **inputs,
            "metrics": scores.metrics,
            "bounds": {} if self.given else self._bounds(run, draws, how, reference, test),
            "rank_deficient": scores.rank_deficient,
            "grid": str(grid),
            "sampling_seconds": round(seconds, 3),
            "features_seconds": round(scores.features_seconds, 3),
            **_made(),
        }
        if distributed.is_first():
            append_line(workdir / RESULTS, record)
        unfinished.finish()
        return record

    def _compared(self, run: Any) -> Reference:
        return self.given or self._reference(run.dataset, "train", run.blocks)

    def _bounds(
        self, run: Any, draws: Draws, how: dict[str, Any], reference: Reference, test: Reference | None
    ) -> dict[str, float]:
        num = min(draws.untrained_num, draws.num)

        def untrained() -> Blocks:
            yield run.untrained().sample(num, seed=draws.seed, **how)

        return protocol.floors_and_ceilings(
            self.extractor,
            self.cache,
            reference=reference,
            reference_images=lambda: run.blocks("train"),
            test=test,
            untrained_images=untrained,
            untrained_num=num,
            untrained_identity=_untrained_identity(run, draws.seed, run.sampling_record(**how)),
        )

    def score_images(self, images: image_files.ImageFiles) -> dict[str, Any]:
        """The record of images that were made elsewhere."""
        self.require(self.given, labelled=images.has_labels)
        scores = protocol.evaluate_samples(
            images.blocks(_BLOCK), self.extractor, self.given, num=images.num, metrics=self.metrics
        )
        return {
            **images.description,
            "num_samples": images.num,
            "asked": self.metrics,
            "metrics": scores.metrics,
            "bounds": {},
            "rank_deficient": scores.rank_deficient,
            "features": self.extractor.network.description,
            "reference": self.given.description,
            "features_seconds": round(scores.features_seconds, 3),
            **_made(),
        }

    def _prepared(self, directory: Path, split: str) -> Reference:
        """Of a prepared data set's split, by its directory."""
        try:
            info = layout.read_summary(directory)
        except (OSError, ValueError) as error:
            raise InputError(
                f"--reference={directory} is no prepared data set ({error}); name the directory that holds "
                f"{layout.SUMMARY_FILE}"
            ) from error
        place = {"dataset": info.dataset, "resolution": info.resolution}
        data_dir = directory.resolve().parents[2] if len(directory.resolve().parents) > 2 else directory
        if not layout.dataset_dir(data_dir, **place).is_dir() or not directory.samefile(
            layout.dataset_dir(data_dir, **place)
        ):
            raise InputError(
                f"--reference={directory}: {info.dataset} at {info.resolution} must lie in "
                f"DIR/{layout.dataset_dir('', **place)}; move it back there"
            )
        if split not in info.fingerprints:
            raise InputError(f"--reference_split={split}: {directory} has {', '.join(info.fingerprints)}")

        def blocks(split: str) -> Blocks:
            return pipeline.blocks(pipeline.open_split(data_dir=data_dir, **place, split=split))

        return self._reference(info, split, blocks)

    def _reference(self, info: Any, split: str, blocks: Callable[[str], Blocks]) -> Reference:
        identity = {
            "fingerprint": info.fingerprints[split],
            "dataset": info.dataset,
            "resolution": info.resolution,
            "preprocessing": str(info.preprocessing),
        }
        # Read once: with its features it can be as large as all samples.
        key = (split, *identity.values())
        if key not in self._references:
            count = -(-info.num_examples[split] // pipeline.BLOCK)
            reference = self.cache.reference(
                self.extractor,
                split=split,
                identity=identity,
                images=lambda: progress.bar(blocks(split), f"features of {split} images", total=count),
            )
            told = {"dataset": info.dataset, "resolution": info.resolution}
            self._references[key] = dataclasses.replace(
                reference, description={**told, **reference.description}
            )
        return self._references[key]


def _made() -> dict[str, Any]:
    return {
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": _versions(),
    }


def _versions() -> dict[str, str]:
    return software.versions("jax", "flax", "mcm_jax")


def grid_name(inputs: dict[str, Any]) -> str:
    """Of the grid: what tells samples of one run apart; the usual settings are left out."""
    name = f"samples_step{inputs['checkpoint_step']}_{inputs['parameters']}"
    name += f"_{inputs['sampler']}{inputs['steps']}"
    if inputs["noise_grid"] != "schedule":
        name += f"_{inputs['noise_grid']}"
    if inputs["x_var"] == "measured":
        name += "_measured"
    if inputs["guidance"]:
        name += f"_g{inputs['guidance']:g}"
    return f"{name}_seed{inputs['seed']}.png"


def _sample_into(
    tally: protocol.Tally, run: Any, draws: Draws, how: dict[str, Any], unfinished: Unfinished
) -> tuple[float, np.ndarray]:
    """Adds the run's samples, from where an interrupted evaluation was; keeps what there is.

    Returns:
      (seconds of sampling, the first images).
    """

    def check(arrays: Arrays) -> None:
        copy.copy(tally).go_on_from(arrays)
        arrays["seconds"], arrays["first_images"]

    seconds, first_images = 0.0, np.zeros((0,), np.uint8)
    arrays = unfinished.read(check)
    if arrays is not None:
        tally.go_on_from(arrays)
        seconds, first_images = float(arrays["seconds"]), arrays["first_images"]
        distributed.say(f"going on after the {tally.count} samples of an evaluation that was interrupted")
    for first in progress.bar(range(tally.count, draws.num, _BLOCK), "samples and their features"):
        start = time.monotonic()
        images, labels = run.sample(min(_BLOCK, draws.num - first), seed=draws.seed, first=first, **how)
        seconds += time.monotonic() - start
        if first == 0:
            first_images = images[:_GRID_IMAGES].copy()
        tally.update(images, labels)
        also = {"seconds": np.array(seconds), "first_images": first_images}
        unfinished.keep(lambda also=also: tally.arrays() | also)
    return seconds, first_images


def _untrained_identity(run: Any, seed: int, sampling: dict[str, Any]) -> dict[str, Any]:
    """The config but for what only training reads: teacher and students share their untrained network."""
    config = dataclasses.asdict(run.config)
    for section in _TRAINING_ONLY:
        config.pop(section, None)
    return {"config": config, "seed": seed, **sampling}
