"""Measures the paper's findings on problems for two CPU cores, and reports which of them hold there.

    python -m mcm_jax.findings
    python -m mcm_jax.findings --quick

Each finding is a set of differences whose sign the paper predicts; mcm_jax/bench/findings.py defines the
decision rule. Each result is stored in OUT/results.jsonl as soon as it is measured, so that the same command
continues after an interruption. OUT/findings.md and OUT/findings.png are written at the end; --report_only
writes them from the results so far.
"""

from absl import flags

from mcm_jax.bench.runner import METHODS, PROBLEMS, STUDIES, run
from mcm_jax.system import command_line, paths
from mcm_jax.system.errors import InputError
from mcm_jax.system.paths import as_path


def define_flags() -> None:
    """Defines the flags; not done on import, because other programs define flags with the same names."""
    paths.define_path(
        "out",
        None,
        "Directory of the results; reuse it to continue. Default: runs/findings or runs/findings_quick.",
    )
    flags.DEFINE_list("problems", list(PROBLEMS), "Problems on which to measure the findings.")
    flags.DEFINE_integer(
        "seeds", None, "Number of training seeds. Default: 3; with --quick 2.", lower_bound=2
    )
    flags.DEFINE_bool("quick", False, "Train only for seconds, to check that everything runs.")
    flags.DEFINE_bool("choices", False, "Also measure the choices that the paper leaves open.")
    flags.DEFINE_list(
        "methods",
        [],
        f"Compare methods for few steps on these problems instead; some of {','.join(METHODS)}. See "
        "bench/methods.py.",
    )
    flags.DEFINE_list(
        "studies",
        [],
        f"Measure studies on mixtures instead; some of {','.join(STUDIES)}. See bench/studies.py.",
    )
    flags.DEFINE_bool("report_only", False, "Measure nothing; write the report from the stored results.")


def main() -> None:
    """Measures the findings that the flags specify."""
    values = flags.FLAGS
    seeds = values.seeds or (2 if values.quick else 3)
    kind = "methods" if values.methods else "studies" if values.studies else "findings"
    out = values.out or as_path(f"runs/{kind}{'_quick' * values.quick}")
    if kind != "findings":
        others = values.choices or values.report_only or flags.FLAGS["problems"].present
        if others or (values.methods and values.studies):
            raise InputError(
                f"--{kind} can't be combined with --problems, --choices, --report_only or another "
                "comparison; leave them out"
            )
    if kind == "methods":
        from mcm_jax.bench import methods  # Slow to import.

        print(f"\n{methods.run(out, values.methods, seeds=seeds, quick=values.quick)}\n{out}")
        return
    if kind == "studies":
        from mcm_jax.bench import studies  # Slow to import.

        print(f"\n{studies.run(out, values.studies, seeds=seeds, quick=values.quick)}\n{out}")
        return
    markdown = run(
        out,
        problems=values.problems,
        seeds=seeds,
        quick=values.quick,
        choices=values.choices,
        report_only=values.report_only,
    )
    print(f"\n{markdown}\n{out / 'findings.md'}, {out / 'findings.png'}")


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
