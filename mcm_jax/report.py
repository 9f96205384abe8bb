"""Writes what was measured as one page and one table.

    python -m mcm_jax.report --runs=runs

reads every `evaluation/results.jsonl` below runs/, writes `runs/report.html` (self-contained: pictures
inside), `runs/report.md` and `runs/report.png` (samples side by side) beside it, and prints the table.
"""

import sys
from pathlib import Path

from absl import flags

from mcm_jax import command_line
from mcm_jax.errors import InputError
from mcm_jax.files import write_asked_for
from mcm_jax.reporting import results


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


def define_flags() -> None:
    """Called by the program, not on import: other programs have flags of the same names."""
    flags.DEFINE_string("runs", None, "Directory that holds the evaluated runs, at any depth.", required=True)
    flags.DEFINE_string("out", None, "The page; default: report.html in --runs.")


def main() -> None:
    """Flags in, one call out."""
    runs = Path(flags.FLAGS.runs)
    out = Path(flags.FLAGS.out) if flags.FLAGS.out else runs / "report.html"
    print(report(runs, out))
    print(f"The page, with plots and samples: {out}")


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
