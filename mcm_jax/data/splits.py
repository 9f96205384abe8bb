"""Which split an example belongs to, decided by its key alone."""

import hashlib
from collections.abc import Collection

TEST_FRACTION = 0.1


def position(key: str) -> float:
    """SHA-256 of the key as a number in [0, 1): the same on every machine, for ever."""
    digest = hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def test_keys(keys: Collection[str], *, test_fraction: float = TEST_FRACTION) -> set[str]:
    """The keys whose position is below `test_fraction`.

    Adding or removing an example moves no other one, with a single exception that keeps both splits
    non-empty for two or more keys: the lowest key always tests and the highest always trains.

    Raises:
      ValueError: fewer than two keys, or a fraction outside (0, 1).
    """
    if len(keys) < 2 or not 0 < test_fraction < 1:
        raise ValueError(f"{len(keys)} keys cannot be split with test_fraction={test_fraction}")
    ordered = sorted(keys, key=lambda key: (position(key), key))
    chosen = {key for key in ordered if position(key) < test_fraction}
    return (chosen | {ordered[0]}) - {ordered[-1]}
