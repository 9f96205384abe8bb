"""Reads JSON from files that others may have written or damaged."""

import json
from typing import Any

# A description of 100,000 classes takes 5 MB. In memory, JSON may take thirty times as much.
_MAX_BYTES = 2**24
_MAX_DEPTH = 50
_MAX_DIGITS = 20


def loads(text: str | bytes, *, max_bytes: int = _MAX_BYTES) -> Any:
    """Parses JSON; in contrast to `json.loads` every failure is a ValueError.

    Args:
      max_bytes: the limit of size, for files that are known to be larger than most.

    Raises:
      ValueError: the text is not JSON, holds NaN or infinity, or exceeds a limit: of size, of depth, so that
        the value can be printed and copied, or of digits, so that each integer can become a float.
    """
    if len(text) > max_bytes:
        raise ValueError(f"{len(text):,} bytes of JSON, more than {max_bytes:,}")
    too_deep = f"JSON of more than {_MAX_DEPTH} levels"
    try:
        value = json.loads(text, parse_constant=_refuse_constant, parse_int=_integer)
    except RecursionError:
        raise ValueError(too_deep) from None
    level = [value]
    for _ in range(_MAX_DEPTH):
        level = [part for parent in level for part in _parts(parent)]
    if level:
        raise ValueError(too_deep)
    return value


def _parts(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []


def _integer(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f"an integer of more than {_MAX_DIGITS} digits")
    return int(digits)


def _refuse_constant(constant: str) -> None:
    raise ValueError(f"{constant} is not a number")
