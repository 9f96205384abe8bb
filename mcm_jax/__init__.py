"""Multistep Consistency Models (Heek, Hoogeboom, Salimans 2024) in JAX and Flax NNX.

Examples:
  >>> import mcm_jax
  >>> run = mcm_jax.load("runs/cd4")
  >>> images, labels = run.sample(64)  # uint8 [64, r, r, 3], int32 [64]
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from mcm_jax.runs.run import Run
    from mcm_jax.training.checkpoints import Parameters

# The only place that defines the version, so that it is known even without the package's metadata.
__version__ = "0.1.0"


def load(
    workdir: "str | Path",
    *,
    parameters: "Parameters" = "ema",
    checkpoint_step: int | None = None,
    data_dir: "str | Path | None" = None,
) -> "Run":
    """Loads the trained run in `workdir` to sample from; see `runs.run.load_run`."""
    from mcm_jax.runs.run import load_run  # Keeps `import mcm_jax` and --help fast.

    return load_run(workdir, parameters=parameters, checkpoint_step=checkpoint_step, data_dir=data_dir)
