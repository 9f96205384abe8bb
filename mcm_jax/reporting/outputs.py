"""Writes the files of the program `report`: the page, or the paper's tables beside our results."""

import sys

from mcm_jax.reporting import results
from mcm_jax.system.errors import InputError
from mcm_jax.system.files import write_output
from mcm_jax.system.paths import Path


def write_page(runs: Path, out: Path | None = None) -> str:
    """Writes the page to `out`, and its Markdown and a picture of samples next to it; returns the Markdown.

    Args:
      runs: directory of the runs.
      out: path of the page; None: report.html in `runs`.

    Raises:
      InputError: there are no results, a file is damaged, or `out` can't be written.
    """
    out = runs / "report.html" if out is None else out
    if out.suffix != ".html":
        raise InputError(f"--out={out} must end in .html; the Markdown table is written next to it as .md")
    collection = results.collect(runs)
    from mcm_jax.reporting import page  # Imports matplotlib, so only after the input has been checked.

    content = page.prepare(collection)
    markdown = page.markdown(content)
    write_output(out.with_suffix(".md"), markdown)
    write_output(out, page.page(content))
    picture = page.picture(content)
    if picture is not None:
        write_output(out.with_suffix(".png"), picture)
    for note in content.notes:
        print(f"note: {note}", file=sys.stderr)
    return markdown


def write_paper_tables(runs: Path) -> str:
    """Writes to `runs` the paper's tables beside our results, and a plot of samplers; returns the tables.

    Raises:
      InputError: there are no results, a file is damaged, or `runs` can't be written.
    """
    from mcm_jax.reporting import paper_tables

    collection = results.collect(runs)
    markdown = paper_tables.markdown(collection)
    write_output(runs / "tables.md", markdown)
    compared = paper_tables.samplers(collection)
    if compared is not None:
        from mcm_jax.reporting import plots  # Imports matplotlib.
        from mcm_jax.reporting.trajectories import png

        title = f"Samplers of {compared.run}"
        figure = plots.samplers_plot(compared.lines, title=title, distance=compared.distance)
        write_output(runs / "samplers.png", png(figure))
    for note in collection.notes:
        print(f"note: {note}", file=sys.stderr)
    return markdown
