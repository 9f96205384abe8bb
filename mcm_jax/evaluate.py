"""Samples trained runs and scores the samples; one JSON line for each result.

    python -m mcm_jax.evaluate --workdir=runs/teacher,runs/cd4 --num=2048
    python -m mcm_jax.evaluate --workdir=runs/cd8 --num=50000 --features=inception

appends to `WORKDIR/evaluation/results.jsonl`, draws the first 64 samples beside it, and prints what the
numbers mean. Several workdirs, checkpoints, step counts and guidance weights in one call are combined with
each other, and share the compiled feature network and the reference statistics. What stands in the file already
is not measured again, so that the same command continues an interrupted one.
"""

import dataclasses
import datetime
import functools
import importlib.metadata
import itertools
import json
import time
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from mcm_jax import command_line, workdirs
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
    """The flags, see `define_flags`. None or no value: as the run says."""

    workdirs: tuple[Path, ...]
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
    cache_dir: Path = Path("data") / "reference_cache"
    untrained_num: int = 512
    again: bool = False

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
    """Scores every combination that `options` stand for; returns the records, old ones among them.

    load_run is `runs.load_run`. Raises InputError, before anything is sampled, for whatever the user
    must mend.
    """
    _check(options)
    evaluator = _Evaluator(options)
    loaders = _loaders(options, load_run)
    for workdir in options.workdirs:
        require_writable(workdir / RESULTS.parent, "the evaluation directory")
    records = []
    for kind, load in loaders:
        run = load()
        records += [evaluator(run, kind, how) for how in options.hows]
    return records


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


class _Evaluator:
    """What all results of one command share: the feature network, the references, the metrics."""

    def __init__(self, options: Options):
        network = _network(options)
        self.options = options
        self.metrics = options.metrics or DEFAULT_METRICS[options.features]
        protocol.check_metrics(self.metrics, network, num=options.num)
        self.extractor, self.cache = Extractor(network), Cache(options.cache_dir)
        self.published: Reference | None = None
        if options.reference is not None:
            self.published = published.read(options.reference, self.extractor)

    def __call__(self, run: Any, parameters: str, how: dict[str, Any]) -> dict[str, Any]:
        """The stored result of these inputs, or a new one, which is appended; either is printed."""
        workdir = Path(run.workdir)
        reference = self.published or self._reference(run, "train")
        inputs = {
            **_run_record(run, parameters),
            "seed": self.options.seed,
            **run.sampling_record(**how),
            "num_samples": self.options.num,
            "asked": list(self.metrics),
            "features": self.extractor.network.description,
            "reference": reference.description,
        }
        record = None if self.options.again else _stored(workdir, inputs)
        if record is None:
            print(
                f"{workdir}: sampling {self.options.num} images with its {parameters} parameters", flush=True
            )
            record = inputs | self._score(run, how, reference, name=_file_name(inputs))
            append_line(workdir / RESULTS, record)
        else:
            print(f"{workdir}: measured before, --again measures it again")
        print(table(record, workdir), flush=True)
        return record

    def _score(self, run: Any, how: dict[str, Any], reference: Reference, *, name: str) -> dict[str, Any]:
        """Samples, scores, bounds, and the grid that `name` names."""
        options, test = self.options, None
        if self.published is None and run.dataset.num_examples.get("test", 0) >= 2:
            test = self._reference(run, "test")
        samples = _Samples(run, options, how)
        scores = protocol.evaluate_samples(
            samples,
            self.extractor,
            reference,
            num=options.num,
            metrics=self.metrics,
            also_first=0 if test is None else test.count,
        )
        grid = RESULTS.parent / name
        scale = -(-_GRID_TILE // samples.first.shape[1])
        save_png(image_grid(samples.first, _GRID_COLUMNS, scale=scale), Path(run.workdir) / grid)
        return {
            "metrics": scores.metrics,
            "bounds": {} if self.published else self._bounds(run, how, reference, test),
            "rank_deficient": scores.rank_deficient,
            "grid": str(grid),
            "sampling_seconds": round(samples.seconds, 3),
            "features_seconds": round(scores.features_seconds, 3),
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "versions": {name: importlib.metadata.version(name) for name in ("jax", "flax", "mcm_jax")},
        }

    def _bounds(
        self, run: Any, how: dict[str, Any], reference: Reference, test: Reference | None
    ) -> dict[str, float]:
        num = min(self.options.untrained_num, self.options.num)

        def untrained() -> Blocks:
            yield run.untrained().sample(num, seed=self.options.seed, **how)

        return protocol.floors_and_ceilings(
            self.extractor,
            self.cache,
            reference=reference,
            reference_images=lambda: run.blocks("train"),
            test=test,
            untrained_images=untrained,
            untrained_num=num,
            untrained_identity=_untrained_identity(run, self.options.seed, run.sampling_record(**how)),
        )

    def _reference(self, run: Any, split: str) -> Reference:
        info = run.dataset
        identity = {
            "fingerprint": info.fingerprints[split],
            "dataset": info.dataset,
            "resolution": info.resolution,
            "preprocessing": str(info.preprocessing),
        }
        return self.cache.reference(
            self.extractor, split=split, identity=identity, images=lambda: run.blocks(split)
        )


def _network(options: Options) -> FeatureNetwork:
    if options.features == "inception":
        return inception_weights.load(options.inception).network()
    if options.reference is not None:
        raise InputError(
            f"--reference={options.reference} is of Inception's features; add --features=inception"
        )
    return efficientnet.network(efficientnet.load(), input_resolution=options.input_resolution)


def _stored(workdir: Path, inputs: dict[str, Any]) -> dict[str, Any] | None:
    """The newest result of these inputs in the run's file, unless the checkpoint was written since."""
    try:
        lines = (workdir / RESULTS).read_bytes().split(b"\n")
    except FileNotFoundError:
        return None
    # As they come back from the file: tuples are lists there.
    inputs = json.loads(json.dumps(inputs))
    for line in reversed(lines):
        try:
            record = json.loads(line)
            same = all(record[name] == value for name, value in inputs.items())
            created = datetime.datetime.fromisoformat(record["created"]).timestamp() if same else 0.0
        except (ValueError, KeyError, TypeError):  # Cut off, or of an older version.
            continue
        if same:
            checkpoint = workdir / workdirs.CHECKPOINTS / str(inputs["checkpoint_step"])
            return None if checkpoint.exists() and checkpoint.stat().st_mtime > created + 1 else record
    return None


def _file_name(inputs: dict[str, Any]) -> str:
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


class _Samples:
    """The run's samples in blocks; remembers the first few and the time it took."""

    def __init__(self, run: Any, options: Options, how: dict[str, Any]):
        self._run, self._options, self._how = run, options, how
        self.first: np.ndarray = np.zeros((0,), np.uint8)
        self.seconds = 0.0

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        options = self._options
        for first in range(0, options.num, _BLOCK):
            start = time.monotonic()
            count = min(_BLOCK, options.num - first)
            images, labels = self._run.sample(count, seed=options.seed, first=first, **self._how)
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


def _untrained_identity(run: Any, seed: int, sampling: dict[str, Any]) -> dict[str, Any]:
    """The config but for what only training reads: teacher and students share their untrained network."""
    config = dataclasses.asdict(run.config)
    for section in _TRAINING_ONLY:
        config.pop(section, None)
    return {"config": config, "seed": seed, **sampling}


def _check(options: Options) -> None:
    if not options.workdirs:
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


# Flags that are not as Options wants them.
_READ_APART = (
    *("workdirs", "cache_dir", "inception", "reference", "metrics"),
    *("steps", "checkpoint_step", "guidance"),
)


def _numbers(flag: str, given: list[str], kind: Callable[[str], Any]) -> tuple[Any, ...]:
    try:
        return tuple(kind(text) for text in given)
    except ValueError as error:
        raise InputError(f"--{flag}={','.join(given)}: it must be numbers separated by commas") from error


def main() -> None:
    """Flags in, one call out."""
    # Slow to import: --help and bad flags need not wait for it.
    from mcm_jax import distributed, runs

    values = flags.FLAGS
    options = Options(
        workdirs=tuple(Path(workdir) for workdir in values.workdir),
        cache_dir=Path(values.cache_dir),
        inception=Path(values.inception),
        reference=None if values.reference is None else Path(values.reference),
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
    with distributed.alone("evaluate"):
        evaluate(options, runs.load_run)


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
