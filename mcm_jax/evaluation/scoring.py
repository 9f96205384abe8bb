"""Scores the runs or the images given on the command line of the program `evaluate`."""

import dataclasses
import functools
import itertools
import math
import typing
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from mcm_jax.data.pixels import Rounding, lacks_scaling
from mcm_jax.diffusion.sampling import Sampler, XVar
from mcm_jax.diffusion.schedules import Grid
from mcm_jax.evaluation import captioned, dinov2, efficientnet, image_files, inception_weights, protocol
from mcm_jax.evaluation.compatibility import ReferenceImages, reference_images
from mcm_jax.evaluation.evaluator import Evaluator, SampleRequest, workdir_of
from mcm_jax.evaluation.features import FeatureNetwork
from mcm_jax.records import (
    ATTRIBUTES,
    CAPTION_SCORES,
    CLIP_SCORE,
    HELD_OUT_IMAGES,
    MEAN_IMAGE,
    NEAREST,
    NEAREST_OF_TEN,
    OTHER_CAPTIONS,
    RESULTS,
    TEST_IMAGES,
    UNTRAINED_NETWORK,
    ImagesResult,
    Result,
    SamplingOptions,
    count_of,
    lists_times,
)
from mcm_jax.system import distributed, sharding
from mcm_jax.system.errors import InputError
from mcm_jax.system.files import append_line, require_output, require_writable
from mcm_jax.system.paths import Path, as_path
from mcm_jax.training.checkpoints import Parameters

if TYPE_CHECKING:
    from mcm_jax.runs.run import Run  # Slow to import.

SAMPLERS, NOISE_GRIDS, X_VARS, ROUNDINGS = (
    typing.get_args(choices) for choices in (Sampler, Grid, XVar, Rounding)
)

PARAMETERS: dict[str, tuple[Parameters, ...]] = {"ema": ("ema",), "raw": ("raw",), "both": ("ema", "raw")}

DEFAULT_METRICS = {
    "efficientnet": ("frechet", "nearest"),
    "inception": ("frechet", "sfid", "inception_score"),
    "dinov2": ("frechet",),
}

# Number of images that are checked before the work begins.
_FIRST_IMAGES = 1024


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """The program's flags (see `evaluate.define_flags`). None or an empty tuple: the run's own setting."""

    workdirs: tuple[Path, ...] = ()
    images: Path | None = None
    results: Path | None = None
    num: int = 2048
    steps: tuple[int, ...] = ()
    sampler: str | None = None
    noise_grid: str | None = None
    x_var: str | None = None
    guidance: tuple[float, ...] = ()
    guide: Path | None = None
    captions: tuple[str, ...] = ()
    rounding: str = "nearest"
    seed: int = 0
    parameters: str = "ema"
    checkpoint_step: tuple[int, ...] = ()
    data_dir: str | None = None
    features: str = "efficientnet"
    inception: Path = inception_weights.DEFAULT_PATH
    dinov2: Path | None = None
    input_resolution: int = efficientnet.DEFAULT_INPUT_RESOLUTION
    metrics: tuple[str, ...] | None = None
    reference: Path | None = None
    reference_split: str = "train"
    clip: Path | None = None
    cache_dir: Path = as_path("data") / "reference_cache"
    untrained_num: int = 512
    again: bool = False
    allow_singular: bool = False

    @property
    def sampling_options(self) -> list[SamplingOptions]:
        """Every combination of the sampler's settings, as keywords of `runs.run.Run.sample`."""
        return [
            {
                "steps": steps,
                "sampler": self.sampler,
                "noise_grid": self.noise_grid,
                "x_var": self.x_var,
                "rounding": self.rounding,
                "guidance": guidance,
            }
            for steps in self.steps or (None,)
            for guidance in self.guidance or (None,)
        ]


def evaluate(options: Options, load_run: "Callable[..., Run]") -> list[Result]:
    """Scores every combination of runs, parameters and sampling settings in `options`.

    Args:
      load_run: `runs.run.load_run`.

    Returns:
      The results, including those measured before.

    Raises:
      InputError: the input must be corrected (raised before anything is sampled), or samples are not finite.
    """
    with distributed.fail_together():
        _check(options)
        network = _network(options, num=options.num)
        reference = reference_images(options.reference, split=options.reference_split)
    distributed.require_same((options, network.description), "flags and weights")
    scores = captioned.CaptionScores(
        _metrics(options), explicit=options.metrics is not None, clip=options.clip
    )
    loaders = _loaders(options, load_run, reference, scores)
    for workdir in options.workdirs:
        with distributed.fail_together():
            require_writable(workdir / RESULTS.parent, "the evaluation directory")
        distributed.require_shared(workdir / RESULTS.parent, "the evaluation directory")
    evaluator = _evaluator(options, network, scores)
    results = []
    for kind, load in loaders:
        run = None  # Frees its memory before the next one is loaded.
        run = load()
        for how, split in itertools.product(options.sampling_options, options.captions or (None,)):
            request = SampleRequest(
                options.num, options.seed, options.untrained_num, caption_split=split, settings=how
            )
            measurement = evaluator.measurement(run, kind, request)
            distributed.require_same(measurement, "runs, data sets and references")
            result = None if options.again else evaluator.stored(run, measurement)
            if distributed.broadcast(result is None):
                distributed.say(
                    f"{run.workdir}: sampling {options.num} images with its {kind} parameters on "
                    f"{sharding.description(run.mesh)}"
                )
                result = evaluator.score(run, measurement, request, again=options.again)
            else:
                distributed.say(f"{run.workdir}: measured before; add --again to measure it again")
            if result is None:
                continue  # The first process has a result that is not visible to this one yet.
            if distributed.is_first():
                print(table(result, workdir_of(run)), flush=True)
            results.append(result)
    return results


def evaluate_images(options: Options) -> ImagesResult:
    """Scores the images given by `options` and returns the result.

    Raises:
      InputError: the input must be corrected; raised before anything is computed.
    """
    path = options.images
    if path is None:
        raise ValueError("there are no images to evaluate")
    with distributed.fail_together():
        _check(options)
        if options.reference is None:
            raise InputError(
                f"--images={options.images} needs a reference: add --reference=FILE with statistics, or DIR "
                "with a prepared data set"
            )
        images = image_files.open_images(path)
        if images.note:
            distributed.say(f"{options.images}: {images.note}")
        network = _network(options, num=images.num)
        reference = reference_images(options.reference, split=options.reference_split)
        images = _compatible(images, reference, options)
        if options.results is not None:
            require_output(options.results, "--results")
    distributed.require_same((options, network.description, images.description), "flags, weights and images")
    evaluator = _evaluator(options, network)
    result = evaluator.score_images(images)
    if options.results is not None and distributed.is_first():
        append_line(options.results, result.to_json())
    distributed.say("\n".join([result.images, *_lines(result)]))
    return result


def _compatible(
    images: image_files.ImageFiles, reference: ReferenceImages, options: Options
) -> image_files.ImageFiles:
    """Checks that `images` match the reference; returns them with their size and rounding in the description.

    Raises:
      InputError: they don't match, or they are not images.
    """
    what = f"--images={options.images}"
    first, _ = next(iter(images.blocks(_FIRST_IMAGES)))
    if lacks_scaling(first):
        raise InputError(
            f"{what} holds bytes of 0 and 1 only (the first {len(first)} images): masks or floats in [0, 1] "
            "must be multiplied by 255 before they become uint8"
        )
    height, width = first.shape[1:3]
    reference.require_size((height, width), what=what)
    if "class_fid" in _metrics(options) and images.has_labels:
        labels = np.concatenate([labels for _, labels in images.blocks(_FIRST_IMAGES)])
        reference.require_labels(labels, what=what)
    # Another program made the images, so the rounding is unknown.
    description = {**images.description, "image_size": (height, width), "rounding": None}
    return dataclasses.replace(images, description=description)


def _loaders(
    options: Options,
    load_run: "Callable[..., Run]",
    reference: ReferenceImages,
    scores: captioned.CaptionScores,
) -> "Sequence[tuple[str, Callable[[], Run]]]":
    """Returns (kind of parameters, function that loads the run with them) for each combination.

    Every combination is loaded once here, so that errors are found before any sampling. Only one run is in
    memory at a time, as a device may have no room for more.
    """

    guide = None if options.guide is None else load_run(options.guide)  # Once for all runs.

    def guided_run(workdir: Path, **chosen: object) -> "Run":
        run = load_run(workdir, data_dir=options.data_dir, **chosen)
        return run if guide is None else run.guided_by(guide)

    loaders = [
        (kind, functools.partial(guided_run, workdir, parameters=kind, checkpoint_step=step))
        for workdir in options.workdirs
        for kind in PARAMETERS[options.parameters]
        for step in options.checkpoint_step or (None,)
    ]
    run = None
    for _, load in loaders:
        run = None  # Frees its memory before the next one is loaded.
        run = load()
        if options.reference is None:
            run.check_data()
        else:
            what, resolution = f"--workdir={run.workdir}", run.dataset.resolution
            reference.require_size((resolution, resolution), what=what)
            if "class_fid" in _metrics(options):
                reference.require_class_names(run.dataset.class_names, what=what)
        for how in options.sampling_options:
            run.sampling(**how)
        for split in options.captions or (None,):
            run.label_rule(split)
        scores.check(run.dataset)
    if run is not None and len(loaders) == 1:
        loaded = run
        return [(loaders[0][0], lambda: loaded)]
    return loaders


def _evaluator(
    options: Options, network: FeatureNetwork, scores: captioned.CaptionScores | None = None
) -> Evaluator:
    return Evaluator(
        network,
        _metrics(options),
        options.cache_dir,
        explicit=options.metrics is not None,
        reference=options.reference,
        reference_split=options.reference_split,
        caption_scores=scores,
    )


def _metrics(options: Options) -> tuple[str, ...]:
    return options.metrics or DEFAULT_METRICS[options.features]


def _network(options: Options, *, num: int) -> FeatureNetwork:
    """The feature network, after a check that it supports the metrics with `num` images."""
    network = _feature_network(options)
    protocol.check_metrics(_metrics(options), network, num=num, allow_singular=options.allow_singular)
    return network


def _feature_network(options: Options) -> FeatureNetwork:
    if options.features == "inception":
        return inception_weights.load(options.inception).network()
    if options.features == "dinov2":
        return dinov2.network(options.dinov2)
    if options.reference is not None and not options.reference.is_dir():
        raise InputError(
            f"--reference={options.reference} is a file of other features' statistics; add "
            "--features=inception or --features=dinov2"
        )
    return efficientnet.network(efficientnet.load(), input_resolution=options.input_resolution)


# Options that apply only when runs are sampled.
_SAMPLING_ONLY = (
    *(
        "num",
        "steps",
        "sampler",
        "noise_grid",
        "x_var",
        "guidance",
        "guide",
        "captions",
        "rounding",
        "seed",
        "parameters",
    ),
    *("checkpoint_step", "data_dir", "untrained_num", "again", "clip"),
)


def _check(options: Options) -> None:
    if not options.workdirs and options.images is None:
        raise InputError("--workdir is empty; give the directories of runs, separated by commas")
    for workdir in options.workdirs:
        if not workdir.is_dir():
            raise InputError(f"--workdir={workdir}: there is no such directory; train a run there first")
    if options.num < 2:
        raise InputError(f"--num={options.num}: a Frechet distance needs at least 2 samples; 2048 is usual")
    for steps in options.steps:
        if steps < 1:
            raise InputError(f"--steps={steps}: sampling needs at least 1 step")
    settings = {"sampler": SAMPLERS, "noise_grid": NOISE_GRIDS, "x_var": X_VARS, "rounding": ROUNDINGS}
    for name, choices in settings.items():
        value = getattr(options, name)
        # A grid may be a list of times, which is checked with the run.
        times = name == "noise_grid" and value is not None and lists_times(value)
        if value is not None and value not in choices and not times:
            raise InputError(f"--{name}={value} is not one of {', '.join(choices)}")
    for guidance in options.guidance:
        if not 0 <= guidance < math.inf:
            raise InputError(f"--guidance={guidance}: it must be 0 (no guidance) or a positive number")
    if options.guide is not None and options.guidance and not any(options.guidance):
        raise InputError(f"--guide={options.guide} has no effect with --guidance=0; remove one of them")
    if options.reference is not None and not options.reference.exists():
        raise InputError(f"--reference={options.reference}: there is no such file or directory")
    if options.reference_split != "train" and (options.reference is None or not options.reference.is_dir()):
        raise InputError(
            f"--reference_split={options.reference_split} selects a split of a prepared data set; add "
            "--reference=DIR"
        )
    for field in dataclasses.fields(Options) if options.images is not None else ():
        if field.name in _SAMPLING_ONLY and getattr(options, field.name) != field.default:
            raise InputError(
                f"--{field.name} applies only when runs are sampled; remove it when using --images"
            )
    for name in CAPTION_SCORES:
        if options.images is not None and name in (options.metrics or ()):
            raise InputError(f"--metrics={name} needs the captions of a run; remove it when using --images")
    if options.workdirs and options.results is not None:
        raise InputError("--results applies only to --images; a run's results are saved in its directory")
    require_writable(options.cache_dir, "--cache_dir")
    if options.features not in DEFAULT_METRICS:
        raise InputError(f"--features={options.features} is not one of {', '.join(DEFAULT_METRICS)}")
    if options.parameters not in PARAMETERS:
        raise InputError(f"--parameters={options.parameters} is not one of {', '.join(PARAMETERS)}")
    if options.metrics == ():
        raise InputError(f"--metrics is empty; give some of {', '.join(protocol.METRICS)}, or omit the flag")
    _check_features(options)


# Options that apply only with some features.
_FEATURES_ONLY = {
    "input_resolution": ("efficientnet",),
    "inception": ("inception",),
    "dinov2": ("dinov2",),
    "allow_singular": ("inception", "dinov2"),
}


def _check_features(options: Options) -> None:
    """Raises InputError for options that have no effect with the chosen features."""
    for name, features in _FEATURES_ONLY.items():
        if options.features not in features and getattr(options, name) != getattr(Options, name):
            raise InputError(
                f"--{name} applies only to --features={' or '.join(features)}; add that, or remove it"
            )


_MEANINGS = (
    (f"{TEST_IMAGES}_{ATTRIBUTES}", "the same for drawings instead of samples: about the best possible"),
    (f"{HELD_OUT_IMAGES}_{ATTRIBUTES}", "the same for drawings instead of samples: about the best possible"),
    (f"{OTHER_CAPTIONS}_{ATTRIBUTES}", "the same for drawings of other captions: chance"),
    (f"{HELD_OUT_IMAGES}_{CLIP_SCORE}", "the same for images of these captions instead of samples"),
    (f"{TEST_IMAGES}_{CLIP_SCORE}", "the same for images of these captions instead of samples"),
    (f"{OTHER_CAPTIONS}_{CLIP_SCORE}", "the same for images of other captions"),
    (CLIP_SCORE, "mean cosine of CLIP's embeddings of sample and caption, higher is better"),
    (f"{TEST_IMAGES}_{NEAREST_OF_TEN}", "the same for the pictures themselves: about the best possible"),
    (f"{HELD_OUT_IMAGES}_{NEAREST_OF_TEN}", "the same for the pictures themselves: about the best possible"),
    (f"{OTHER_CAPTIONS}_{NEAREST_OF_TEN}", "the same for pictures of other captions: chance"),
    (
        NEAREST_OF_TEN,
        "share of samples nearer to their own picture than to nine others, higher is better",
    ),
    (ATTRIBUTES, "share of the captions' attributes that are found in the samples, higher is better"),
    (f"{TEST_IMAGES}_{NEAREST}", "the same for test images; samples far below it are copies"),
    (TEST_IMAGES, "test images instead of samples: about the best possible at this count"),
    (MEAN_IMAGE, "the mean training image, repeated: a model must score better than this"),
    (UNTRAINED_NETWORK, "the same network before training"),
    (NEAREST, "mean feature distance from a sample to its nearest training image"),
    ("sfid", "Frechet distance of spatial features, lower is better"),
    ("inception_score", "mean over ten parts of the samples, higher is better"),
    ("kid", "unbiased kernel distance to the reference, lower is better"),
    ("precision", "fraction of samples that lie among the reference's images, higher is better"),
    ("recall", "fraction of the reference's images that lie among the samples, higher is better"),
    ("class_fid", "mean over classes of each class's distance, lower is better"),
)


def table(result: Result, workdir: Path) -> str:
    """Formats the result: one line per number with its meaning, and the paths of the written files."""
    student = "" if result.student_steps is None else f", {result.student_steps} student steps"
    lines = [
        f"{result.workdir}: {result.objective}{student}, step {result.checkpoint_step}, "
        f"{result.parameters} parameters; {result.sampling.steps} steps of {result.sampling.label}, "
        f"seed {result.seed}, rounding {result.sampling.rounding}"
    ]
    lines += _lines(result)
    lines.append(f"  sampled in {result.sampling_seconds:.1f} s, features in {result.features_seconds:.1f} s")
    lines.append(f"  {workdir / RESULTS}, {workdir / result.grid}")
    return "\n".join(lines)


def _lines(result: Result | ImagesResult) -> list[str]:
    lines = [
        f"  {name:<44} {value:>10{'.3f' if abs(value) >= 0.1 else '.6f'}}   {_meaning(name, result)}"
        for name, value in (result.metrics | result.bounds).items()
    ]
    if result.rank_deficient:
        lines.append(
            "  note: the samples or the reference have no more images than features, so their covariance is "
            "singular; compare only equal counts"
        )
    return lines


def _meaning(name: str, result: Result | ImagesResult) -> str:
    for start, meaning in _MEANINGS:
        if name.startswith(start):
            return meaning
    count, reference = count_of(name), result.reference
    if count != result.num_samples:
        return f"the distance of the first {count} samples, to compare with the test images"
    other = reference.file or f"the {reference.count} images of split {reference.split}"
    return f"Frechet distance to {other}, lower is better"
