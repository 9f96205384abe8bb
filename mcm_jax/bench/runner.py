"""Measures missing cells and summarises all of them; see the program `findings`."""

import functools
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax

from mcm_jax.bench.cells import RESULTS
from mcm_jax.system.errors import InputError
from mcm_jax.system.files import require_writable, write_whole
from mcm_jax.system.paths import Path, absolute

if TYPE_CHECKING:  # Slow to import.
    from collections.abc import Callable

    from mcm_jax.bench import mixture, openmoji
    from mcm_jax.bench.cells import Cell, Values

PROBLEMS = ("mixture", "mixture2d", "openmoji")
METHODS = ("mixture", "avatars")  # problems of bench.methods, which is slow to import
STUDIES = ("median", "annealing", "teachers", "one_student")  # of bench.studies, which is slow to import


def run(
    out: Path,
    *,
    problems: Sequence[str] = PROBLEMS,
    seeds: int = 3,
    quick: bool = False,
    choices: bool = False,
    report_only: bool = False,
) -> str:
    """Measures the missing cells, writes the summary, and returns its Markdown.

    Args:
      out: directory of the results, the summary and the runs.
      problems: names from PROBLEMS.
      seeds: number of seeds (0, ..., seeds - 1), at least 2.
      quick: train only briefly, to check that everything runs; the numbers mean little.
      choices: also measure the open choices of `bench.choices`.
      report_only: measure nothing.

    Raises:
      InputError: an argument is invalid, or the results file holds something else.
    """
    if not problems:
        raise InputError(f"--problems is empty; give some of {', '.join(PROBLEMS)}")
    for problem in problems:
        if problem not in PROBLEMS:
            raise InputError(f"--problems: {problem} is not one of {', '.join(PROBLEMS)}")
    if report_only and not (out / RESULTS).is_file():
        raise InputError(f"--out={out} has no {RESULTS} to report; measure first")
    start(out, seeds)
    # Slow to import, so only after the flags have been checked.
    from mcm_jax.bench import cells, findings, summary
    from mcm_jax.bench import choices as open_choices

    benches = {name: _bench(name, out, quick=quick) for name in problems}
    chosen = {name: problem for name, (problem, _) in benches.items()}
    store = cells.Store(out / RESULTS, chosen)
    if not report_only:
        # Create all benches before measuring the first cell, so that a bad data directory is found at once.
        for name, measure in [(name, make()) for name, (_, make) in benches.items()]:
            wanted = findings.cells_of(chosen[name].findings(), name, range(seeds))
            if choices:
                wanted += open_choices.cells_of(chosen[name].choices(), name, range(seeds))
            if any(cell not in store for cell in wanted):
                print(f"== {name}: {len(wanted)} cells", flush=True)
                cells.run(wanted, store, measure)
    markdown = summary.markdown(store, chosen, range(seeds), quick=quick)
    write_whole(out / "findings.md", markdown)
    write_whole(out / "findings.png", summary.plot(store, chosen, range(seeds)))
    return markdown


def start(out: Path, seeds: int) -> None:
    """Checks what every measurement needs, and lets its cells share a cache of compiled programs in `out`.

    Raises:
      InputError: there are too few seeds for a standard error, or OUT can't be written.
    """
    if seeds < 2:
        raise InputError(f"--seeds={seeds}: a standard error needs at least 2")
    require_writable(out, "--out")
    cache = os.environ.setdefault("MCM_COMPILATION_CACHE", str(absolute(out / "xla_cache")))
    jax.config.update("jax_compilation_cache_dir", cache)


def _bench(
    name: str, out: Path, *, quick: bool
) -> "tuple[mixture.Problem | openmoji.Problem, Callable[[], Callable[[Cell], Values]]]":
    """Returns the problem and a function that creates its bench and prepares data, needed only to measure."""
    from mcm_jax.bench import mixture, openmoji

    if name == "openmoji":
        problem = openmoji.QUICK if quick else openmoji.OPENMOJI
        return problem, functools.partial(openmoji.Bench, problem, out / "openmoji")
    if name == "mixture2d":
        problem = mixture.QUICK_2D if quick else mixture.MIXTURE_2D
    else:
        problem = mixture.QUICK if quick else mixture.MIXTURE_64D
    return problem, functools.partial(mixture.Bench, problem)
