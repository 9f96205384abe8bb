"""The entry point of all programs: parses flags, calls one function, and sets the exit code."""

import inspect
import io
import logging as python_logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import ml_collections
from absl import app, flags, logging

from mcm_jax.system import files, host
from mcm_jax.system.errors import InputError

# Exceptions raised by a config file's code or by a bad value for one of its fields.
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

# Flags for output paths; the first one receives most of the data.
_OUTPUT_FLAGS = ("out", "workdir")


def run(main: Callable[[], None]) -> None:
    """Parses the flags and calls `main()`; every program starts here.

    Exit codes: 0 success; 1 failure while running (a traceback for a bug, one line for the storage); 2 bad
    input, reported in one line on stderr; 130 interrupted by Ctrl-C.
    """
    _escape_unencodable()
    _drop_errors_of_abandoned_reads()
    host.tune()
    # TensorFlow, which TFDS imports to read TFRecord files, prints start-up messages on stderr otherwise.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    try:
        app.run(lambda _: _guarded(main), flags_parser=_parse_flags)
    except InputError as error:
        _exit_with(error)


def loaded_config(
    holder: flags.FlagHolder[ml_collections.ConfigDict] | flags.Flag[ml_collections.ConfigDict],
) -> ml_collections.ConfigDict:
    """Returns the config of a --config flag; raises InputError if its file cannot be loaded."""
    try:
        config = holder.value
        if config is None:
            raise InputError("--config is not set; specify a config and its row")
        # ml_collections reports a missing file only when the config is first read.
        config.keys()
    except OSError as error:
        raise InputError(f"bad --config: {_one_line(error)}") from error
    return config


def _escape_unencodable() -> None:
    """Makes stdout and stderr escape characters that their encoding does not support.

    Otherwise a program in a C locale, or one that prints a file name that is not UTF-8, would fail with a
    UnicodeEncodeError after all its work.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _drop_errors_of_abandoned_reads() -> None:
    """Keeps errors of abandoned reads off stderr, where Python would print a traceback for each.

    If a checkpoint is damaged, Orbax raises the first error and closes its event loop. The other reads of
    TensorStore still report to the loop, and the coroutines that wait for them fail as they are deleted.
    """
    show = sys.unraisablehook

    def hook(late: Any) -> None:
        closed = isinstance(late.exc_value, RuntimeError) and str(late.exc_value) == "Event loop is closed"
        coroutine = inspect.iscoroutine(late.object) and "orbax" in late.object.cr_code.co_filename
        abandoned = coroutine or "TensorStore" in repr(late.object)
        if not closed and not abandoned:
            show(late)

    sys.unraisablehook = hook


def _guarded(main: Callable[[], None]) -> None:
    if not flags.FLAGS["verbosity"].present:
        # Orbax logs dozens of lines per checkpoint, and every error that it raises. asyncio logs the errors
        # that Orbax leaves behind after the first. --verbosity=0 shows them.
        logging.set_verbosity(logging.FATAL)
        python_logging.getLogger("asyncio").setLevel(python_logging.CRITICAL)
    try:
        main()
    except InputError as error:
        _exit_with(error)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        full, failed = files.full_disk_within(error), files.failed_storage_within(error)
        if full is not None:
            failed = f"{full.strerror}: {full.filename or _target()}; free some space and"
        elif failed is not None:
            failed = f"the storage has failed ({failed});"
        else:
            raise
        print(
            f"error: {failed} run the same command again (everything written so far is intact, checkpoints "
            "included)",
            file=sys.stderr,
        )
        sys.exit(1)


def _parse_flags(argv: Sequence[str]) -> list[str]:
    """Parses flags with absl and turns every failure into an `InputError`.

    ml_collections loads the config file while parsing, so an unknown field (AttributeError), a wrong type
    (TypeError) or a missing file (OSError) is raised here instead of an absl error.
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
    """The innermost `InputError` in a chain: ml_collections wraps one that a config file raises."""
    found = None
    while error is not None:
        found = error if isinstance(error, InputError) else found
        error = error.__cause__ or error.__context__
    return found


def _target() -> str:
    """The output path as specified by the user."""
    given = [flags.FLAGS[name].serialize() for name in _OUTPUT_FLAGS if name in flags.FLAGS]
    return next((f"under {flag}" for flag in given if flag), "the current directory")


def _one_line(error: Exception) -> str:
    text = str(error.args[0]) if error.args else type(error).__name__
    return " ".join(text.split())


def _exit_with(error: InputError) -> None:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
