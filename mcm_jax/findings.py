"""Measures the paper's findings at a scale that two cores hold, and says which of them hold here.

    python -m mcm_jax.findings
    python -m mcm_jax.findings --quick

Every finding is a set of differences whose sign the paper tells; the rule that decides stands in
mcm_jax/bench/findings.py. Results are stored as they end, in OUT/results.jsonl: the same command continues.
OUT/findings.md and OUT/findings.png are written at the end; --report_only writes them from what there is.
"""

import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags

from mcm_jax import command_line
from mcm_jax.errors import InputError
from mcm_jax.files import require_writable, write_whole

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


def define_flags() -> None:
    """Called by the program, not on import: other programs have flags of the same names."""
    flags.DEFINE_string(
        "out",
        None,
        "Directory of the results; the same one continues. Default: runs/findings, or runs/findings_quick.",
    )
    flags.DEFINE_list("settings", list(SETTINGS), f"Which of {', '.join(SETTINGS)}.")
    flags.DEFINE_integer("seeds", None, "How many training seeds; default: 3, --quick 2.", lower_bound=2)
    flags.DEFINE_bool("quick", False, "Trainings of seconds: shows that everything runs, not what holds.")
    flags.DEFINE_bool("choices", False, "Also measure the choices that the paper leaves open.")
    flags.DEFINE_bool("report_only", False, "Write the report from the results there are.")


def main() -> None:
    """Flags in, one call out."""
    values = flags.FLAGS
    out = Path(values.out or ("runs/findings_quick" if values.quick else "runs/findings"))
    markdown = run(
        out,
        settings=values.settings,
        seeds=values.seeds or (2 if values.quick else 3),
        quick=values.quick,
        choices=values.choices,
        report_only=values.report_only,
    )
    print(f"\n{markdown}\n{out / 'findings.md'}, {out / 'findings.png'}")


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
