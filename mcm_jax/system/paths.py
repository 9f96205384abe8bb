"""Local paths given by a user in a flag or setting, where `~` is the home directory."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, overload

from absl import flags

from mcm_jax.system.errors import InputError

# gs://bucket/run, or gs:/bucket/run after pathlib has normalized it. ./gs:/x is a local path.
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")

_LONGEST_NAME = 255  # bytes, on all common file systems


def local_path(text: str | Path, name: str) -> Path:
    """Converts `text` to a path and expands `~`.

    Args:
      name: the flag or setting that contains the text, as the user writes it, for example `--workdir`.

    Raises:
      InputError: the text is empty, too long or a URL, or refers to the home directory of an unknown user.
    """
    if not str(text):
        raise InputError(f"{name} is empty; specify a file or directory, or . for the current directory")
    if any(len(os.fsencode(part)) > _LONGEST_NAME for part in Path(text).parts):
        raise InputError(f"{name}={text} contains a name of more than {_LONGEST_NAME} bytes; shorten it")
    if _URL.match(str(text)):
        raise InputError(f"{name}={text} is a URL; only local paths work, such as a mounted bucket")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise InputError(f"{name}={text}: there is no such user's home directory") from error


class _PathParser(flags.ArgumentParser[Path]):
    """Converts a flag's text to a local path."""

    def __init__(self, name: str):
        self._name = name

    def parse(self, argument: str | Path) -> Path:
        return local_path(argument, self._name)

    def flag_type(self) -> str:
        return "path"


class _PathsParser(flags.ArgumentParser[list[Path]]):
    """Converts a flag's text to a list of local paths separated by commas."""

    def __init__(self, name: str):
        self._name, self._texts = name, flags.ListParser()
        self.syntactic_help = self._texts.syntactic_help

    def parse(self, argument: str | list[str]) -> list[Path]:
        return [local_path(text, self._name) for text in self._texts.parse(argument)]

    def flag_type(self) -> str:
        return self._texts.flag_type()


@overload
def define_path(
    name: str, default: str | Path | None, help: str, *, required: Literal[True]
) -> flags.FlagHolder[Path]: ...


@overload
def define_path(name: str, default: str | Path, help: str) -> flags.FlagHolder[Path]: ...


@overload
def define_path(name: str, default: None, help: str) -> flags.FlagHolder[Path | None]: ...


def define_path(
    name: str, default: str | Path | None, help: str, *, required: bool = False
) -> flags.FlagHolder[Path] | flags.FlagHolder[Path | None]:
    """Defines a flag whose value is a local `Path`; returns its holder, like absl's DEFINE_string."""
    parser = _PathParser(f"--{name}")
    return flags.DEFINE(parser, name, default, help, serializer=flags.ArgumentSerializer(), required=required)


def define_paths(
    name: str, default: Sequence[str] | None, help: str
) -> flags.FlagHolder[list[Path]] | flags.FlagHolder[list[Path] | None]:
    """Defines a flag whose value is a list of local paths, separated by commas."""
    return flags.DEFINE(_PathsParser(f"--{name}"), name, default, help, serializer=flags.ListSerializer(","))
