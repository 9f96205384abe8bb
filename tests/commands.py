"""The commands that documents, docstrings and launchers show: found, checked, and run to their end in small.

Programs run inside the tests' process, where compiled code and imported libraries are shared: starting Python
anew would take longer than most of what is run.

    for command in commands.in_text(Path("docs/start.md").read_text(), "docs/start.md"):
        commands.check(command)               # flags, config and validation; a launcher's dry run
    commands.run(command, "--num=4")          # to its end, in the current directory
"""

import ast
import contextlib
import dataclasses
import io
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from absl import flags

from mcm_jax.config import validation
from mcm_jax.system import command_line, host

ROOT = Path(__file__).parents[1]
# A command stands at the start of a line (or after a prompt, a comment's # or a colon) or in backquotes.
_PROGRAM = r"(?:\w+=\S+ )*python -m mcm_jax\.\w+"
_LAUNCHER = r"(?:\w+=\S+ )*(?:bash|sbatch) launch/[\w/]+\.(?:sh|sbatch)"
_START = rf"(?P<command>(?:{_PROGRAM}|{_LAUNCHER})\b"
_LINE = re.compile(rf"^(?:[$+#>] *|.*: )?(?:srun (?:--\S+ )*)?{_START}.*)$")
_INLINE = re.compile(rf"`{_START}[^`]*)`")
_TRAIN = ("python", "-m", "mcm_jax.train")
_ELISIONS = ("..", "ARGUMENT")


@dataclasses.dataclass(frozen=True)
class Command:
    """A command and where it was found.

    Attributes:
      where: a file's name.
      words: the words as the shell passes them on, without settings of the environment.
    """

    where: str
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.where}: {shlex.join(self.words)}"

    @property
    def program(self) -> str | None:
        """ "train" of `python -m mcm_jax.train`; None for a launcher."""
        return self.words[2].removeprefix("mcm_jax.") if self.words[0] == "python" else None

    @property
    def arguments(self) -> tuple[str, ...]:
        """The words after the program's or launcher's name."""
        return self.words[3 if self.program else 2 :]


def in_text(text: str, where: str) -> list[Command]:
    """The commands in Markdown, a docstring, a script's head or the output of a dry run, each once.

    Lines that end in a backslash are continued, and comments removed. Commands with an elision (`...`) are
    skipped, and so are names of programs in running text (`python -m mcm_jax.train`).
    """
    text = re.sub(r"\\\n(?:#| )*", " ", text)
    lines = [found["command"] for line in text.splitlines() if (found := _LINE.match(line.strip()))]
    inline = [found["command"] for found in _INLINE.finditer(" ".join(text.split()))]
    commands = [Command(where, _words(line)) for line in lines]
    commands += [each for each in (Command(where, _words(text)) for text in inline) if not _is_name(each)]
    return [each for each in dict.fromkeys(commands) if not any(part in str(each) for part in _ELISIONS)]


def _words(line: str) -> tuple[str, ...]:
    """The command's words; three spaces separate it from an explanation."""
    words = shlex.split(re.split(r"   +| &&", line)[0], comments=True)
    while "=" in words[0]:
        words.pop(0)
    return tuple(words)


def _is_name(command: Command) -> bool:
    return command.program is not None and not command.arguments


def in_docstring(path: Path) -> list[Command]:
    """The commands in the docstring of a Python file."""
    return in_text(ast.get_docstring(ast.parse(path.read_text())) or "", path.name)


def in_head(script: str) -> list[Command]:
    """The commands in the comments of a launcher."""
    lines = (ROOT / script).read_text().splitlines()
    return in_text("\n".join(line for line in lines if line.startswith("#")), script)


def in_dry_run(script: str, *arguments: str) -> list[Command]:
    """The commands of programs that a launcher would run."""
    environment = os.environ | {
        "MCM_DRY_RUN": "1",
        "MCM_VENV": "/nonexistent",
        "PYTHON": sys.executable,
    }
    done = subprocess.run(
        ["bash", script, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return in_text(done.stdout, script)


def check(command: Command) -> None:
    """Parses a program's flags and validates its config; for a launcher, those of the programs it would run.

    Raises:
      InputError, AssertionError: the program, or the launcher, would refuse it.
    """
    if command.program is None:
        for each in in_dry_run(command.words[1], *command.arguments):
            check(each)
        if "--" in command.arguments:
            rest = command.arguments[command.arguments.index("--") + 1 :]
            check(Command(command.where, rest if rest[0] == "python" else (*_TRAIN, *rest)))
        return

    def parse(main: object) -> None:
        command_line._parse_flags(sys.argv)
        if "config" in flags.FLAGS and flags.FLAGS["config"].value is not None:
            config = command_line.loaded_config(flags.FLAGS["config"])
            if command.program == "plan" and config.objective != "diffusion":
                config.teacher_checkpoint = "runs/teacher"  # Which a plan does not need.
            validation.validate(config)

    with mock.patch.object(command_line, "run", parse), _process(command, ()):
        runpy.run_module(f"mcm_jax.{command.program}", run_name="__main__")


def run(command: Command, *small: str) -> str:
    """Runs a program to its end and returns its output.

    Args:
      small: arguments to add, which make it short; they replace the command's own of the same names.
    """
    with _process(command, small) as output:
        code = None
        try:
            runpy.run_module(f"mcm_jax.{command.program}", run_name="__main__")
        except SystemExit as end:
            code = end.code
        assert code in (None, 0), f"{command} {shlex.join(small)}\n{output()}"
        return output()


@contextlib.contextmanager
def _process(command: Command, small: tuple[str, ...]) -> Iterator[object]:
    """Arguments, flags and environment as in a new process, and afterwards as they were before."""
    known, parsed = set(flags.FLAGS), flags.FLAGS.is_parsed()
    argv = [f"mcm_jax.{command.program}", *command.arguments, *small]
    streams = [io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2)]

    def output() -> str:
        return "".join(stream.buffer.getvalue().decode() for stream in streams)

    with (
        mock.patch.object(sys, "argv", argv),
        mock.patch.dict(os.environ, MCM_NUM_PROCESSES="1"),
        # Its settings are for the whole life of a process.
        mock.patch.object(host, "tune"),
        contextlib.redirect_stdout(streams[0]),
        contextlib.redirect_stderr(streams[1]),
    ):
        try:
            yield output
        finally:
            for name in set(flags.FLAGS) - known:
                definer = flags.FLAGS.find_module_defining_flag(name)
                # Other flags belong to libraries that were imported meanwhile.
                if "." in name or str(definer).startswith("mcm_jax."):
                    delattr(flags.FLAGS, name)
            if not parsed:
                flags.FLAGS.unparse_flags()
