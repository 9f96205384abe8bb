"""Mutation testing of the mathematics: every small mistake in it must make a test fail.

    python -m tests.mutants
    python -m tests.mutants --only mcm_jax/diffusion/steps.py:addim --kinds sign,time --verbose

A mutant is a module with one changed expression: a sign, the index of a time, an exponent, a stop-gradient,
the axis of a mean, a constant and so on (tests/mutations.py). The tests of the mathematics run against it,
those of its own module first, and stop at the first failure: the mutant is killed. A mutant that passes all
tests has survived. Then either a test is missing, or the mutant is equivalent: its results do not differ.
Equivalent mutants are listed with a reason in tests/equivalent_mutants.toml and are not run. Exit code 1:
other mutants survived; 2: the run is inconclusive, as the tests fail without a mutation or no mutant was
chosen.

Nothing is written into the checkout. The parent process imports the libraries once but starts no JAX backend.
For every mutant, a forked child runs pytest in a temporary copy of package and tests. All children share a
JAX compilation cache, so most of what a mutant runs is already compiled.
"""

import argparse
import dataclasses
import gc
import importlib
import multiprocessing
import multiprocessing.connection
import os
import shutil
import signal
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

from tests.libraries import LIBRARIES
from tests.mutations import KINDS, Mutant, mutants_of

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("mcm_jax/diffusion/*.py", "mcm_jax/objectives/*.py")
TESTS = ("tests/diffusion/test_*.py", "tests/objectives/test_*.py")
EQUIVALENT = "tests/equivalent_mutants.toml"

# A mutant counts as hanging after this multiple of the tests' time without a mutation, plus a minute.
TIME_FACTOR = 4


@dataclasses.dataclass(frozen=True)
class Outcome:
    mutant: Mutant | None  # None: without a mutation
    killer: str | None  # the test that failed, or another cause of the end; None: the mutant survived
    seconds: float
    log: str


class FirstFailure:
    """A child's pytest plugin: records which test failed and keeps hypothesis from shrinking its example."""

    def __init__(self, note: Path):
        self.note = note

    def pytest_configure(self):
        import hypothesis

        phases = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
        hypothesis.settings.register_profile("mutants", hypothesis.settings(), phases=phases)
        hypothesis.settings.load_profile("mutants")

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.note.write_text(report.nodeid)

    pytest_collectreport = pytest_runtest_logreport


def tests_of(path: str, root: Path) -> list[str]:
    """All test files of the mathematics: this module's first, then its directory's, then the others."""
    own = Path("tests", *Path(path).parts[1:-1], f"test_{Path(path).name}")
    tests = [test.relative_to(root) for pattern in TESTS for test in sorted(root.glob(pattern))]
    return [str(test) for test in sorted(tests, key=lambda test: (test != own, test.parent != own.parent))]


def run_tests(directory: Path, mutant: Mutant | None, root: Path, limit_seconds: int) -> None:
    """Runs in a child: exits with pytest's exit code, or is killed by SIGALRM after limit_seconds."""
    import pytest

    signal.alarm(limit_seconds)
    log = os.open(directory / "log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    for part in ("mcm_jax", "tests"):
        shutil.copytree(root / part, directory / part, ignore=shutil.ignore_patterns("__pycache__"))
    for part in ("setup.cfg", "pyproject.toml"):
        shutil.copy(root / part, directory)
    if mutant:
        (directory / mutant.path).write_text(mutant.source)
    for name in [name for name in sys.modules if name.partition(".")[0] in ("mcm_jax", "tests")]:
        del sys.modules[name]
    sys.path.insert(0, str(directory))
    sys.dont_write_bytecode = True
    os.chdir(directory)
    arguments = ["-x", "-q", "-p", "no:cacheprovider", *tests_of(mutant.path if mutant else "", root)]
    sys.exit(pytest.main(arguments, plugins=[FirstFailure(directory / "failed")]))


def run(
    mutants: list[Mutant | None], *, root: Path, processes: int = 1, limit_seconds: int = 3600
) -> Iterator[Outcome]:
    """Runs the tests against each mutant, `processes` at a time; yields outcomes as they finish."""
    fork, waiting, running = multiprocessing.get_context("fork"), list(reversed(mutants)), {}
    with tempfile.TemporaryDirectory() as scratch:
        while waiting or running:
            while waiting and len(running) < processes:
                mutant, directory = waiting.pop(), Path(tempfile.mkdtemp(dir=scratch))
                arguments = (directory, mutant, root, limit_seconds)
                child = fork.Process(target=run_tests, args=arguments, daemon=True)
                child.start()
                running[child.sentinel] = child, mutant, directory, time.monotonic()
            for sentinel in multiprocessing.connection.wait(list(running)):
                child, mutant, directory, start = running.pop(sentinel)
                child.join()
                seconds, note = time.monotonic() - start, directory / "failed"
                killer = note.read_text() if note.exists() else f"exit code {child.exitcode}"
                killer = {0: None, -signal.SIGALRM: "out of time"}.get(child.exitcode, killer)
                yield Outcome(mutant, killer, seconds, (directory / "log").read_text(errors="replace"))
                shutil.rmtree(directory)


def warm_up(cache: str) -> None:
    """Imports the libraries, after setting the environment variables that JAX reads on import.

    Children do not search the libraries' objects for garbage, which would also copy their memory.
    """
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["JAX_COMPILATION_CACHE_DIR"] = cache
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    for library in LIBRARIES:
        importlib.import_module(library)
    gc.collect()
    gc.freeze()


def equivalents(root: Path) -> set[Mutant]:
    """The mutants listed as equivalent; they compare by path, function, kind, before and after."""
    listed = tomllib.loads((root / EQUIVALENT).read_text()).get("equivalent", [])
    for entry in listed:
        if not entry.pop("why", ""):
            raise SystemExit(f"{EQUIVALENT}: give a reason (why = ...) for {entry}")
    return {Mutant(**entry, line=0, source="") for entry in listed}


def arguments_of(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.mutants",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--only",
        metavar="PATH[:FUNCTION]",
        action="append",
        help="a directory, module or function; repeatable",
    )
    add("--kinds", metavar="KIND,KIND", default=",".join(KINDS), help="default: %(default)s")
    add("--equivalent", action="store_true", help="run only mutants listed as equivalent; all must survive")
    add("--list", action="store_true", help="print the mutants and run nothing")
    add("--verbose", action="store_true", help="print what killed each mutant")
    add("--processes", metavar="N", type=int, default=2, help="mutants in parallel (default: %(default)s)")
    add("--root", metavar="DIRECTORY", type=Path, default=ROOT, help="the checkout (default: this one)")
    arguments = parser.parse_args(argv)
    arguments.kinds = arguments.kinds.split(",")
    if unknown := set(arguments.kinds) - set(KINDS):
        parser.error(f"--kinds: {', '.join(sorted(unknown))} is not one of {', '.join(KINDS)}")
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Runs the program and returns its exit code."""
    arguments, console = arguments_of(argv), Console(soft_wrap=True, markup=False, highlight=False)
    root = arguments.root.resolve()
    paths = [path for pattern in SOURCES for path in sorted(root.glob(pattern))]
    made = [m for path in paths for m in mutants_of(str(path.relative_to(root)), path.read_text())]
    listed = equivalents(root)
    for mutant in listed - set(made):
        console.print(f"{EQUIVALENT} lists a mutant that no longer exists: {mutant}")
    chosen = [m for m in made if m.kind in arguments.kinds]
    if arguments.only:
        chosen = [m for m in chosen if f"{m.path}:{m.function}".startswith(tuple(arguments.only))]
    mutants = [m for m in chosen if (m in listed) == arguments.equivalent]
    if arguments.list:
        console.print("\n".join(map(str, mutants)))
    left_out = f"{len(chosen) - len(mutants)} {'not ' * arguments.equivalent}listed as equivalent skipped"
    console.print(f"{len(mutants)} of {len(made)} mutants chosen, {left_out}.")
    if arguments.list or not mutants:
        return 0 if mutants else 2
    with tempfile.TemporaryDirectory() as cache:
        warm_up(cache)
        [unmutated] = run([None], root=root)
        if unmutated.killer:
            console.print(unmutated.log, f"The tests fail without any mutation: {unmutated.killer}")
            return 2
        killed = show(mutants, unmutated.seconds, arguments, console)
    return int(killed != (0 if arguments.equivalent else len(mutants)))


def show(
    mutants: list[Mutant], unmutated_seconds: float, arguments: argparse.Namespace, console: Console
) -> int:
    """Runs the tests against the mutants, prints the survivors, and returns the number of killed mutants."""
    start, killed, limit_seconds = time.monotonic(), 0, round(60 + TIME_FACTOR * unmutated_seconds)
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    # No automatic refresh, because it runs in a thread, and forks do not copy threads.
    with Progress(*columns, console=console, auto_refresh=False) as progress:
        task = progress.add_task("mutants", total=len(mutants))
        progress.refresh()
        for outcome in run(
            mutants,
            root=arguments.root.resolve(),
            processes=arguments.processes,
            limit_seconds=limit_seconds,
        ):
            killed += outcome.killer is not None
            if outcome.killer is None or arguments.verbose:
                verdict = f"killed by {outcome.killer}" if outcome.killer else "SURVIVED"
                console.print(f"{outcome.mutant}\n  {verdict} ({outcome.seconds:.1f} s)")
            progress.advance(task)
            progress.refresh()
    seconds = time.monotonic() - start
    console.print(
        f"{killed} killed, {len(mutants) - killed} survived in {seconds / 60:.0f} minutes: "
        f"{seconds / len(mutants):.1f} seconds per mutant, {arguments.processes} at a time; "
        f"all tests without a mutation take {unmutated_seconds:.0f} seconds."
    )
    return killed


if __name__ == "__main__":
    sys.exit(main())
