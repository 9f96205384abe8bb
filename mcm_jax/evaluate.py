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
from collections.abc import Callable
from typing import Any

import jax
from absl import flags

from mcm_jax.evaluation import efficientnet, protocol
from mcm_jax.evaluation.scoring import (
    DEFAULT_METRICS,
    NOISE_GRIDS,
    PARAMETERS,
    SAMPLERS,
    X_VARS,
    Options,
    evaluate,
    evaluate_images,
)
from mcm_jax.runs import workdirs
from mcm_jax.system import command_line, distributed, paths
from mcm_jax.system.errors import InputError


def define_flags() -> None:
    """Called by the program, not on import: other programs have flags of the same names."""
    paths.define_paths("workdir", None, "Run(s) to evaluate, separated by commas.")
    paths.define_path(
        "images", None, "Images of another program to evaluate in place of runs: an .npz (arr_0) or a folder."
    )
    paths.define_path("results", None, "With --images: file that the result is appended to.")
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
    paths.define_path("data_dir", None, "Where the prepared data is; default: where the run found it.")
    flags.DEFINE_enum(
        "features",
        Options.features,
        tuple(DEFAULT_METRICS),
        "inception: those of FID, whose weights you bring; efficientnet: a proxy that is installed.",
    )
    paths.define_path(
        "inception",
        Options.inception,
        "Inception's weights, as mcm_jax.prepare --inception=FILE left them.",
    )
    flags.DEFINE_list("metrics", None, f"Of {', '.join(protocol.METRICS)}; default: those that cost little.")
    paths.define_path(
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
    paths.define_path("cache_dir", Options.cache_dir, "Where reference statistics are kept.")
    flags.DEFINE_integer(
        "untrained_num", Options.untrained_num, "Samples of the untrained network; 0: none.", lower_bound=0
    )


# Flags that are not as Options wants them.
_READ_APART = (*("workdirs", "data_dir", "metrics", "steps", "checkpoint_step", "guidance"),)


def _numbers(flag: str, given: list[str], kind: Callable[[str], Any]) -> tuple[Any, ...]:
    try:
        return tuple(kind(text) for text in given)
    except ValueError as error:
        raise InputError(f"--{flag}={','.join(given)}: it must be numbers separated by commas") from error


def main() -> None:
    """Flags in, one call out."""
    from mcm_jax.runs.run import load_run  # Slow to import: --help and bad flags need not wait for it.

    values = flags.FLAGS
    options = Options(
        workdirs=tuple(values.workdir or ()),
        data_dir=None if values.data_dir is None else str(values.data_dir),
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
            evaluate(options, load_run)


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
