"""Writes a trained run as a folder to pass on: its parameters, or a sampler that needs only JAX.

python -m mcm_jax.export --workdir=runs/cd4 --out=exports/cd4 --format=safetensors
python -m mcm_jax.export --workdir=runs/cd4 --out=exports/cd4_sampler --format=stablehlo

The first folder has the layout of the Hugging Face hub (model.safetensors, config.json, README.md); every
program reads it like a workdir. The second one contains the sampler for CPUs, NVIDIA GPUs and TPUs, as a
function of parameters, a seed and class labels; its README.md shows how to run it without this package.
"""

from typing import TYPE_CHECKING, cast

from absl import flags

from mcm_jax.system import command_line, files, paths
from mcm_jax.system.errors import InputError

if TYPE_CHECKING:
    from mcm_jax.runs.workdirs import RunRecord

_WORKDIR = paths.define_path("workdir", None, "Directory of the run.", required=True)
_OUT = paths.define_path("out", None, "Directory to write; it must not exist, or be empty.", required=True)
_FORMAT = flags.DEFINE_enum(
    "format",
    None,
    ["safetensors", "stablehlo"],
    "safetensors: parameters, config and model card. stablehlo: the sampler as a program, with its "
    "parameters; not for runs on captions.",
    required=True,
)
_PARAMETERS = flags.DEFINE_enum("parameters", "ema", ["ema", "raw"], "Averaged or raw parameters.")
_CHECKPOINT_STEP = flags.DEFINE_integer(
    "checkpoint_step", None, "Training step of the checkpoint. Default: the newest one."
)
_STEPS = flags.DEFINE_integer(
    "steps", None, "With stablehlo: sampling steps. Default: the run's own.", lower_bound=1
)
_GUIDANCE = flags.DEFINE_float(
    "guidance",
    None,
    "With stablehlo: guidance weight g; 0 means none. Default: the run's own.",
    lower_bound=0,
)
_DATA_DIR = paths.define_path(
    "data_dir",
    None,
    "With stablehlo: directory of the prepared data sets, for a variance measured on training images. "
    "Default: where training found them.",
)


def main() -> None:
    """Writes the folder that the flags specify."""
    out = _OUT.value
    if _FORMAT.value == "safetensors":
        for flag in (_STEPS, _GUIDANCE, _DATA_DIR):
            if flag.value is not None:
                raise InputError(f"--{flag.name} applies only to --format=stablehlo; remove it")
    if files.entries(out):
        raise InputError(f"--out={out} is not empty; choose another directory")
    from mcm_jax.runs import workdirs  # Slow to import; --help and bad flags should not wait for it.

    record = workdirs.read(_WORKDIR.value)
    if _FORMAT.value == "stablehlo":
        _check_sampler(record)
    files.require_writable(out, "--out")
    print("\n".join(_write(record)))


def _check_sampler(record: "RunRecord") -> None:
    """Raises InputError for a run or for settings that can't be exported as a program."""
    from mcm_jax.exporting import programs
    from mcm_jax.runs import samplers

    programs.require_labels(record.dataset, _WORKDIR.value)
    samplers.resolve(record.config, steps=_STEPS.value, guidance=_GUIDANCE.value)


def _write(record: "RunRecord") -> list[str]:
    """Writes the folder; returns a description in lines."""
    from mcm_jax.exporting import folders
    from mcm_jax.runs.run import load_run
    from mcm_jax.training.checkpoints import Parameters

    out = _OUT.value
    run = load_run(
        _WORKDIR.value,
        parameters=cast(Parameters, _PARAMETERS.value),
        checkpoint_step=_CHECKPOINT_STEP.value,
        data_dir=None if _DATA_DIR.value is None else str(_DATA_DIR.value),
    )
    if _FORMAT.value == "safetensors":
        folders.write_model(run, record, out)
        raw = " --parameters=raw" if run.parameters == "raw" else ""
        command = f"python -m mcm_jax.sample --workdir={out}{raw} --num=16 --out=samples.png"
        return [f"{run}: {out}", f"next: {command}"]
    settings = run.sampling(steps=_STEPS.value, guidance=_GUIDANCE.value)
    comparison = folders.write_sampler(run, settings, record, out)
    return [
        f"{run}, {settings.steps} steps of {settings.label}: {out}",
        f"  {comparison}",
        f"  {out / folders.CARD} shows how to run it",
    ]


if __name__ == "__main__":
    command_line.run(main)
