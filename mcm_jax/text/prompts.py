"""Reads prompts from a file, and notes what a text encoder can't make of them."""

from collections.abc import Sequence

from mcm_jax.system.errors import InputError, reason
from mcm_jax.system.files import read_bytes
from mcm_jax.system.paths import Path
from mcm_jax.text.encoders import Encoder


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


def notes(encoder: Encoder, prompts: Sequence[str]) -> list[str]:
    """Lines for the user about prompts that are empty, too long, or not in the encoder's vocabulary."""
    tokens, total = encoder.tokenize(prompts), len(prompts)
    empty = sum(not prompt.strip() for prompt in prompts)
    counts = {
        f"of {total} prompts are empty: no caption": empty,
        f"of {total} prompts have characters that {encoder.name} does not know": int(tokens.unknown.sum()),
        f"of {total} prompts exceed {encoder.length} tokens and lose their end": int(tokens.cut.sum()),
    }
    return [f"note: {count} {what}" for what, count in counts.items() if count]
