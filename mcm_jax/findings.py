"""Measures the paper's findings at a scale that two cores hold, and says which of them hold here.

    python -m mcm_jax.findings
    python -m mcm_jax.findings --quick

Every finding is a set of differences whose sign the paper tells; the rule that decides stands in
mcm_jax/bench/findings.py. Results are stored as they end, in OUT/results.jsonl: the same command continues.
OUT/findings.md and OUT/findings.png are written at the end; --report_only writes them from what there is.
"""

from pathlib import Path

from absl import flags

from mcm_jax.bench.runner import SETTINGS, run
from mcm_jax.system import command_line, paths


def define_flags() -> None:
    """Called by the program, not on import: other programs have flags of the same names."""
    paths.define_path(
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
    out = values.out or Path("runs/findings_quick" if values.quick else "runs/findings")
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
