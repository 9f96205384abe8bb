"""What all programs share: flags in, one function call, exit code 0, 1 or 2 out."""

import io
import os
import sys
from collections.abc import Callable, Sequence

import ml_collections
from absl import app, flags, logging

from mcm_jax.system import files, host
from mcm_jax.system.errors import InputError

# What a config file's code, or a value for one of its fields, can raise.
_CONFIG_FILE_ERRORS = (
    AttributeError,
    ImportError,
    LookupError,
    NameError,
    OSError,
    SyntaxError,
    TypeError,
    ValueError,
)

# Flags that name where a program writes; the first one is where most of the data goes.
_PLACES = ("out", "workdir")


def run(main: Callable[[], None]) -> None:
    """Parses the flags and calls `main()`; the only way in for every program.

    Exit codes: 0 done; 1 failed while running (a traceback for a fault of ours, one line for a full disk);
    2 bad input, reported in one line on stderr; 130 interrupted by Ctrl-C.
    """
    _print_any_text()
    host.tune()
    # Set before anything imports TensorFlow, which writes TensorBoard's files: otherwise it prints a greeting
    # on stderr.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    try:
        app.run(lambda _: _guarded(main), flags_parser=_parse_flags)
    except InputError as error:
        _exit_with(error)


def loaded_config(
    holder: flags.FlagHolder[ml_collections.ConfigDict] | flags.Flag[ml_collections.ConfigDict],
) -> ml_collections.ConfigDict:
    """The config of a --config flag; raises InputError if its file cannot be loaded."""
    try:
        config = holder.value
        if config is None:
            raise InputError("--config is not set; name a config and its row")
        # ml_collections reports a missing file only when the config is first read.
        config.keys()
    except OSError as error:
        raise InputError(f"bad --config: {_one_line(error)}") from error
    return config


def _print_any_text() -> None:
    """Lets stdout and stderr escape characters that their encoding lacks.

    A program in a C locale, or one that prints a file name that is not UTF-8, would otherwise end in a
    UnicodeEncodeError after its work is done.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _guarded(main: Callable[[], None]) -> None:
    if not flags.FLAGS["verbosity"].present:
        # Orbax logs dozens of lines for each checkpoint, and also every error that it raises. --verbosity=0
        # shows them.
        logging.set_verbosity(logging.FATAL)
    try:
        main()
    except InputError as error:
        _exit_with(error)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        full = files.full_disk_within(error)
        if full is None:
            raise
        print(
            f"error: {full.strerror}: {full.filename or _place()}; free some space and run the same command "
            "again (everything written so far is intact, checkpoints included)",
            file=sys.stderr,
        )
        sys.exit(1)


def _parse_flags(argv: Sequence[str]) -> list[str]:
    """absl's parser, with every failure turned into one `InputError`.

    ml_collections loads the config file while parsing, so an unknown field (AttributeError), a wrong type
    (TypeError) or a missing file (OSError) is raised here instead of absl's own error.
    """
    try:
        rest = flags.FLAGS(list(argv))
    except flags.Error as error:
        raise _input_error_within(error) or InputError(_one_line(error)) from error
    except _CONFIG_FILE_ERRORS as error:
        raise _input_error_within(error) or InputError(f"bad --config: {_one_line(error)}") from error
    if len(rest) > 1:
        raise InputError(f"unexpected argument {rest[1]!r}: every option is a flag, see --help")
    return rest


def _input_error_within(error: BaseException | None) -> InputError | None:
    """The innermost `InputError`: a config file may raise one, which ml_collections wraps in other errors."""
    found = None
    while error is not None:
        found = error if isinstance(error, InputError) else found
        error = error.__cause__ or error.__context__
    return found


def _place() -> str:
    """Where the program writes, as the user specified it."""
    given = [flags.FLAGS[name].serialize() for name in _PLACES if name in flags.FLAGS]
    return next((f"below {flag}" for flag in given if flag), "the current directory")


def _one_line(error: Exception) -> str:
    text = str(error.args[0]) if error.args else type(error).__name__
    return " ".join(text.split())


def _exit_with(error: InputError) -> None:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
