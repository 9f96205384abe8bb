"""Writes results as a page and a table, or trains models for a figure and draws it.

    python -m mcm_jax.report --runs=runs

This reads each `evaluation/results.jsonl` under runs/, writes `runs/report.html` (self-contained, including
images), `runs/report.md` and `runs/report.png` (samples side by side), and prints the tables.

    python -m mcm_jax.report --runs=runs --tables

This writes the paper's tables with the FIDs measured in those runs to `runs/tables.md`, prints them,
and plots the distances of a diffusion model's samplers against network calls in `runs/samplers.png`.

With --prompts=FILE, --runs lists directories of runs on captions. The figure prompts.png shows the prompts in
FILE, one per line, drawn by each run from the same noise, with the time per image.

    python -m mcm_jax.report --runs=runs/smoke --demo=demo.html

This samples all runs in that directory from the same noise, with 1 to 16 steps, and writes a self-contained
page to look at the pictures and at the prediction of each step.

    python -m mcm_jax.report --figure=trajectories

This needs no runs. In about a minute it trains students of 1, 2 and 4 steps on a mixture of two Gaussians in
one dimension, plots their paths from noise to data next to the exact ones in `trajectories.png`, and prints
the distance between their samples and the data. With --seeds=4 it also prints the mean over four training
seeds.
"""

import time

from absl import flags

from mcm_jax.bench.trajectories_figure import trajectories_figure
from mcm_jax.reporting.outputs import write_page, write_paper_tables
from mcm_jax.system import command_line, paths
from mcm_jax.system.errors import InputError
from mcm_jax.system.paths import as_path


def define_flags() -> None:
    """Defines the flags; not done on import, because other programs define flags with the same names."""
    paths.define_paths(
        "runs",
        None,
        "Directory that contains the runs, at any depth; evaluated ones, except for --demo. With --prompts: "
        "directories of runs, separated by commas.",
    )
    flags.DEFINE_enum("figure", None, ["trajectories"], "Draw this figure instead of writing a page.")
    flags.DEFINE_bool("tables", False, "With --runs: write the paper's tables with our FIDs, not a page.")
    paths.define_path("prompts", None, "With --runs: draw a figure of these prompts, one on each line.")
    paths.define_path(
        "text_encoder", None, "With --prompts: directory of the text encoder. Default: the installed one."
    )
    paths.define_path(
        "demo", None, "With --runs: write this page (.html), which shows samples with 1 to 16 steps."
    )
    flags.DEFINE_integer("seeds", 1, "With --figure: number of training seeds per student.", lower_bound=1)
    paths.define_path(
        "out", None, "File to write. Default: report.html in --runs, FIGURE.png, or prompts.png."
    )
    flags.register_multi_flags_validator(
        ["runs", "figure"],
        lambda given: (given["runs"] is None) != (given["figure"] is None),
        message="give either --runs=DIR for a page or --figure=NAME for a figure",
    )


def main() -> None:
    """Writes the page, tables or figure that the flags specify."""
    _check()
    if flags.FLAGS.figure:
        began = time.monotonic()
        out = flags.FLAGS.out or as_path(f"{flags.FLAGS.figure}.png")
        print(trajectories_figure(out, seeds=flags.FLAGS.seeds))
        print(f"Drawn in {time.monotonic() - began:.0f} s: {out}")
        return
    if flags.FLAGS.prompts is not None:
        from mcm_jax.reporting.prompts_figure import prompts_figure  # Slow to import.

        out = flags.FLAGS.out or as_path("prompts.png")
        encoder = flags.FLAGS.text_encoder
        print(prompts_figure(flags.FLAGS.runs, flags.FLAGS.prompts, out, text_encoder=encoder))
        print(f"The figure: {out}")
        return
    (runs,) = flags.FLAGS.runs
    if flags.FLAGS.demo is not None:
        from mcm_jax.reporting.demo import write_demo  # Imports matplotlib.

        print(write_demo(runs, flags.FLAGS.demo))
        print(f"The page: {flags.FLAGS.demo}")
        return
    if flags.FLAGS.tables:
        print(write_paper_tables(runs))
        return
    out = flags.FLAGS.out or runs / "report.html"
    print(write_page(runs, out))
    print(f"The page with plots and samples: {out}")


def _check() -> None:
    """Raises InputError for flags that exclude each other or have no effect."""
    values = flags.FLAGS
    if values.runs is not None and not values.runs:
        raise InputError("--runs is empty; give the directory that contains the evaluated runs")
    others = [values.prompts is not None, values.figure is not None, values.demo is not None]
    if sum([*others, values.tables]) > 1:
        raise InputError("--prompts, --figure, --demo and --tables exclude each other; give one of them")
    if values.prompts is None and len(values.runs or ()) > 1:
        raise InputError("--runs is one directory with all runs; several apply only to --prompts=FILE")
    if values.prompts is None and values.text_encoder is not None:
        raise InputError("--text_encoder applies only to --prompts; remove it")
    if values.tables and values.out is not None:
        raise InputError("--out does not apply to --tables, which writes tables.md to --runs; remove it")
    if values.demo is not None and values.out is not None:
        raise InputError("--out does not apply to --demo, which names the file itself; remove it")
    if values.figure is None and values.seeds != 1:
        raise InputError("--seeds applies only to --figure; remove it")


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
