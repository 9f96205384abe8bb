"""Assigns examples to the train or test split by a hash of their keys."""

import hashlib
from collections.abc import Collection, Iterable

TEST_FRACTION = 0.1


def position(key: str) -> float:
    """Maps the key's SHA-256 to a number in [0, 1), which is the same on every machine."""
    digest = hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def test_keys(
    keys: Collection[str], *, test_fraction: float = TEST_FRACTION, classes: Iterable[Collection[str]] = ()
) -> set[str]:
    """Returns the keys whose position is below `test_fraction`; examples with equal keys share a split.

    Adding or removing a key does not move other keys, except to keep splits and classes from being empty: the
    highest key overall, and the highest of each of the `classes`, is always in the train split, and the
    lowest key is in the test split if possible.

    Raises:
      ValueError: fewer than two keys, or a fraction outside (0, 1).
    """
    if len(keys) < 2 or not 0 < test_fraction < 1:
        raise ValueError(f"{len(keys)} keys cannot be split with test_fraction={test_fraction}")

    def order(key: str) -> tuple[float, str]:
        return position(key), key

    lowest = min(keys, key=order)
    train = {max(group, key=order) for group in (keys, *classes)}
    test = {key for key in keys if position(key) < test_fraction} | {lowest}
    return test - train or {lowest}
