"""Which split an example belongs to, decided by its key alone."""

import hashlib
from collections.abc import Collection, Iterable

TEST_FRACTION = 0.1


def position(key: str) -> float:
    """SHA-256 of the key as a number in [0, 1): the same on every machine, at all times."""
    digest = hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def test_keys(
    keys: Collection[str], *, test_fraction: float = TEST_FRACTION, classes: Iterable[Collection[str]] = ()
) -> set[str]:
    """The keys whose position is below `test_fraction`. Examples that share a key share a split.

    Adding or removing a key moves no other, except where a split or a class would be left without any: the
    highest key of all, and of each of the `classes`, always trains, and the lowest key tests if it can.

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
