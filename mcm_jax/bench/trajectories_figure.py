"""Trains students and reproduces the paper's first figure; see the program `report`."""

import sys
import time

import numpy as np

from mcm_jax.reporting import averages
from mcm_jax.reporting.tables import plural
from mcm_jax.system.errors import InputError
from mcm_jax.system.files import require_output, write_output
from mcm_jax.system.paths import Path

FIGURE_STEPS = (1, 2, 4)
# Number of sets of exact samples; their distance varies with the number of samples in each mode.
_SETS = 100


def trajectories_figure(
    out: Path, *, seeds: int = 1, num_paths: int = 28, num_samples: int = 10_000, num_updates: int = 1500
) -> str:
    """Trains a student for each of FIGURE_STEPS, plots its paths to `out`, and returns the distances as text.

    Args:
      out: path of the PNG.
      seeds: number of training seeds (0, ..., seeds - 1) per student; the figure shows the first.
      num_paths: number of plotted paths.
      num_samples: number of samples for each distance.
      num_updates: number of training updates per student.

    Raises:
      InputError: `out` can't be written; raised before anything is trained.
    """
    if out.suffix != ".png":
        raise InputError(f"--out={out} must end in .png")
    require_output(out, "--out")
    # Slow to import, so only after the flags have been checked.
    from mcm_jax.bench import trajectories
    from mcm_jax.diffusion import mixtures
    from mcm_jax.reporting import trajectories as drawing

    mixture, z_1 = mixtures.two_components(), trajectories.starts(num_paths)
    flow = trajectories.exact(mixture, z_1, num_samples=num_samples)
    exact = trajectories.exact_distances(mixture, num_samples=num_samples, draws=_SETS)
    floor = f"{np.mean(exact):.4f} ± {np.std(exact):.4f} over {_SETS} draws"

    def panel(
        title: str, subtitle: str, found: trajectories.Trajectories, boundaries: np.ndarray
    ) -> drawing.Panel:
        return drawing.Panel(title, subtitle, found.t, found.z, boundaries, found.samples)

    panels, measured = [], []
    for student_steps in FIGURE_STEPS:
        title, began = plural(student_steps, "step"), time.monotonic()
        print(f"{title}: training for {num_updates} updates ...", file=sys.stderr, flush=True)
        found, *others = (
            trajectories.student(
                mixture,
                z_1,
                config=trajectories.student_config(student_steps, num_updates=num_updates, seed=seed),
                num_samples=num_samples,
            )
            for seed in range(seeds)
        )
        seconds = time.monotonic() - began
        print(f"{title}: trained and sampled in {seconds:.0f} s", file=sys.stderr, flush=True)
        subtitle = f"W₂² = {found.distance:.4f} (exact {flow.distance:.4f})"
        panels.append(panel(title, subtitle, found, np.arange(student_steps + 1) / student_steps))
        distances = [found.distance, *(other.distance for other in others)]
        error = averages.standard_error(distances)
        spread = f" ({np.mean(distances):.4f} ± {error:.4f} over {seeds} training seeds)" if others else ""
        measured.append(f"{title} {found.distance:.4f}{spread}")
    panels.append(panel("diffusion model", f"exact: W₂² = {flow.distance:.4f}", flow, np.array([0.0, 1.0])))
    t, z = np.linspace(1, 0, 201), np.linspace(-2.7, 2.7, 361)
    figure = drawing.trajectories_plot(
        panels,
        drawing.Marginals(t, z, trajectories.marginals(mixture, t, z)),
        caption=(
            f"Grey: exact densities. Outlines: {num_samples:,} samples from the same noise. "
            "W₂²: their squared Wasserstein distance to the data.\n"
            f"{num_samples:,} exact samples from other noise have {floor} (mean ± standard deviation)."
        ),
    )
    write_output(out, drawing.png(figure))
    return (
        f"Squared Wasserstein distance of {num_samples:,} samples to the data: {', '.join(measured)}, "
        f"diffusion model {flow.distance:.4f}; exact samples {floor}"
    )
