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

import time
from pathlib import Path

from absl import flags

from mcm_jax.bench.trajectories_figure import trajectories_figure
from mcm_jax.reporting.reports import paper_tables, report
from mcm_jax.system import command_line, paths


def define_flags() -> None:
    """Called by the program, not on import: other programs have flags of the same names."""
    paths.define_path("runs", None, "Directory that holds the evaluated runs, at any depth.")
    flags.DEFINE_enum("figure", None, ["trajectories"], "Draw this figure in place of a page.")
    flags.DEFINE_bool("tables", False, "With --runs: the paper's tables beside our FIDs in place of a page.")
    flags.DEFINE_integer("seeds", 1, "Training seeds of every student in --figure.", lower_bound=1)
    paths.define_path("out", None, "Default: report.html in --runs, or the figure's name with .png.")
    flags.register_multi_flags_validator(
        ["runs", "figure"],
        lambda given: (given["runs"] is None) != (given["figure"] is None),
        message="give --runs=DIR for a page or --figure=NAME for a figure, one of them",
    )


def main() -> None:
    """Flags in, one call out."""
    if flags.FLAGS.figure:
        began = time.monotonic()
        out = flags.FLAGS.out or Path(f"{flags.FLAGS.figure}.png")
        print(trajectories_figure(out, seeds=flags.FLAGS.seeds))
        print(f"The figure, after {time.monotonic() - began:.0f} s: {out}")
        return
    runs = flags.FLAGS.runs
    if flags.FLAGS.tables:
        print(paper_tables(runs))
        return
    out = flags.FLAGS.out or runs / "report.html"
    print(report(runs, out))
    print(f"The page, with plots and samples: {out}")


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
