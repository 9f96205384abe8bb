"""Paths given by a user in a flag or setting: local, where `~` is the home directory, or in a bucket (gs://).

A path in a bucket is an `etils.epath.Path`, which has the methods of `pathlib`. A bucket has no directories
of its own: one exists while it contains an object.
"""

import importlib.util
import logging
import os
import pathlib
import posixpath
import re
from collections.abc import Sequence
from typing import Literal, overload

import fsspec.config
from absl import flags
from etils import epath

from mcm_jax.system.errors import InputError

Path = pathlib.Path | epath.Path

# gs://bucket/run, or gs:/bucket/run after pathlib has normalized it. ./gs:/x is a local path.
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
_BUCKET = re.compile(r"gs://[^/]+")

_LONGEST_NAME = 255  # bytes, on all common file systems

# epath would prefer TensorFlow's client, wherever TensorFlow is installed, to that of the extra `gcs`.
os.environ.setdefault("EPATH_USE_TF", "false")
# Otherwise a process would not see what others write. The variable is for worker processes.
os.environ.setdefault("FSSPEC_GCS", '{"use_listings_cache": false}')
fsspec.config.set_conf_env(fsspec.config.conf)
# It logs a traceback for every failed request, even if a repetition succeeds.
logging.getLogger("gcsfs").setLevel(logging.CRITICAL)


def as_path(text: str | Path) -> Path:
    """Converts the text of a path that has been checked before; see `checked_path`."""
    if isinstance(text, epath.Path | pathlib.Path):
        return text
    return epath.Path(text) if _BUCKET.match(text) else pathlib.Path(text)


def is_in_bucket(path: str | Path) -> bool:
    """Whether the path lies in a bucket rather than on a local file system."""
    return _BUCKET.match(str(path)) is not None


def absolute(path: str | Path) -> Path:
    """The path without reference to the current directory; does not follow links."""
    return path if isinstance(path := as_path(path), epath.Path) else path.absolute()


def resolved(path: str | Path) -> Path:
    """The absolute path without `..`, and with all links followed."""
    if not isinstance(path := as_path(path), epath.Path):
        return path.resolve()
    _, bucket, *names = posixpath.normpath(f"/{str(path).removeprefix('gs://')}").split("/")
    return epath.Path(f"gs://{bucket}").joinpath(*names)


def checked_path(text: str | Path, name: str) -> Path:
    """Converts `text`, as given by a user, to a path and expands `~`.

    Args:
      name: the flag or setting that contains the text, as the user writes it, for example `--workdir`.

    Raises:
      InputError: the text is empty, too long, or a URL that cannot be opened, or refers to the home directory
        of an unknown user.
    """
    if not str(text):
        raise InputError(f"{name} is empty; specify a file or directory, or . for the current directory")
    if any(len(os.fsencode(part)) > _LONGEST_NAME for part in pathlib.PurePosixPath(text).parts):
        raise InputError(f"{name}={text} contains a name of more than {_LONGEST_NAME} bytes; shorten it")
    if _URL.match(str(text)):
        return _checked_url(str(text), name)
    try:
        return pathlib.Path(text).expanduser()
    except RuntimeError as error:
        raise InputError(f"{name}={text}: there is no such user's home directory") from error


def _checked_url(text: str, name: str) -> epath.Path:
    if not _BUCKET.match(text):
        raise InputError(f"{name}={text} is a URL that can't be opened; use a local path or gs://BUCKET/PATH")
    if any(character in text for character in "*?["):
        raise InputError(f"{name}={text} contains one of *?[, which stand for several objects; rename it")
    if importlib.util.find_spec("gcsfs") is None:
        raise InputError(f"{name}={text} needs the package gcsfs; install it: pip install 'mcm_jax[gcs]'")
    return epath.Path(text)


class _PathParser(flags.ArgumentParser[Path]):
    """Converts a flag's text to a path."""

    def __init__(self, name: str):
        self._name = name

    def parse(self, argument: str | Path) -> Path:
        return checked_path(argument, self._name)

    def flag_type(self) -> str:
        return "path"


class _PathsParser(flags.ArgumentParser[list[Path]]):
    """Converts a flag's text to a list of paths separated by commas."""

    def __init__(self, name: str):
        self._name, self._texts = name, flags.ListParser()
        self.syntactic_help = self._texts.syntactic_help

    def parse(self, argument: str | list[str]) -> list[Path]:
        return [checked_path(text, self._name) for text in self._texts.parse(argument)]

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
    """Defines a flag whose value is a `Path`; returns its holder, like absl's DEFINE_string."""
    parser = _PathParser(f"--{name}")
    return flags.DEFINE(parser, name, default, help, serializer=flags.ArgumentSerializer(), required=required)


def define_paths(
    name: str, default: Sequence[str] | None, help: str
) -> flags.FlagHolder[list[Path]] | flags.FlagHolder[list[Path] | None]:
    """Defines a flag whose value is a list of paths, separated by commas."""
    return flags.DEFINE(_PathsParser(f"--{name}"), name, default, help, serializer=flags.ListSerializer(","))
