"""Scores the runs or the images that one command names; see the program `evaluate`."""

import dataclasses
import functools
import itertools
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mcm_jax.diffusion.sampling import Sampler, XVar
from mcm_jax.diffusion.schedules import Grid
from mcm_jax.evaluation import efficientnet, image_files, inception_weights, protocol
from mcm_jax.evaluation.evaluator import RESULTS, Draws, Evaluator
from mcm_jax.evaluation.features import FeatureNetwork
from mcm_jax.system import distributed
from mcm_jax.system.errors import InputError
from mcm_jax.system.files import append_line, require_writable

SAMPLERS, NOISE_GRIDS, X_VARS = (typing.get_args(choices) for choices in (Sampler, Grid, XVar))


PARAMETERS = {"ema": ("ema",), "raw": ("raw",), "both": ("ema", "raw")}


DEFAULT_METRICS = {
    "efficientnet": ("frechet", "nearest"),
    "inception": ("frechet", "sfid", "inception_score"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """The flags, see `define_flags`. None or no value: as the run says."""

    workdirs: tuple[Path, ...] = ()
    images: Path | None = None
    results: Path | None = None
    num: int = 2048
    steps: tuple[int, ...] = ()
    sampler: str | None = None
    noise_grid: str | None = None
    x_var: str | None = None
    guidance: tuple[float, ...] = ()
    seed: int = 0
    parameters: str = "ema"
    checkpoint_step: tuple[int, ...] = ()
    data_dir: str | None = None
    features: str = "efficientnet"
    inception: Path = inception_weights.DEFAULT_PATH
    input_resolution: int = efficientnet.DEFAULT_INPUT_RESOLUTION
    metrics: tuple[str, ...] | None = None
    reference: Path | None = None
    reference_split: str = "train"
    cache_dir: Path = Path("data") / "reference_cache"
    untrained_num: int = 512
    again: bool = False
    allow_singular: bool = False

    @property
    def hows(self) -> list[dict[str, Any]]:
        """Every combination of the sampler's settings, for `runs.run.Run.sample`."""
        fixed = {name: getattr(self, name) for name in ("sampler", "noise_grid", "x_var")}
        return [
            {"steps": steps, **fixed, "guidance": guidance}
            for steps in self.steps or (None,)
            for guidance in self.guidance or (None,)
        ]


def evaluate(options: Options, load_run: Callable[..., Any]) -> list[dict[str, Any]]:
    """Scores every combination that `options` stand for; the first process returns the records, old ones too.

    load_run is `runs.run.load_run`. Raises InputError, before anything is sampled, for whatever the user
    must mend.
    """
    with distributed.fail_together():
        _check(options)
        network = _network(options, num=options.num)
    distributed.require_same((options, network.description), "flags and weights")
    loaders = _loaders(options, load_run)
    for workdir in options.workdirs:
        with distributed.fail_together():
            require_writable(workdir / RESULTS.parent, "the evaluation directory")
        distributed.require_shared(workdir / RESULTS.parent, "the evaluation directory")
    evaluator = _evaluator(options, network)
    draws = Draws(options.num, options.seed, options.untrained_num)
    records = []
    for kind, load in loaders:
        run = None  # Before the next is loaded.
        run = load()
        for how in options.hows:
            inputs = evaluator.inputs(run, kind, draws, how)
            distributed.require_same(inputs, "runs, data sets and references")
            record = None if options.again else evaluator.stored(run, inputs)
            if distributed.broadcast(record is None):
                distributed.say(f"{run.workdir}: sampling {draws.num} images with its {kind} parameters")
                record = evaluator.score(run, inputs, draws, how, again=options.again)
            else:
                distributed.say(f"{run.workdir}: measured before, --again measures it again")
            if distributed.is_first():
                print(table(record, Path(run.workdir)), flush=True)
            records.append(record)
    return records


def evaluate_images(options: Options) -> dict[str, Any]:
    """Scores the images that `options` name; returns the record.

    Raises InputError, before anything is computed, for whatever the user must mend.
    """
    with distributed.fail_together():
        _check(options)
        if options.reference is None:
            raise InputError(
                f"--images={options.images} needs --reference=FILE of statistics, or DIR of a prepared "
                "data set"
            )
        images = image_files.open_images(options.images)
        network = _network(options, num=images.num)
        if options.results is not None:
            require_writable(options.results.absolute().parent, "--results, its directory")
    distributed.require_same((options, network.description, images.description), "flags, weights and images")
    evaluator = _evaluator(options, network)
    record = evaluator.score_images(images)
    if options.results is not None and distributed.is_first():
        append_line(options.results, record)
    distributed.say("\n".join([record["images"], *_numbers_told(record)]))
    return record


def _loaders(options: Options, load_run: Callable[..., Any]) -> list[tuple[str, Callable[[], Any]]]:
    """(kind of parameters, what loads the run with them), all tried once, so that a bad one costs no time.

    Several are not held at a time: a device may have room for one.
    """
    combinations = itertools.product(
        options.workdirs, PARAMETERS[options.parameters], options.checkpoint_step or (None,)
    )
    load = functools.partial(load_run, data_dir=options.data_dir)
    loaders = [
        (kind, functools.partial(load, workdir, parameters=kind, checkpoint_step=step))
        for workdir, kind, step in combinations
    ]
    for _, load in loaders:
        run = load()
        if options.reference is None:
            run.check_data()
        for how in options.hows:
            run.sampling_record(**how)
    return [(loaders[0][0], lambda: run)] if len(loaders) == 1 else loaders


def _evaluator(options: Options, network: FeatureNetwork) -> Evaluator:
    return Evaluator(
        network,
        _metrics(options),
        options.cache_dir,
        asked=options.metrics is not None,
        reference=options.reference,
        reference_split=options.reference_split,
    )


def _metrics(options: Options) -> tuple[str, ...]:
    return options.metrics or DEFAULT_METRICS[options.features]


def _network(options: Options, *, num: int) -> FeatureNetwork:
    """The feature network, with the metrics of `num` images checked."""
    network = _feature_network(options)
    protocol.check_metrics(_metrics(options), network, num=num, allow_singular=options.allow_singular)
    return network


def _feature_network(options: Options) -> FeatureNetwork:
    if options.features == "inception":
        return inception_weights.load(options.inception).network()
    if options.reference is not None and not options.reference.is_dir():
        raise InputError(
            f"--reference={options.reference} is of Inception's features; add --features=inception"
        )
    return efficientnet.network(efficientnet.load(), input_resolution=options.input_resolution)


# What says which samples to draw.
_OF_SAMPLING = (
    *("num", "steps", "sampler", "noise_grid", "x_var", "guidance", "seed", "parameters"),
    *("checkpoint_step", "data_dir", "untrained_num", "again"),
)


def _check(options: Options) -> None:
    if not options.workdirs and options.images is None:
        raise InputError("--workdir names no directory: give a finished run's, several separated by commas")
    for workdir in options.workdirs:
        if not workdir.is_dir():
            raise InputError(f"--workdir={workdir}: there is no such directory; train a run there first")
    if options.num < 2:
        raise InputError(f"--num={options.num}: a Frechet distance needs at least 2 samples; 2048 is usual")
    for steps in options.steps:
        if steps < 1:
            raise InputError(f"--steps={steps}: sampling takes at least 1 step")
    for name, choices in (("sampler", SAMPLERS), ("noise_grid", NOISE_GRIDS), ("x_var", X_VARS)):
        value = getattr(options, name)
        if value is not None and value not in choices:
            raise InputError(f"--{name}={value}: it is one of {', '.join(choices)}")
    for guidance in options.guidance:
        if not guidance >= 0:
            raise InputError(f"--guidance={guidance}: 0 is none, larger is more; it can't be negative")
    if options.reference is not None and not options.reference.exists():
        raise InputError(f"--reference={options.reference}: there is no such file or directory")
    if options.reference_split != "train" and (options.reference is None or not options.reference.is_dir()):
        raise InputError(
            f"--reference_split={options.reference_split} is of a prepared data set: add --reference=DIR"
        )
    for field in dataclasses.fields(Options) if options.images is not None else ():
        if field.name in _OF_SAMPLING and getattr(options, field.name) != field.default:
            raise InputError(f"--{field.name} is of sampling, and --images are there already: leave it out")
    if options.workdirs and options.results is not None:
        raise InputError("--results belongs to --images: a run's results are kept beside it")
    require_writable(options.cache_dir, "--cache_dir")
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
    lines += _numbers_told(record)
    lines.append(
        f"  sampled in {record['sampling_seconds']:.1f} s, features in {record['features_seconds']:.1f} s"
    )
    lines.append(f"  {workdir / RESULTS}, {workdir / record['grid']}")
    return "\n".join(lines)


def _numbers_told(record: dict[str, Any]) -> list[str]:
    lines = [
        f"  {name:<44} {value:>10{'.3f' if abs(value) >= 0.1 else '.6f'}}   {_meaning(name, record)}"
        for name, value in (record["metrics"] | record["bounds"]).items()
    ]
    if record["rank_deficient"]:
        lines.append(
            "  note: a side has no more images than there are features, so its covariance is singular: "
            "compare equal counts only"
        )
    return lines


def _meaning(name: str, record: dict[str, Any]) -> str:
    for start, meaning in _MEANINGS:
        if name.startswith(start):
            return meaning
    count, reference = protocol.count_of(name), record["reference"]
    if count != record["num_samples"]:
        return f"that of the first {count}, beside the test images"
    of = reference.get("file", f"the {reference['count']} images of split {reference.get('split')}")
    return f"Frechet distance to {of}, lower is better"
