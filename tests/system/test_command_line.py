"""What every program does with flags, mistakes and failures: exit codes, and one line or a traceback."""

import errno
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mcm_jax.system import command_line

ROOT = Path(__file__).parents[2]


def program(main, *arguments, before="", env=None):
    """A program whose `main()` has these lines, called with `arguments`."""
    lines = "\n    ".join(main.splitlines())
    code = f"""
import os, signal, sys
from absl import flags, logging
from ml_collections import config_flags
from mcm_jax.system import command_line
from mcm_jax.system.errors import InputError
{before}
def main():
    {lines}
command_line.run(main)
"""
    # JAX, which this process has imported, sets it too.
    inherited = {name: value for name, value in os.environ.items() if name != "TF_CPP_MIN_LOG_LEVEL"}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        env=inherited | (env or {}),
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def error_of(done, code):
    """The one line on stderr of a program that ended with `code`."""
    assert done.returncode == code, done.stderr
    assert not done.stdout
    (line,) = done.stderr.splitlines()
    return line


def test_done():
    done = program("print(flags.FLAGS.num)", "--num=3", before="flags.DEFINE_integer('num', 1, '')")
    assert (done.returncode, done.stdout, done.stderr) == (0, "3\n", "")


def test_the_users_mistake_is_one_line():
    assert error_of(program("raise InputError('--x=1: take 2')"), 2) == "error: --x=1: take 2"


def test_our_mistake_has_a_traceback():
    done = program("raise ValueError('a bug')")
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "ValueError: a bug" in done.stderr


def test_errors_of_abandoned_reads_are_not_shown():
    """After its first error Orbax closes its event loop and abandons the other reads of TensorStore."""
    late = """
class Raises:
    def __init__(self, words): self.words = words
    def __del__(self): raise RuntimeError(self.words)
Raises("Event loop is closed")
class OfTensorStore(Raises): pass
class Reads:
    def __get__(self, *_): return self
    def __call__(self, *_): 1 / 0
    def __repr__(self): return "TensorStore({})"
OfTensorStore.__del__ = Reads()
OfTensorStore("x")
import types
@types.coroutine
def forever(): yield
source = '''async def read():
    try: await forever()
    finally: raise KeyError("another read has failed")
'''
names = {"forever": forever}
exec(compile(source, "site-packages/orbax/checkpoint/reads.py", "exec"), names)
names["read"]().send(None)
Raises("a bug")
"""
    done = program(late)
    assert done.returncode == 0 and "a bug" in done.stderr
    assert not [words for words in ("Event loop", "ZeroDivision", "another read") if words in done.stderr]


@pytest.mark.parametrize(
    ("encoding", "printed"),
    [("ascii", b"r\\xe9sum\\xe9 \\udcff\n"), ("utf-8", b"r\xc3\xa9sum\xc3\xa9 \\udcff\n")],
)
def test_output_that_its_encoding_lacks_is_escaped(encoding, printed, monkeypatch):
    """Characters of a C locale's ASCII, and in any encoding those of a file name that is not UTF-8."""
    buffer = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(buffer, encoding=encoding))
    monkeypatch.setattr(command_line.host, "tune", lambda: None)
    monkeypatch.setattr(command_line.app, "run", lambda *_, **__: print("r\u00e9sum\u00e9 \udcff"))
    command_line.run(lambda: None)
    sys.stdout.flush()
    assert buffer.getvalue() == printed


def test_ctrl_c():
    # A process that a script starts in the background is born deaf to it.
    listen = "signal.signal(signal.SIGINT, signal.default_int_handler)"
    assert error_of(program(f"{listen}; os.kill(os.getpid(), signal.SIGINT)"), 130) == "interrupted"


def test_the_exit_code_of_the_program_itself():
    assert program("sys.exit(130)").returncode == 130


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--num=x"], "num"),
        (["--nun=1"], "nun"),
        (["1"], "unexpected argument '1': every option is a flag, see --help"),
        (["--num=1", "--", "-2"], "unexpected argument '-2'"),
    ],
)
def test_bad_flags(arguments, said):
    done = program("print('ran')", *arguments, before="flags.DEFINE_integer('num', 1, '')")
    line = error_of(done, 2)
    assert line.startswith("error: ") and said in line


CONFIG = """
import ml_collections
from mcm_jax.system.errors import InputError

def get_config(row="a"):
    if row == "b":
        raise InputError("there is no row 'b'")
    if row == "c":
        raise LookupError("two\\nlines")
    config = ml_collections.ConfigDict({"seed": 1})
    return config.lock()
"""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--config={}:b"], "error: there is no row 'b'"),
        (["--config={}:c"], "error: bad --config: two lines"),
        (["--config={}", "--config.sead=1"], "sead"),
        (["--config={}", "--config.seed=x"], "seed"),
        (["--config={}.none"], "error: bad --config: "),
    ],
)
def test_bad_configs(arguments, said, tmp_path):
    path = tmp_path / "config.py"
    path.write_text(CONFIG)
    done = program(
        "print(command_line.loaded_config(CONFIG).seed)",
        *(argument.format(path) for argument in arguments),
        before="CONFIG = config_flags.DEFINE_config_file('config', None, '', lock_config=True)",
    )
    line = error_of(done, 2)
    assert line.startswith("error: ") and said in line


def test_a_good_config(tmp_path):
    path = tmp_path / "config.py"
    path.write_text(CONFIG)
    done = program(
        "print(command_line.loaded_config(CONFIG).seed)",
        f"--config={path}:a",
        "--config.seed=7",
        before="CONFIG = config_flags.DEFINE_config_file('config', None, '', lock_config=True)",
    )
    assert (done.returncode, done.stdout) == (0, "7\n"), done.stderr


FULL = {
    "named": (f"raise OSError({errno.ENOSPC}, 'No space left on device', '/runs/x')", "/runs/x"),
    "quota": (f"raise OSError({errno.EDQUOT}, 'Disk quota exceeded', '/runs/x')", "/runs/x"),
    "nameless": (f"raise OSError({errno.ENOSPC}, 'No space left on device')", "under --workdir=runs/cd4"),
    # As Orbax tells of it, in a thread of its own.
    "library": (
        "raise ValueError('RESOURCE_EXHAUSTED: Failed writing: \"/runs/x\": No space left on device')",
        "under --workdir=runs/cd4",
    ),
    "on the way out": (
        f"""
try:
    raise OSError({errno.ENOSPC}, 'No space left on device', '/runs/x')
finally:
    raise RuntimeError('the writer is closed')""",
        "/runs/x",
    ),
    "wrapped": (
        f"""
try:
    raise OSError({errno.ENOSPC}, 'No space left on device', '/runs/x')
except OSError as error:
    raise RuntimeError('could not save') from error""",
        "/runs/x",
    ),
}


@pytest.mark.parametrize("kind", FULL)
def test_a_full_disk_is_one_line(kind):
    main, place = FULL[kind]
    done = program(main, "--workdir=runs/cd4", before="flags.DEFINE_string('workdir', None, '')")
    what = "Disk quota exceeded" if kind == "quota" else "No space left on device"
    assert error_of(done, 1) == (
        f"error: {what}: {place}; free some space and run the same command again (everything written so "
        "far is intact, checkpoints included)"
    )


def test_a_full_disk_where_nothing_is_named():
    done = program(f"raise OSError({errno.ENOSPC}, 'No space left on device')")
    assert "No space left on device: the current directory; free some space" in error_of(done, 1)


@pytest.mark.parametrize(
    ("arguments", "place"),
    [
        (["--workdir=a,b", "--out=c"], "--out=c"),
        (["--workdir=a,b"], "--workdir=a,b"),
        (["--out=c"], "--out=c"),
    ],
)
def test_out_is_where_a_program_with_both_writes(arguments, place):
    done = program(
        f"raise OSError({errno.ENOSPC}, 'No space left on device')",
        *arguments,
        before="flags.DEFINE_list('workdir', None, ''); flags.DEFINE_string('out', None, '')",
    )
    assert f": under {place}; free some space" in error_of(done, 1)


def test_a_disk_that_was_full_from_the_start_is_the_users_to_change():
    main = f"""
try:
    raise OSError({errno.ENOSPC}, 'No space left on device', '/data')
except OSError as error:
    raise InputError('--data_dir=/data: choose another') from error"""
    assert error_of(program(main), 2) == "error: --data_dir=/data: choose another"


def test_failed_storage_is_one_line():
    line = error_of(program(f"raise OSError({errno.EIO}, 'Input/output error', '/runs/x')"), 1)
    assert line == (
        "error: the storage has failed (/runs/x: Input/output error); run the same command again (everything "
        "written so far is intact, checkpoints included)"
    )


def test_another_failure_of_the_file_system_is_ours():
    done = program(f"raise OSError({errno.ENOENT}, 'No such file or directory', '/runs/x')")
    assert done.returncode == 1 and "Traceback" in done.stderr


def test_libraries_are_quiet_unless_asked():
    main = (
        "logging.error('E'); print(os.environ['TF_CPP_MIN_LOG_LEVEL'], os.environ['TF_ENABLE_ONEDNN_OPTS'])"
    )
    quiet = program(main)
    assert (quiet.stdout, quiet.stderr) == ("3 0\n", "")
    loud = program(main, "--verbosity=0", env={"TF_CPP_MIN_LOG_LEVEL": "0"})
    assert loud.stdout == "0 0\n" and loud.stderr.rstrip().endswith("E")


@pytest.mark.parametrize(
    ("variable", "ours"), [("XLA_FLAGS", "--xla_cpu"), ("LIBTPU_INIT_ARGS", "--xla_tpu")]
)
def test_the_compilers_are_tuned_first(variable, ours):
    done = program(f"print(os.environ['{variable}'])", env={variable: "--xla_dump_to=/none"})
    assert done.stdout.startswith(f"--xla_dump_to=/none {ours}")


def test_a_users_setting_of_the_compiler_stays():
    flag = "--xla_tpu_enable_windowed_einsum_for_all_gather"
    done = program("print(os.environ['LIBTPU_INIT_ARGS'])", env={"LIBTPU_INIT_ARGS": f"{flag}=true"})
    assert f"{flag}=true" in done.stdout and f"{flag}=false" not in done.stdout
