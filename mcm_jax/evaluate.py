"""Samples trained runs and scores the samples; one JSON line for each result.

    python -m mcm_jax.evaluate --workdir=runs/teacher,runs/cd4 --num=2048
    python -m mcm_jax.evaluate --workdir=runs/cd8 --num=50000 --features=inception

appends to `WORKDIR/evaluation/results.jsonl`, draws the first 64 samples beside it, and prints what the
numbers mean. Several workdirs, checkpoints, step counts and guidance weights in one call are combined with
each other, and share the compiled feature network and the reference statistics. What stands in the file
already is not measured again, so that the same command continues an interrupted one.

    python -m mcm_jax.evaluate --images=samples.npz --features=inception --reference=imagenet64.npz

scores images that any program made, uint8 under arr_0 or a folder of PNGs, prints the numbers, and with
--results=FILE appends them there.
"""

import dataclasses
import functools
import itertools
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from absl import flags

from mcm_jax import command_line, distributed, workdirs
from mcm_jax.diffusion.schedules import Grid
from mcm_jax.errors import InputError
from mcm_jax.evaluation import efficientnet, image_files, inception_weights, protocol
from mcm_jax.evaluation.features import FeatureNetwork
from mcm_jax.evaluator import RESULTS, Draws, Evaluator
from mcm_jax.files import append_line, require_writable
from mcm_jax.sampling import Sampler, XVar

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
    inception: Path = Path("data") / inception_weights.FILE
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
        """Every combination of the sampler's settings, for `runs.Run.sample`."""
        fixed = {name: getattr(self, name) for name in ("sampler", "noise_grid", "x_var")}
        return [
            {"steps": steps, **fixed, "guidance": guidance}
            for steps in self.steps or (None,)
            for guidance in self.guidance or (None,)
        ]


def evaluate(options: Options, load_run: Callable[..., Any]) -> list[dict[str, Any]]:
    """Scores every combination that `options` stand for; the first process returns the records, old ones too.

    load_run is `runs.load_run`. Raises InputError, before anything is sampled, for whatever the user
    must mend.
    """
    with distributed.together():
        _check(options)
        network = _network(options, num=options.num)
    distributed.require_same((options, network.description), "flags and weights")
    loaders = _loaders(options, load_run)
    for workdir in options.workdirs:
        with distributed.together():
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
            if distributed.of_first(record is None):
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
    with distributed.together():
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


def define_flags() -> None:
    """Called by the program, not on import: other programs have flags of the same names."""
    flags.DEFINE_list("workdir", None, "Run(s) to evaluate, separated by commas.")
    flags.DEFINE_string(
        "images", None, "Images of another program to evaluate in place of runs: an .npz (arr_0) or a folder."
    )
    flags.DEFINE_string("results", None, "With --images: file that the result is appended to.")
    flags.register_multi_flags_validator(
        ["workdir", "images"],
        lambda given: (given["workdir"] is None) != (given["images"] is None),
        message="give --workdir=DIR of a run or --images=PATH, one of them",
    )
    flags.DEFINE_integer("num", Options.num, "Samples per result.", lower_bound=2)
    flags.DEFINE_list("steps", [], "Sampling steps, several separated by commas; default: the run's own.")
    flags.DEFINE_enum("sampler", None, SAMPLERS, "Default: the run's own.")
    flags.DEFINE_enum("noise_grid", None, NOISE_GRIDS, "Noise levels; default: the run's own.")
    flags.DEFINE_enum(
        "x_var", None, X_VARS, "Variance of addim and noisy_ddim; measured: on training images, once."
    )
    flags.DEFINE_list("guidance", [], "g, 0 is none, several; default: the run's own.")
    flags.DEFINE_integer(
        "seed", Options.seed, "Image n depends on (seed, n) only.", lower_bound=0, upper_bound=2**32 - 1
    )
    flags.DEFINE_enum("parameters", Options.parameters, tuple(PARAMETERS), "Which parameters to sample with.")
    flags.DEFINE_list("checkpoint_step", [], "Updates of the checkpoint, several; default: the last one.")
    flags.DEFINE_bool("again", False, "Also what was measured before, which is left as it is.")
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
        "File of statistics as ADM, EDM and others publish, or directory of a prepared data set; default: "
        "the run's training images.",
    )
    flags.DEFINE_enum("reference_split", "train", ["train", "test"], "Of that data set.")
    flags.DEFINE_integer(
        "input_resolution",
        Options.input_resolution,
        "Side that images are resized to for efficientnet; distances compare only where it is equal.",
        lower_bound=efficientnet.MIN_INPUT_RESOLUTION,
    )
    flags.DEFINE_bool(
        "allow_singular",
        False,
        "Also a FID of no more samples than features (2,048), to see that all works: it says little.",
    )
    flags.DEFINE_string("cache_dir", str(Options.cache_dir), "Where reference statistics are kept.")
    flags.DEFINE_integer(
        "untrained_num", Options.untrained_num, "Samples of the untrained network; 0: none.", lower_bound=0
    )


# Flags that are not as Options wants them.
_READ_APART = (
    *("workdirs", "images", "results", "cache_dir", "inception", "reference", "metrics"),
    *("steps", "checkpoint_step", "guidance"),
)


def _path(given: str | None) -> Path | None:
    return None if given is None else Path(given).expanduser()


def _numbers(flag: str, given: list[str], kind: Callable[[str], Any]) -> tuple[Any, ...]:
    try:
        return tuple(kind(text) for text in given)
    except ValueError as error:
        raise InputError(f"--{flag}={','.join(given)}: it must be numbers separated by commas") from error


def main() -> None:
    """Flags in, one call out."""
    from mcm_jax import runs  # Slow to import: --help and bad flags need not wait for it.

    values = flags.FLAGS
    options = Options(
        workdirs=tuple(Path(workdir) for workdir in values.workdir or ()),
        **{name: _path(getattr(values, name)) for name in ("images", "results", "reference")},
        cache_dir=Path(values.cache_dir).expanduser(),
        inception=Path(values.inception).expanduser(),
        metrics=None if values.metrics is None else tuple(values.metrics),
        steps=_numbers("steps", values.steps, int),
        checkpoint_step=_numbers("checkpoint_step", values.checkpoint_step, int),
        guidance=_numbers("guidance", values.guidance, float),
        **{
            field.name: getattr(values, field.name)
            for field in dataclasses.fields(Options)
            if field.name not in _READ_APART
        },
    )
    if options.workdirs:
        cache = workdirs.compilation_cache(options.workdirs[0])
        jax.config.update("jax_compilation_cache_dir", str(cache))
    with distributed.joined():
        if options.images is not None:
            evaluate_images(options)
        else:
            evaluate(options, runs.load_run)


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
