"""Samples images from a trained run, as a PNG grid or as arrays.

python -m mcm_jax.sample --workdir=runs/cd4 --num=64 --out=grid.png
python -m mcm_jax.sample --workdir=runs/cd4 --num=50000 --out=samples.npz --format=adm

The second command writes a file for ADM's evaluator or `mcm_jax.evaluate --images`. A run that was trained on
captions draws --prompt="a red planet with a ring", or each line of --prompts=FILE.
"""

import sys
import warnings
from typing import TYPE_CHECKING, cast

import numpy as np
from absl import flags

from mcm_jax.records import SamplingOptions, lists_times
from mcm_jax.system import command_line, paths
from mcm_jax.system.errors import InputError
from mcm_jax.system.files import require_output, write_output
from mcm_jax.system.paths import Path
from mcm_jax.system.pictures import image_grid, save_png
from mcm_jax.text import prompts as texts

if TYPE_CHECKING:
    from mcm_jax.runs.run import Run

_WORKDIR = paths.define_path("workdir", None, "Directory of the run.", required=True)
_OUT = paths.define_path(
    "out",
    None,
    "FILE.png writes a grid; FILE.npz writes arr_0 (uint8 images [N, r, r, 3]) and arr_1 (int32 labels).",
    required=True,
)
# The suffix of --out that each format requires.
_FORMATS = {"grid": ".png", "adm": ".npz"}
_FORMAT = flags.DEFINE_enum(
    "format",
    None,
    list(_FORMATS),
    "grid, or adm for the .npz that ADM's evaluator reads. Default: from the suffix of --out.",
)
_NUM = flags.DEFINE_integer("num", 64, "Number of images.", lower_bound=1)
_STEPS = flags.DEFINE_integer("steps", None, "Sampling steps. Default: the run's own.", lower_bound=1)
_SAMPLER = flags.DEFINE_enum(
    "sampler",
    None,
    ["ddim", "addim", "noisy_ddim", "ddpm", "heun", "consistency"],
    "Default: the run's own. heun calls the network twice in each step except the last; consistency, for "
    "consistency models of one step, adds new noise in each step.",
)
_NOISE_GRIDS = ("schedule", "karras", "published_cd", "published_ct")
_NOISE_GRID = flags.DEFINE_string(
    "noise_grid",
    None,
    f"Noise levels: {', '.join(_NOISE_GRIDS)}, or times such as 1,1/2,1/4, from noise (1) towards data (0), "
    "at which the network is called. Default: the run's own.",
)
_X_VAR = flags.DEFINE_enum(
    "x_var",
    None,
    ["analytic", "measured"],
    "Variance for addim and noisy_ddim; measured: on training images, once. Default: the run's own.",
)
_GUIDANCE = flags.DEFINE_float(
    "guidance", None, "Guidance weight g; 0 means none. Default: the run's own.", lower_bound=0
)
_GUIDE = paths.define_path(
    "guide",
    None,
    "Autoguidance: directory of a worse diffusion model, from which --guidance moves away. Default: the run "
    "itself, without class or caption.",
)
_ROUNDING = flags.DEFINE_enum(
    "rounding", "nearest", ["nearest", "floor"], "How pixels are rounded to bytes; ADM's scripts use floor."
)
_SEED = flags.DEFINE_integer(
    "seed", 0, "Image n depends only on (seed, n).", lower_bound=0, upper_bound=2**32 - 1
)
_LABEL = flags.DEFINE_integer("label", None, "Class of all images. Default: drawn at random.", lower_bound=0)
_PROMPT = flags.DEFINE_string(
    "prompt", None, "Text to image: caption of all images. Default: captions of the test split."
)
_PROMPTS = paths.define_path(
    "prompts", None, "Text to image: file with one caption per line, for one image each."
)
_TEXT_ENCODER = paths.define_path(
    "text_encoder", None, "Directory of the text encoder for --prompt. Default: the installed one."
)
_PARAMETERS = flags.DEFINE_enum("parameters", "ema", ["ema", "raw"], "Averaged or raw parameters.")
_CHECKPOINT_STEP = flags.DEFINE_integer(
    "checkpoint_step", None, "Training step of the checkpoint. Default: the newest one."
)
_DATA_DIR = paths.define_path(
    "data_dir", None, "Directory of the prepared data sets. Default: where training found them."
)
_BATCH = flags.DEFINE_integer(
    "batch_per_device", None, "Images that a device samples at once. Default: the run's own.", lower_bound=1
)
_COLUMNS = flags.DEFINE_integer("columns", 8, "Images in each row of the grid.", lower_bound=1)


def main() -> None:
    """Draws the samples that the flags specify and writes one file."""
    out = _OUT.value
    if out.suffix not in _FORMATS.values():
        raise InputError(f"--out={out} must end in .png (a grid) or .npz (arrays)")
    if _FORMAT.value is not None and out.suffix != _FORMATS[_FORMAT.value]:
        raise InputError(f"--out={out} must end in {_FORMATS[_FORMAT.value]} for --format={_FORMAT.value}")
    grid = _NOISE_GRID.value
    if grid is not None and grid not in _NOISE_GRIDS and not lists_times(grid):
        raise InputError(
            f"--noise_grid={grid} is not one of {', '.join(_NOISE_GRIDS)}, or times such as 1,1/2"
        )
    require_output(out, "--out")
    from mcm_jax.system import distributed  # Slow to import; --help and bad flags should not wait for it.

    with distributed.joined():
        _sample_to(out)


def _sample_to(out: Path) -> None:
    """All processes sample together; the first one writes."""
    from mcm_jax.runs.run import load_run
    from mcm_jax.system import distributed
    from mcm_jax.training.checkpoints import Parameters

    run = load_run(
        _WORKDIR.value,
        parameters=cast(Parameters, _PARAMETERS.value),
        checkpoint_step=_CHECKPOINT_STEP.value,
        data_dir=None if _DATA_DIR.value is None else str(_DATA_DIR.value),
    )
    if _GUIDE.value is not None:
        if _GUIDANCE.value == 0:
            raise InputError(f"--guide={_GUIDE.value} has no effect with --guidance=0; remove one of them")
        run = run.guided_by(load_run(_GUIDE.value))
    labels, prompts = None, _prompts()
    if prompts is not None:
        encoder = run.text_encoder(_TEXT_ENCODER.value)
        if distributed.is_first():
            for note in texts.notes(encoder, prompts):
                print(note, file=sys.stderr)
    if _LABEL.value is not None:
        if _LABEL.value >= run.dataset.num_classes:
            names = ", ".join(f"{n} {name}" for n, name in enumerate(run.dataset.class_names[:20]))
            raise InputError(
                f"--label={_LABEL.value} is not one of the {run.dataset.num_classes} classes: {names}"
            )
        labels = np.full(_NUM.value, _LABEL.value, np.int32)
    num = _NUM.value if prompts is None else len(prompts)
    images, labels = _sample(run, num, labels, prompts, show=distributed.is_first())
    if not distributed.is_first():
        return
    if out.suffix == ".npz":
        write_output(out, lambda file: np.savez(file, images, labels))
    else:
        scale = max(1, 64 // images.shape[1])
        save_png(image_grid(images, _COLUMNS.value, scale=scale), out)
    settings = run.sampling(**_sampling_options())
    print(
        f"{len(images)} images, {settings.steps} steps of {settings.sampler}, seed {_SEED.value}, "
        f"rounding {settings.rounding}: {out}"
    )


def _prompts() -> list[str] | None:
    """The captions that the flags specify, one for each image; None without them.

    Raises:
      InputError: there are too many flags, or the file can't be read.
    """
    given = {"--label": _LABEL.value, "--prompt": _PROMPT.value, "--prompts": _PROMPTS.value}
    if len([name for name, value in given.items() if value is not None]) > 1:
        raise InputError("--label, --prompt and --prompts exclude each other; give one of them")
    if _PROMPT.value is not None:
        prompts = [_PROMPT.value] * _NUM.value
    elif _PROMPTS.value is not None:
        prompts = texts.read(_PROMPTS.value)
        if flags.FLAGS["num"].present:
            raise InputError("--num does not apply to --prompts, which has a line for each image; remove it")
    else:
        return None
    return prompts


def _sample(
    run: "Run", num: int, labels: np.ndarray | None, prompts: list[str] | None, *, show: bool
) -> tuple[np.ndarray, np.ndarray]:
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True, quiet=not show)
    with warnings.catch_warnings(), Progress(console=console) as bar:
        warnings.showwarning = lambda message, *_, **__: console.print(f"warning: {message}", soft_wrap=True)
        task = bar.add_task("sampling", total=num)
        return run.sample(
            num,
            seed=_SEED.value,
            labels=labels,
            prompts=prompts,
            batch_per_device=_BATCH.value,
            progress=lambda count: bar.advance(task, count),
            **_sampling_options(),
        )


def _sampling_options() -> SamplingOptions:
    return {
        "steps": _STEPS.value,
        "sampler": _SAMPLER.value,
        "noise_grid": _NOISE_GRID.value,
        "x_var": _X_VAR.value,
        "guidance": _GUIDANCE.value,
        "rounding": _ROUNDING.value,
    }


if __name__ == "__main__":
    command_line.run(main)
