"""Finds, checks and runs, at reduced size, the commands shown in documents, docstrings and launchers.

Programs run in the tests' own process, which shares compiled code and imported libraries: starting Python
again would take longer than most commands.

    script = commands.script_of("docs/start.md")    # the blocks of a page, as a reader would paste them
    for command in commands.in_text(text, "docs/start.md"):
        commands.check(command)                     # flags, config and validation; a launcher's dry run
    commands.run(command, "--num=4")                # to the end, in the current directory
    Shell(directory, serve).run(script)             # Bash, with its commands answered by `serve`
"""

import ast
import contextlib
import dataclasses
import io
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from unittest import mock

from absl import flags

from mcm_jax.config import validation
from mcm_jax.system import command_line, host

ROOT = Path(__file__).parents[1]
# A command is at the start of a line (or after a prompt, a comment's # or a colon) or in backquotes.
_PROGRAM = r"(?:\w+=\S+ )*python -m mcm_jax\.\w+"
_LAUNCHER = r"(?:\w+=\S+ )*(?:bash|sbatch) launch/[\w/]+\.(?:sh|sbatch)"
_START = rf"(?P<command>(?:{_PROGRAM}|{_LAUNCHER})\b"
_LINE = re.compile(rf"^(?:[$+#>] *|.*: |.*   )?(?:srun (?:--\S+ )*)?{_START}.*)$")
_INLINE = re.compile(rf"`{_START}[^`]*)`")
_BLOCK = re.compile(r"^```(bash|console|python|sh|shell)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_OTHER_BLOCK = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
# Other tools in running text, such as `mkdocs serve`, and python -m with modules outside mcm_jax.
_TOOL = re.compile(
    r"`((?:docker|gcloud|git|kubectl|lint-imports|mkdocs|pip|pyright|pytest|ruff|sbatch|scancel|srun|tensorboard|tfds"
    r"|python -m (?!mcm_jax))[ .][^`]*)`"
)
_ELISIONS = ("..", "ARGUMENT")


@dataclasses.dataclass(frozen=True)
class Command:
    """A command and the place where it was found.

    Attributes:
      where: the name of the file.
      words: the command's words as the shell passes them on, without environment variables.
      settings: environment variables set before the words, such as "MCM_ACCELERATOR=gpu".
    """

    where: str
    words: tuple[str, ...]
    settings: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.where}: {shlex.join(self.words)}"

    @property
    def line(self) -> str:
        """The command as a line of a script."""
        return " ".join([*self.settings, shlex.join(self.words)])

    @property
    def program(self) -> str | None:
        """The program's name, "train" for `python -m mcm_jax.train`; None for a launcher."""
        return self.words[2].removeprefix("mcm_jax.") if self.words[0] == "python" else None

    @property
    def arguments(self) -> tuple[str, ...]:
        """The words after the name of the program or launcher."""
        return self.words[3 if self.program else 2 :]


def in_text(text: str, where: str) -> list[Command]:
    """The distinct commands in Markdown, a docstring, a script's header or the output of a dry run.

    Lines that end in a backslash are continued, and comments are removed. Commands with an elision (`...`)
    are skipped, and so are program names without arguments in running text (`python -m mcm_jax.train`).
    """
    text = re.sub(r"\\\n(?:#| )*", " ", text)
    lines = [found["command"] for line in text.splitlines() if (found := _LINE.match(line.strip()))]
    inline = [found["command"] for found in _INLINE.finditer(" ".join(text.split()))]
    commands = [_command(where, line) for line in lines]
    commands += [each for each in (_command(where, text) for text in inline) if not _is_name(each)]
    return [each for each in dict.fromkeys(commands) if not any(part in str(each) for part in _ELISIONS)]


def _command(where: str, line: str) -> Command:
    """Parses the command in a line; three spaces separate it from an explanation."""
    words = shlex.split(re.split(r"   +| &&", line)[0], comments=True)
    start = next(n for n, word in enumerate(words) if "=" not in word)
    return Command(where, tuple(words[start:]), tuple(words[:start]))


def _is_name(command: Command) -> bool:
    return command.program is not None and not command.arguments


def in_docstring(path: Path) -> list[Command]:
    """The commands in the module docstring of a Python file."""
    return in_text(ast.get_docstring(ast.parse(path.read_text())) or "", path.name)


def in_head(script: str) -> list[Command]:
    """The commands in a launcher's comments."""
    lines = (ROOT / script).read_text().splitlines()
    return in_text("\n".join(line for line in lines if line.startswith("#")), script)


def script_of(source: str) -> str:
    """All commands of a file as one script: the blocks of a page, a launcher's header, or a docstring.

    Python blocks become `python -c` commands. Commands in running text come last.
    """
    path = ROOT / source
    if path.suffix == ".py":
        found = in_docstring(path)
    elif path.suffix != ".md":
        found = in_head(source)
    else:
        text = path.read_text()
        blocks = [
            f"python -c {shlex.quote(block)}" if language == "python" else block.replace("\n$ ", "\n")
            for language, block in _BLOCK.findall(text)
        ]
        prose = _OTHER_BLOCK.sub("", text)
        tools = [" ".join(each.split()) for each in _TOOL.findall(prose)]
        inline = [each.line for each in in_text(prose, source)]
        return "\n".join([*blocks, *inline, *tools])
    return "\n".join(each.line for each in found)


def in_dry_run(script: str, *arguments: str) -> list[Command]:
    """The program commands that a launcher would run."""
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
    """Parses a program's flags and validates its config; for a launcher, checks the programs it would run.

    Raises:
      InputError, AssertionError: the program or the launcher would reject the command.
    """
    if command.program is None:
        for each in in_dry_run(command.words[1], *command.arguments):
            check(each)
        if "--" in command.arguments:
            border = command.arguments.index("--")
            given, rest = command.arguments[:border], command.arguments[border + 1 :]
            named = [word.partition("=")[2] for word in given if word.startswith("--program=")]
            program = ("python", "-m", f"mcm_jax.{[*named, 'train'][0]}")
            check(Command(command.where, rest if rest[0] == "python" else (*program, *rest)))
        return

    def parse(main: object) -> None:
        command_line._parse_flags(sys.argv)
        if "config" in flags.FLAGS and flags.FLAGS["config"].value is not None:
            config = command_line.loaded_config(flags.FLAGS["config"])
            if command.program == "plan" and config.objective != "diffusion":
                config.teacher_checkpoint = "runs/teacher"  # Validation needs one, although a plan does not.
            validation.validate(config)

    with mock.patch.object(command_line, "run", parse), _process(command, ()):
        runpy.run_module(f"mcm_jax.{command.program}", run_name="__main__")


def run(command: Command, *small: str) -> str:
    """Runs a program to the end and returns its output.

    Args:
      small: arguments to append that shorten the run; they override the command's own.
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
    """Sets arguments, flags and environment as in a new process; restores them afterwards."""
    known, parsed = set(flags.FLAGS), flags.FLAGS.is_parsed()
    argv = [f"mcm_jax.{command.program}", *command.arguments, *small]
    streams = [io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2)]

    def output() -> str:
        return "".join(stream.buffer.getvalue().decode() for stream in streams)

    with (
        mock.patch.object(sys, "argv", argv),
        mock.patch.dict(os.environ, MCM_NUM_PROCESSES="1"),
        # Its settings would apply to the rest of this process.
        mock.patch.object(host, "tune"),
        contextlib.redirect_stdout(streams[0]),
        contextlib.redirect_stderr(streams[1]),
    ):
        try:
            yield output
        finally:
            for name in set(flags.FLAGS) - known:
                definer = flags.FLAGS.find_module_defining_flag(name)
                # The other new flags belong to libraries imported in the meantime.
                if "." in name or str(definer).startswith("mcm_jax."):
                    delattr(flags.FLAGS, name)
            if not parsed:
                flags.FLAGS.unparse_flags()


# Tools that launchers call and that tests run as they are.
_TOOLS = (
    "cat chmod cksum cp dirname env grep id mkdir mktemp paste rm sed seq sleep sort tail tar touch".split()
)
# Commands that are forwarded to the test's process. Any other command fails: "command not found".
_PASSED_ON = (
    *("bash", "docker", "gcloud", "git", "kubectl", "lint-imports", "mkdocs", "pip", "pyright", "pytest"),
    *("python", "ruff", "sbatch", "scancel", "scontrol", "srun", "tensorboard", "tfds", "xpk"),
)
_PASS_ON = """#!{bash}
words=("MCM_ACCELERATOR=${{MCM_ACCELERATOR:-}}" "${{0##*/}}" "$@")
printf '%s\\0' "${{#words[@]}}" "${{words[@]}}" >&"$MCM_TEST_REQUEST"
read -r answer <&"$MCM_TEST_ANSWER" || exit 1
case "$answer" in
  run) exec {bash} "$@" ;;
  dry) MCM_DRY_RUN=1 exec {bash} "$@" ;;
esac
exit "$answer"
"""
_LAUNCHERS_NEED = ("launch", "configs", "setup.cfg", "setup.py", "pyproject.toml")


class Shell:
    """Bash in a directory that looks like a checkout; the test's process answers each command that it calls.

    Thus scripts and launchers run to the end, and programs run in the process that shares compiled code.
    """

    def __init__(self, directory: Path, serve: Callable[[Sequence[str], str], int | str]):
        """serve: (words, accelerator) -> exit code, or "run" or "dry" to run a launcher (dry) in Bash."""
        self.directory, self._serve = directory, serve
        bash = shutil.which("bash")
        for name in _LAUNCHERS_NEED:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, directory / name)
        bin_ = directory / ".venv" / "bin"
        bin_.mkdir(parents=True)
        for name in ("parity", "torch"):
            (directory / f".venv-{name}").symlink_to(".venv")
        (bin_ / "activate").write_text(f"PATH={shlex.quote(str(bin_))}:$PATH\n")
        for name in _PASSED_ON:
            (bin_ / name).write_text(_PASS_ON.format(bash=bash))
            (bin_ / name).chmod(0o755)
        for name in _TOOLS:
            (bin_ / name).symlink_to(shutil.which(name))
        self._bash, self._bin = bash, bin_

    def run(self, script: str) -> str:
        """Runs a script, which must succeed, and returns its output and that of its launchers.

        Raises:
          AssertionError: a command failed, or `serve` raised it.
        """
        request, request_end = os.pipe()
        answer_end, answer = os.pipe()
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MCM_")} | {
            "PATH": str(self._bin),
            "MCM_TEST_REQUEST": str(request_end),
            "MCM_TEST_ANSWER": str(answer_end),
        }
        environment.pop("PYTHON", None)
        (self.directory / "page.sh").write_text(script + "\n")
        with open(self.directory / "page.log", "w+b") as log:
            process = subprocess.Popen(
                [self._bash, "-euo", "pipefail", "page.sh"],
                cwd=self.directory,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=(request_end, answer_end),
            )
            os.close(request_end)
            os.close(answer_end)
            # Closing the pipe of answers ends a command that waits for one, and therefore the script.
            try:
                with open(request, "rb") as requests, open(answer, "wb", buffering=0) as answers:
                    while words := _request(requests):
                        accelerator = words[0].partition("=")[2]
                        answers.write(f"{self._serve(words[1:], accelerator)}\n".encode())
            finally:
                code = process.wait()
            log.seek(0)
            printed = log.read().decode()
        assert code == 0, f"exit code {code} of:\n{script}\n{printed}"
        return printed


def _request(stream: io.BufferedReader) -> list[str]:
    """Reads the words of the next command; [] at the end of the stream."""

    def word() -> str:
        letters = bytearray()
        while (letter := stream.read(1)) not in (b"", b"\0"):
            letters += letter
        return letters.decode()

    count = word()
    return [word() for _ in range(int(count or 0))]
