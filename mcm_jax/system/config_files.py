"""Finds config files by name or path, and defines the flag that loads them.

`--config=imagenet64:ROW` names a config of this package and works in any directory.
`--config=DIR/FILE.py:ROW` is the path of any file.
"""

from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags
from ml_collections.config_flags.config_flags import ConfigFileFlagParser

from mcm_jax.system import paths
from mcm_jax.system.errors import InputError


def directory() -> Path:
    """Directory of the package's config files: inside an installed package, or beside it in a checkout."""
    package = Path(__file__).parents[1]
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def names() -> list[str]:
    """Names of the package's configs, in alphabetical order."""
    return sorted(path.stem for path in directory().glob("*.py") if not path.stem.startswith("_"))


def locate(value: str) -> str:
    """Turns 'imagenet64:ROW' into '/.../configs/imagenet64.py:ROW'; only expands `~` in 'DIR/FILE.py:ROW'.

    Raises:
      InputError: there is no config with this name, or no such file.
    """
    if paths.is_in_bucket(value):
        raise InputError(f"--config={value} is in a bucket; copy the file to this machine")
    file, colon, row = value.partition(":")
    file = str(paths.checked_path(file, "--config"))
    remedy = f"use a path to a .py file, or a name: {', '.join(names())}"
    if file.isidentifier():
        if file not in names():
            raise InputError(f"--config={value}: there is no config named {file}; {remedy}")
        file = str(directory() / f"{file}.py")
    elif not Path(file).is_file():
        raise InputError(f"--config={value}: there is no file {file}; {remedy}")
    return f"{file}{colon}{row}"


class _Parser(ConfigFileFlagParser):
    """ml_collections' parser, which supports only paths, extended to names."""

    def parse(self, path: str) -> object:
        # Returns the config, or an object that raises its file's error when first read.
        return super().parse(locate(path))


def define_flag(example: str) -> flags.FlagHolder[ConfigDict]:
    """Defines --config, whose value is the locked config; returns absl's flag holder."""
    holder = config_flags.DEFINE_config_file(
        "config", None, f"Config and row: NAME:ROW or PATH.py:ROW, e.g. {example}", lock_config=True
    )
    flags.FLAGS["config"].parser = _Parser("config", lock_config=True)
    return holder
