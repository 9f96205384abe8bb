"""Measures the cells that are missing and writes the report; see the program `findings`."""

import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from mcm_jax.system.errors import InputError
from mcm_jax.system.files import require_writable, write_whole

SETTINGS = ("mixture", "mixture2d", "openmoji")


def run(
    out: Path,
    *,
    settings: Sequence[str] = SETTINGS,
    seeds: int = 3,
    quick: bool = False,
    choices: bool = False,
    report_only: bool = False,
) -> str:
    """Measures what is missing, writes the report, returns its Markdown.

    Args:
      out: the directory of results, report and runs.
      settings: which of SETTINGS.
      seeds: 0, ..., seeds - 1; at least 2.
      quick: training so short that the numbers mean little: to see that everything runs.
      choices: also the open choices of `bench.choices`.
      report_only: measure nothing.

    Raises:
      InputError: bad arguments, or a file of results that is none.
    """
    if seeds < 2:
        raise InputError(f"--seeds={seeds}: a standard error needs at least 2")
    if not settings:
        raise InputError(f"--settings is empty: name some of {', '.join(SETTINGS)}")
    for setting in settings:
        if setting not in SETTINGS:
            raise InputError(f"--settings: {setting} is none of {', '.join(SETTINGS)}")
    if report_only and not (out / "results.jsonl").is_file():
        raise InputError(f"--out={out} has no results.jsonl to report; measure first")
    require_writable(out, "--out")
    # Slow to import: --help and bad flags need not wait for it.
    from mcm_jax.bench import cells, findings, report
    from mcm_jax.bench import choices as open_choices

    # One cache of compiled programs for all cells, so that a second start is fast.
    cache = os.environ.setdefault("MCM_COMPILATION_CACHE", str((out / "xla_cache").absolute()))
    jax.config.update("jax_compilation_cache_dir", cache)
    benches = {name: _bench(name, out, quick=quick) for name in settings}
    chosen = {name: setting for name, (setting, _) in benches.items()}
    store = cells.Store(out / "results.jsonl", chosen)
    if not report_only:
        # Bad places for data are found before the first cell.
        for name, measure in [(name, make()) for name, (_, make) in benches.items()]:
            wanted = findings.cells_of(chosen[name].findings(), name, range(seeds))
            if choices:
                wanted += open_choices.cells_of(chosen[name].choices(), name, range(seeds))
            if any(cell not in store for cell in wanted):
                print(f"== {name}: {len(wanted)} cells", flush=True)
                cells.run(wanted, store, measure)
    markdown = report.markdown(store, chosen, range(seeds), quick=quick)
    write_whole(out / "findings.md", markdown)
    write_whole(out / "findings.png", report.plot(store, chosen, range(seeds)))
    return markdown


def _bench(name: str, out: Path, *, quick: bool) -> tuple[Any, Any]:
    """(setting, what makes its bench): a bench prepares data, which a report does not need."""
    from mcm_jax.bench import mixture, openmoji

    if name == "openmoji":
        setting = openmoji.QUICK if quick else openmoji.OPENMOJI
        return setting, functools.partial(openmoji.Bench, setting, out / "openmoji")
    if name == "mixture2d":
        setting = mixture.QUICK_2D if quick else mixture.MIXTURE_2D
    else:
        setting = mixture.QUICK if quick else mixture.MIXTURE_64D
    return setting, functools.partial(mixture.Bench, setting)
