"""Samples from trained runs and scores the samples; writes one JSON line per result.

    python -m mcm_jax.evaluate --workdir=runs/teacher,runs/cd4 --num=2048
    python -m mcm_jax.evaluate --workdir=runs/cd8 --num=50000 --features=inception

These append to `WORKDIR/evaluation/results.jsonl`, save a grid of the first 64 samples next to it, and print
an explanation of the numbers. Several workdirs, checkpoints, numbers of steps and guidance weights are
evaluated in all combinations, with the same compiled feature network and reference statistics. Results that
are already in the file are not measured again, so the same command continues an interrupted evaluation.

    python -m mcm_jax.evaluate --images=samples.npz --features=inception --reference=imagenet64.npz

This scores images from any program (an .npz with uint8 images in arr_0, or a folder of images), prints the
numbers, and with --results=FILE appends them to that file.
"""

import dataclasses
from collections.abc import Callable
from typing import TypeVar

import jax
from absl import flags

from mcm_jax.evaluation import efficientnet, protocol
from mcm_jax.evaluation.scoring import (
    DEFAULT_METRICS,
    NOISE_GRIDS,
    PARAMETERS,
    ROUNDINGS,
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
    """Defines the flags; not done on import, because other programs define flags with the same names."""
    paths.define_paths("workdir", None, "Directories of the runs to evaluate, separated by commas.")
    paths.define_path("images", None, "Images to evaluate instead of runs: an .npz (arr_0) or a folder.")
    paths.define_path("results", None, "With --images: append the result to this file.")
    flags.register_multi_flags_validator(
        ["workdir", "images"],
        lambda given: (given["workdir"] is None) != (given["images"] is None),
        message="give either --workdir=DIR of a run or --images=PATH",
    )
    flags.DEFINE_integer("num", Options.num, "Samples for each result.", lower_bound=2)
    flags.DEFINE_list("steps", [], "Sampling steps, separated by commas. Default: the run's own.")
    flags.DEFINE_enum("sampler", None, SAMPLERS, "Default: the run's own.")
    flags.DEFINE_string(
        "noise_grid",
        None,
        f"Noise levels: {', '.join(NOISE_GRIDS)}, or times such as 1,1/2,1/4, at which the network is "
        "called. Default: the run's own.",
    )
    flags.DEFINE_enum(
        "x_var",
        None,
        X_VARS,
        "Variance for addim and noisy_ddim; measured: on training images, once. Default: the run's own.",
    )
    flags.DEFINE_list(
        "guidance", [], "Guidance weights, separated by commas; 0 means none. Default: the run's own."
    )
    paths.define_path(
        "guide",
        None,
        "Autoguidance: directory of a worse diffusion model, from which --guidance moves away. Default: the "
        "run itself, without class or caption.",
    )
    flags.DEFINE_list(
        "captions",
        [],
        "Splits from which captions are drawn, separated by commas: test, heldout. Default: test.",
    )
    flags.DEFINE_enum(
        "rounding", Options.rounding, ROUNDINGS, "How pixels are rounded to bytes; ADM's scripts use floor."
    )
    flags.DEFINE_integer(
        "seed", Options.seed, "Image n depends only on (seed, n).", lower_bound=0, upper_bound=2**32 - 1
    )
    flags.DEFINE_enum("parameters", Options.parameters, tuple(PARAMETERS), "Averaged or raw parameters.")
    flags.DEFINE_list(
        "checkpoint_step", [], "Training steps of checkpoints, separated by commas. Default: the newest one."
    )
    flags.DEFINE_bool("again", False, "Measure again even if a result exists; old lines are kept.")
    paths.define_path(
        "data_dir", None, "Directory of the prepared data sets. Default: where training found them."
    )
    flags.DEFINE_enum(
        "features",
        Options.features,
        tuple(DEFAULT_METRICS),
        "inception: the features of FID; dinov2: those of FD-DINOv2; you provide the weights of both. "
        "efficientnet: an installed proxy.",
    )
    paths.define_path(
        "inception",
        Options.inception,
        "Inception's weights, as converted by mcm_jax.prepare --inception=FILE.",
    )
    paths.define_path(
        "dinov2",
        None,
        "Directory of DINOv2 ViT-L/14 as transformers writes it (config.json, model.safetensors).",
    )
    flags.DEFINE_list("metrics", None, f"Some of {', '.join(protocol.METRICS)}. Default: the cheap ones.")
    paths.define_path(
        "reference",
        None,
        "File of statistics as published for ADM, EDM and others, or directory of a prepared data set. "
        "Default: the run's training images.",
    )
    flags.DEFINE_enum(
        "reference_split", "train", ["train", "test"], "Split of the data set given by --reference."
    )
    flags.DEFINE_integer(
        "input_resolution",
        Options.input_resolution,
        "Height and width of images for efficientnet; distances are comparable only at equal resolutions.",
        lower_bound=efficientnet.MIN_INPUT_RESOLUTION,
    )
    flags.DEFINE_bool(
        "allow_singular",
        False,
        "Compute FID or FD-DINOv2 even if there are no more samples than features (2,048 or 1,024). Such a "
        "value means little.",
    )
    paths.define_path(
        "clip",
        None,
        "Directory of a CLIP as transformers writes it; adds the CLIP score of runs on captions.",
    )
    paths.define_path("cache_dir", Options.cache_dir, "Cache of reference statistics.")
    flags.DEFINE_integer(
        "untrained_num",
        Options.untrained_num,
        "Number of samples of the untrained network to compare with; 0 for none. Not used with --reference.",
        lower_bound=0,
    )


# Flags that are converted before they are passed to Options.
_CONVERTED = ("workdirs", "data_dir", "metrics", "steps", "checkpoint_step", "guidance", "captions")


_Number = TypeVar("_Number", int, float)


def _numbers(flag: str, given: list[str], kind: Callable[[str], _Number]) -> tuple[_Number, ...]:
    try:
        return tuple(kind(text) for text in given)
    except ValueError as error:
        raise InputError(f"--{flag}={','.join(given)}: must be numbers separated by commas") from error


def main() -> None:
    """Evaluates the runs or images that the flags specify."""
    from mcm_jax.runs.run import load_run  # Slow to import; --help and bad flags should not wait for it.

    values = flags.FLAGS
    options = Options(
        workdirs=tuple(values.workdir or ()),
        data_dir=None if values.data_dir is None else str(values.data_dir),
        metrics=None if values.metrics is None else tuple(values.metrics),
        steps=_numbers("steps", values.steps, int),
        checkpoint_step=_numbers("checkpoint_step", values.checkpoint_step, int),
        guidance=_numbers("guidance", values.guidance, float),
        captions=tuple(values.captions),
        **{
            field.name: getattr(values, field.name)
            for field in dataclasses.fields(Options)
            if field.name not in _CONVERTED
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
