"""Writes what was measured: the page, or the paper's tables beside our results; see the program `report`."""

import sys
from pathlib import Path

from mcm_jax.reporting import results
from mcm_jax.system.errors import InputError
from mcm_jax.system.files import write_asked_for

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
