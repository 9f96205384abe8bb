"""Writes what was measured as one page and one table, or trains and draws a figure.

    python -m mcm_jax.report --runs=runs

reads every `evaluation/results.jsonl` below runs/, writes `runs/report.html` (self-contained: pictures
inside), `runs/report.md` and `runs/report.png` (samples side by side) beside it, and prints the table.

    python -m mcm_jax.report --runs=runs --tables

puts the paper's tables 1 to 5 beside the FIDs measured in those runs into `runs/tables.md` and prints them,
and draws the samplers of a diffusion model against network calls into `runs/samplers.png`.

    python -m mcm_jax.report --figure=trajectories

needs no runs. In about a minute it trains students of 1, 2 and 4 steps on two Gaussians on a line, draws
their paths from noise to data beside the exact ones into `trajectories.png`, and prints how far their samples
are from the data; with --seeds=4 also the mean over four training seeds.
"""

import sys
import time
from pathlib import Path

import numpy as np
from absl import flags

from mcm_jax import command_line
from mcm_jax.errors import InputError
from mcm_jax.files import require_writable, write_asked_for
from mcm_jax.reporting import averages, results
from mcm_jax.reporting.tables import plural

FIGURE_STEPS = (1, 2, 4)
# Of exact samples, whose distance depends on how many fall to either side.
_DRAWS = 100


def report(runs: Path, out: Path | None = None) -> str:
    """Writes the page to `out`, the Markdown and a picture of samples beside it; returns the Markdown.

    out: default report.html in `runs`.

    Raises:
      InputError: nothing to report, a damaged file, or no place to write to.
    """
    out = runs / "report.html" if out is None else out
    if out.suffix != ".html":
        raise InputError(f"--out={out} must end in .html; the Markdown table is written beside it as .md")
    collection = results.collect(runs)
    from mcm_jax.reporting import page  # Imports matplotlib: bad input need not wait for it.

    content = page.prepare(collection)
    markdown = page.markdown(content)
    write_asked_for(out.with_suffix(".md"), markdown)
    write_asked_for(out, page.page(content))
    picture = page.picture(content)
    if picture is not None:
        write_asked_for(out.with_suffix(".png"), picture)
    for note in content.notes:
        print(f"note: {note}", file=sys.stderr)
    return markdown


def paper_tables(runs: Path) -> str:
    """Writes the paper's tables beside our results into `runs`, and the samplers' figure; returns the tables.

    Raises:
      InputError: no results, a damaged file, or no place to write to.
    """
    from mcm_jax.reporting import paper_tables as tables

    collection = results.collect(runs)
    markdown = tables.markdown(collection)
    write_asked_for(runs / "tables.md", markdown)
    compared = tables.samplers(collection)
    if compared is not None:
        from mcm_jax.reporting import plots  # Imports matplotlib.
        from mcm_jax.reporting.trajectories import png

        title = f"Samplers of {compared.run}"
        figure = plots.samplers_plot(compared.lines, title=title, distance=compared.distance)
        write_asked_for(runs / "samplers.png", png(figure))
    for note in collection.notes:
        print(f"note: {note}", file=sys.stderr)
    return markdown


def trajectories_figure(
    out: Path, *, seeds: int = 1, num_paths: int = 28, num_samples: int = 10_000, num_updates: int = 1500
) -> str:
    """Trains the students of FIGURE_STEPS, draws them into `out`; returns what was measured, in one line.

    Args:
      seeds: training seeds 0, ..., seeds - 1 of every student; the picture shows the first's.
      num_updates: of every student.

    Raises:
      InputError: no place to write to, found before anything is trained.
    """
    if out.suffix != ".png":
        raise InputError(f"--out={out} must end in .png")
    if out.is_dir():
        raise InputError(f"--out={out} is a directory; choose another path")
    require_writable(out.parent, "the directory of --out")
    # Slow to import: bad flags need not wait for JAX.
    from mcm_jax.bench import trajectories
    from mcm_jax.diffusion import mixtures
    from mcm_jax.reporting import trajectories as drawing

    mixture, z_1 = mixtures.two_components(), trajectories.starts(num_paths)
    flow = trajectories.exact(mixture, z_1, num_samples=num_samples)
    draws = trajectories.exact_distances(mixture, num_samples=num_samples, draws=_DRAWS)
    floor = f"{np.mean(draws):.4f} ± {np.std(draws):.4f} over {_DRAWS} draws"

    def panel(title, subtitle, found, boundaries):
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
        print(f"{title}: trained and sampled after {seconds:.0f} s", file=sys.stderr, flush=True)
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
    write_asked_for(out, drawing.png(figure))
    return (
        f"Squared Wasserstein distance of {num_samples:,} samples to the data: {', '.join(measured)}, "
        f"diffusion model {flow.distance:.4f}; exact samples {floor}"
    )


def define_flags() -> None:
    """Called by the program, not on import: other programs have flags of the same names."""
    flags.DEFINE_string("runs", None, "Directory that holds the evaluated runs, at any depth.")
    flags.DEFINE_enum("figure", None, ["trajectories"], "Draw this figure in place of a page.")
    flags.DEFINE_bool("tables", False, "With --runs: the paper's tables beside our FIDs in place of a page.")
    flags.DEFINE_integer("seeds", 1, "Training seeds of every student in --figure.", lower_bound=1)
    flags.DEFINE_string("out", None, "Default: report.html in --runs, or the figure's name with .png.")
    flags.register_multi_flags_validator(
        ["runs", "figure"],
        lambda given: (given["runs"] is None) != (given["figure"] is None),
        message="give --runs=DIR for a page or --figure=NAME for a figure, one of them",
    )


def main() -> None:
    """Flags in, one call out."""
    if flags.FLAGS.figure:
        began = time.monotonic()
        out = Path(flags.FLAGS.out or f"{flags.FLAGS.figure}.png")
        print(trajectories_figure(out, seeds=flags.FLAGS.seeds))
        print(f"The figure, after {time.monotonic() - began:.0f} s: {out}")
        return
    runs = Path(flags.FLAGS.runs)
    if flags.FLAGS.tables:
        print(paper_tables(runs))
        return
    out = Path(flags.FLAGS.out) if flags.FLAGS.out else runs / "report.html"
    print(report(runs, out))
    print(f"The page, with plots and samples: {out}")


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
