"""Reads prompts from a file, one on each line."""

from mcm_jax.system.errors import InputError, reason
from mcm_jax.system.files import read_bytes
from mcm_jax.system.paths import Path


def read(path: Path) -> list[str]:
    """The lines of a text file in UTF-8; an empty line in it is an empty prompt.

    Raises:
      InputError: the file can't be read or is empty.
    """
    try:
        prompts = read_bytes(path).decode("utf-8-sig").replace("\r\n", "\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--prompts={path} can't be read ({reason(error)})") from error
    if not prompts[-1]:
        del prompts[-1]  # What follows the last line.
    if not prompts:
        raise InputError(f"--prompts={path} is empty; write one caption on each line")
    return prompts
