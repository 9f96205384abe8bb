import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcm_jax.data import splits

keys = st.sets(st.text(min_size=1), min_size=2, max_size=40)


@given(keys, st.floats(0.01, 0.99))
def test_both_splits_have_examples(names, fraction):
    test = splits.test_keys(names, test_fraction=fraction)
    assert 0 < len(test) < len(names) and test <= names


@given(keys, keys)
def test_adding_examples_moves_no_other(names, more):
    """Except the two at the ends of the order, which keep small sets from an empty split."""
    before, after = splits.test_keys(names), splits.test_keys(names | more)
    ends = {min(names, key=splits.position), max(names, key=splits.position)}
    assert {name for name in names if (name in before) != (name in after)} <= ends


def test_position_is_the_documented_hash():
    expected = int(hashlib.sha256(b"1F600").hexdigest()[:12], 16) / 2**48
    assert splits.position("1F600") == expected


def test_a_tenth_is_tested_on():
    names = {f"{number:05x}" for number in range(20_000)}
    test = splits.test_keys(names)
    assert test == {name for name in names if splits.position(name) < 0.1}
    assert abs(len(test) / 20_000 - 0.1) < 4 * (0.09 / 20_000) ** 0.5


@given(keys, st.floats(0.01, 0.99), st.integers(1, 5))
def test_each_class_trains_unless_nothing_else_can_test(names, fraction, num_classes):
    groups = [
        group
        for n in range(num_classes)
        if (group := {name for name in names if len(name) % num_classes == n})
    ]
    before = splits.test_keys(names, test_fraction=fraction)
    test = splits.test_keys(names, test_fraction=fraction, classes=groups)
    assert 0 < len(test) < len(names)
    if len(test) > 1:
        assert test <= before and not any(group <= test for group in groups)
        assert all(len(group & (before - test)) <= 1 for group in groups)


def test_one_example_cannot_be_split():
    with pytest.raises(ValueError, match="1 keys"):
        splits.test_keys({"only"})
