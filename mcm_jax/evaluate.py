"""Samples trained runs and scores the samples; one JSON line for each result.

    python -m mcm_jax.evaluate --workdir=runs/teacher,runs/cd4 --num=2048
    python -m mcm_jax.evaluate --workdir=runs/cd8 --num=50000 --features=inception

appends to `WORKDIR/evaluation/results.jsonl`, draws the first 64 samples beside it, and prints what the
numbers mean. Several workdirs in one call share the compiled feature network and the reference statistics.
"""

import dataclasses
import datetime
import functools
import importlib.metadata
import time
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from mcm_jax import command_line
from mcm_jax.diffusion.schedules import Grid
from mcm_jax.errors import InputError
from mcm_jax.evaluation import efficientnet, inception_weights, protocol, published
from mcm_jax.evaluation.features import Extractor, FeatureNetwork
from mcm_jax.evaluation.references import Blocks, Cache, Reference
from mcm_jax.files import append_line, require_writable
from mcm_jax.pictures import image_grid, save_png
from mcm_jax.sampling import Sampler, XVar

SAMPLERS, NOISE_GRIDS, X_VARS = (typing.get_args(choices) for choices in (Sampler, Grid, XVar))
PARAMETERS = {"ema": ("ema",), "raw": ("raw",), "both": ("ema", "raw")}
DEFAULT_METRICS = {
    "efficientnet": ("frechet", "nearest"),
    "inception": ("frechet", "sfid", "inception_score"),
}
RESULTS = Path("evaluation") / "results.jsonl"
_TRAINING_ONLY = (
    *("objective", "teacher_checkpoint", "teacher_guidance", "diffusion", "consistency", "optimizer"),
    *("training", "mesh"),
)
# Samples held at a time: bounds memory at any --num.
_BLOCK = 1024
_GRID_IMAGES, _GRID_COLUMNS = 64, 8
# Smallest side a sample is drawn at in the grid.
_GRID_TILE = 48


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """The flags, see `define_flags`. None: as the run says."""

    workdirs: tuple[Path, ...]
    num: int = 2048
    steps: int | None = None
    sampler: str | None = None
    noise_grid: str | None = None
    x_var: str | None = None
    guidance: float | None = None
    seed: int = 0
    parameters: str = "ema"
    checkpoint_step: int | None = None
    data_dir: str | None = None
    features: str = "efficientnet"
    inception: Path = Path("data") / inception_weights.FILE
    input_resolution: int = efficientnet.DEFAULT_INPUT_RESOLUTION
    metrics: tuple[str, ...] | None = None
    reference: Path | None = None
    cache_dir: Path = Path("data") / "reference_cache"
    untrained_num: int = 512

    @property
    def how(self) -> dict[str, Any]:
        """The settings of the sampler, for `runs.Run.sample`."""
        names = ("steps", "sampler", "noise_grid", "x_var", "guidance")
        return {name: getattr(self, name) for name in names}


def evaluate(options: Options, load_run: Callable[..., Any]) -> list[dict[str, Any]]:
    """Scores every workdir of `options` with its EMA, raw or both parameters; returns the appended records.

    load_run is `runs.load_run`. Raises InputError, before anything is sampled, for whatever the user
    must mend.
    """
    _check(options)
    network = _network(options)
    metrics = options.metrics or DEFAULT_METRICS[options.features]
    protocol.check_metrics(metrics, network, num=options.num)
    extractor = Extractor(network)
    cache = Cache(options.cache_dir)
    published_reference = None
    if options.reference is not None:
        published_reference = published.read(options.reference, extractor)
    # All runs are loaded before the first is sampled, so that a bad one costs no time.
    load = functools.partial(load_run, checkpoint_step=options.checkpoint_step, data_dir=options.data_dir)
    kinds = PARAMETERS[options.parameters]
    runs = [(kind, load(workdir, parameters=kind)) for workdir in options.workdirs for kind in kinds]
    for _, run in runs:
        if published_reference is None:
            run.check_data()
        run.sampling_record(**options.how)
    for workdir in options.workdirs:
        require_writable(workdir / RESULTS.parent, "the evaluation directory")
    records = []
    for kind, run in runs:
        print(f"{run.workdir}: sampling {options.num} images with its {kind} parameters", flush=True)
        scored = functools.partial(evaluate_run, run, options, extractor, parameters=kind, metrics=metrics)
        if published_reference is None:
            record = scored(**_data_set(run, options, extractor, cache))
        else:
            record = scored(reference=published_reference)
        append_line(Path(run.workdir) / RESULTS, record)
        print(table(record, Path(run.workdir)), flush=True)
        records.append(record)
    return records


def _network(options: Options) -> FeatureNetwork:
    if options.features == "inception":
        return inception_weights.load(options.inception).network()
    if options.reference is not None:
        raise InputError(
            f"--reference={options.reference} is of Inception's features; add --features=inception"
        )
    return efficientnet.network(efficientnet.load(), input_resolution=options.input_resolution)


def _data_set(run: Any, options: Options, extractor: Extractor, cache: Cache) -> dict[str, Any]:
    """What a run is compared with where no file is: its training images, and the bounds that they give."""
    reference = _reference(run, "train", extractor, cache)
    test = _reference(run, "test", extractor, cache) if run.dataset.num_examples.get("test", 0) >= 2 else None
    return {
        "reference": reference,
        "also_first": test.count if test is not None else 0,
        "bounds": lambda: protocol.floors_and_ceilings(
            extractor,
            cache,
            reference=reference,
            reference_images=lambda: run.blocks("train"),
            test=test,
            untrained_images=lambda: _untrained_images(run, options),
            untrained_num=min(options.untrained_num, options.num),
            untrained_identity=_untrained_identity(run, options),
        ),
    }


def evaluate_run(
    run: Any,
    options: Options,
    extractor: Extractor,
    *,
    parameters: str,
    metrics: Sequence[str],
    reference: Reference,
    also_first: int = 0,
    bounds: Callable[[], dict[str, float]] = dict,
) -> dict[str, Any]:
    """Samples one run and scores the samples; returns the record and draws the grid it names."""
    sampling = run.sampling_record(**options.how)
    samples = _Samples(run, options)
    scores = protocol.evaluate_samples(
        samples, extractor, reference, num=options.num, metrics=metrics, also_first=also_first
    )
    sampler = _file_name(sampling)
    name = f"samples_step{run.checkpoint_step}_{parameters}_{sampler}_seed{options.seed}.png"
    grid = RESULTS.parent / name
    scale = -(-_GRID_TILE // samples.first.shape[1])
    save_png(image_grid(samples.first, _GRID_COLUMNS, scale=scale), Path(run.workdir) / grid)
    return {
        **_run_record(run, parameters),
        "seed": options.seed,
        **sampling,
        "num_samples": scores.num_samples,
        "metrics": scores.metrics,
        "bounds": bounds(),
        "rank_deficient": scores.rank_deficient,
        "features": extractor.network.description,
        "reference": reference.description,
        "grid": str(grid),
        "sampling_seconds": round(samples.seconds, 3),
        "features_seconds": round(scores.features_seconds, 3),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "flax", "mcm_jax")},
    }


def _file_name(sampling: dict[str, Any]) -> str:
    """What tells samples of one run and seed apart; the usual settings are left out."""
    name = f"{sampling['sampler']}{sampling['steps']}"
    if sampling["noise_grid"] != "schedule":
        name += f"_{sampling['noise_grid']}"
    if sampling["x_var"] == "measured":
        name += "_measured"
    return name + (f"_g{sampling['guidance']:g}" if sampling["guidance"] else "")


class _Samples:
    """The run's samples in blocks; remembers the first few and the time it took."""

    def __init__(self, run: Any, options: Options):
        self._run, self._options = run, options
        self.first: np.ndarray = np.zeros((0,), np.uint8)
        self.seconds = 0.0

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        options = self._options
        for first in range(0, options.num, _BLOCK):
            start = time.monotonic()
            count = min(_BLOCK, options.num - first)
            images, labels = self._run.sample(count, seed=options.seed, first=first, **options.how)
            self.seconds += time.monotonic() - start
            if first == 0:
                self.first = images[:_GRID_IMAGES].copy()
            yield images, labels


def _run_record(run: Any, parameters: str) -> dict[str, Any]:
    return {
        "workdir": Path(run.workdir).resolve().name,
        "objective": run.objective,
        "dataset": run.dataset.dataset,
        "resolution": run.dataset.resolution,
        "data_preprocessing": run.dataset.preprocessing,
        "training_seed": run.seed,
        "student_steps": run.student_steps,
        "checkpoint_step": run.checkpoint_step,
        "parameters": parameters,
        "label_rule": run.label_rule,
    }


def _reference(run: Any, split: str, extractor: Extractor, cache: Cache) -> Reference:
    info = run.dataset
    identity = {
        "fingerprint": info.fingerprints[split],
        "dataset": info.dataset,
        "resolution": info.resolution,
        "preprocessing": str(info.preprocessing),
    }
    return cache.reference(extractor, split=split, identity=identity, images=lambda: run.blocks(split))


def _untrained_images(run: Any, options: Options) -> Blocks:
    num = min(options.untrained_num, options.num)
    yield run.untrained().sample(num, seed=options.seed, **options.how)


def _untrained_identity(run: Any, options: Options) -> dict[str, Any]:
    """The config but for what only training reads: teacher and students share their untrained network."""
    config = dataclasses.asdict(run.config)
    for section in _TRAINING_ONLY:
        config.pop(section, None)
    return {"config": config, "seed": options.seed, **run.sampling_record(**options.how)}


def _check(options: Options) -> None:
    if not options.workdirs:
        raise InputError("--workdir names no directory: give a finished run's, several separated by commas")
    for workdir in options.workdirs:
        if not workdir.is_dir():
            raise InputError(f"--workdir={workdir}: there is no such directory; train a run there first")
    if options.num < 2:
        raise InputError(f"--num={options.num}: a Frechet distance needs at least 2 samples; 2048 is usual")
    if options.steps is not None and options.steps < 1:
        raise InputError(f"--steps={options.steps}: sampling takes at least 1 step")
    for name, choices in (("sampler", SAMPLERS), ("noise_grid", NOISE_GRIDS), ("x_var", X_VARS)):
        value = getattr(options, name)
        if value is not None and value not in choices:
            raise InputError(f"--{name}={value}: it is one of {', '.join(choices)}")
    if options.guidance is not None and not options.guidance >= 0:
        raise InputError(f"--guidance={options.guidance}: 0 is none, larger is more; it can't be negative")
    if options.features not in DEFAULT_METRICS:
        raise InputError(f"--features={options.features}: it is one of {', '.join(DEFAULT_METRICS)}")
    if options.parameters not in PARAMETERS:
        raise InputError(f"--parameters={options.parameters}: it is one of {', '.join(PARAMETERS)}")


_MEANINGS = (
    ("test_images_nearest", "the same for test images; samples far below it are copies"),
    ("test_images", "test images in place of samples: about the best there is at this count"),
    ("mean_image", "the mean training image, repeated: no better than that is no model"),
    ("untrained_network", "the same network before training"),
    ("nearest_neighbour", "mean feature distance from a sample to its nearest training image"),
    ("sfid", "Frechet distance of spatial features, lower is better"),
    ("inception_score", "mean over ten parts, higher is better"),
    ("kid", "unbiased kernel distance to the reference, lower is better"),
    ("precision", "share of samples among the reference's images, higher is better"),
    ("recall", "share of the reference's images among the samples, higher is better"),
    ("class_fid", "mean over classes of each one's distance, lower is better"),
)


def table(record: dict[str, Any], workdir: Path) -> str:
    """The record's numbers, a line each with what it means, and where they were written."""
    student = f", {record['student_steps']} student steps" if record["student_steps"] is not None else ""
    lines = [
        f"{record['workdir']}: {record['objective']}{student}, step {record['checkpoint_step']}, "
        f"{record['parameters']} parameters; {record['steps']} steps of {record['sampler']}, "
        f"seed {record['seed']}"
    ]
    for name, value in (record["metrics"] | record["bounds"]).items():
        lines.append(f"  {name:<44} {value:>10.3f}   {_meaning(name, record)}")
    if record["rank_deficient"]:
        lines.append(
            "  note: a side has no more images than there are features, so its covariance is singular: "
            "compare equal counts only"
        )
    lines.append(
        f"  sampled in {record['sampling_seconds']:.1f} s, features in {record['features_seconds']:.1f} s"
    )
    lines.append(f"  {workdir / RESULTS}, {workdir / record['grid']}")
    return "\n".join(lines)


def _meaning(name: str, record: dict[str, Any]) -> str:
    for start, meaning in _MEANINGS:
        if name.startswith(start):
            return meaning
    count, reference = protocol.count_of(name), record["reference"]
    if count != record["num_samples"]:
        return f"that of the first {count}, beside the test images"
    of = reference.get("file", f"the {reference['count']} training images")
    return f"Frechet distance to {of}, lower is better"


def define_flags() -> None:
    """Called by the program, not on import: other programs have flags of the same names."""
    flags.DEFINE_list("workdir", None, "Run(s) to evaluate, separated by commas.", required=True)
    flags.DEFINE_integer("num", Options.num, "Samples per result.", lower_bound=2)
    flags.DEFINE_integer("steps", None, "Sampling steps; default: the run's own.", lower_bound=1)
    flags.DEFINE_enum("sampler", None, SAMPLERS, "Default: the run's own.")
    flags.DEFINE_enum("noise_grid", None, NOISE_GRIDS, "Noise levels; default: the run's own.")
    flags.DEFINE_enum(
        "x_var", None, X_VARS, "Variance of addim and noisy_ddim; measured: on training images, once."
    )
    flags.DEFINE_float("guidance", None, "g, 0 is none; default: the run's own.", lower_bound=0)
    flags.DEFINE_integer(
        "seed", Options.seed, "Image n depends on (seed, n) only.", lower_bound=0, upper_bound=2**32 - 1
    )
    flags.DEFINE_enum("parameters", Options.parameters, tuple(PARAMETERS), "Which parameters to sample with.")
    flags.DEFINE_integer("checkpoint_step", None, "Default: the last one.", lower_bound=0)
    flags.DEFINE_string("data_dir", None, "Where the prepared data is; default: where the run found it.")
    flags.DEFINE_enum(
        "features",
        Options.features,
        tuple(DEFAULT_METRICS),
        "inception: those of FID, whose weights you bring; efficientnet: a proxy that is installed.",
    )
    flags.DEFINE_string(
        "inception",
        str(Options.inception),
        "Inception's weights, as mcm_jax.prepare --inception=FILE left them.",
    )
    flags.DEFINE_list("metrics", None, f"Of {', '.join(protocol.METRICS)}; default: those that cost little.")
    flags.DEFINE_string(
        "reference",
        None,
        "File of statistics as ADM, EDM and others publish them; default: the run's training images.",
    )
    flags.DEFINE_integer(
        "input_resolution",
        Options.input_resolution,
        "Side that images are resized to for efficientnet; distances compare only where it is equal.",
        lower_bound=efficientnet.MIN_INPUT_RESOLUTION,
    )
    flags.DEFINE_string("cache_dir", str(Options.cache_dir), "Where reference statistics are kept.")
    flags.DEFINE_integer(
        "untrained_num", Options.untrained_num, "Samples of the untrained network; 0: none.", lower_bound=0
    )


def main() -> None:
    """Flags in, one call out."""
    # Slow to import: --help and bad flags need not wait for it.
    from mcm_jax import distributed, runs, workdirs

    values = flags.FLAGS
    options = Options(
        workdirs=tuple(Path(workdir) for workdir in values.workdir),
        cache_dir=Path(values.cache_dir),
        inception=Path(values.inception),
        reference=None if values.reference is None else Path(values.reference),
        metrics=None if values.metrics is None else tuple(values.metrics),
        **{
            field.name: getattr(values, field.name)
            for field in dataclasses.fields(Options)
            if field.name not in ("workdirs", "cache_dir", "inception", "reference", "metrics")
        },
    )
    if options.workdirs:
        cache = workdirs.compilation_cache(options.workdirs[0])
        jax.config.update("jax_compilation_cache_dir", str(cache))
    with distributed.alone("evaluate"):
        evaluate(options, runs.load_run)


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
