"""Conditions are any pytrees: all of an example's condition is dropped, or none."""

import jax.numpy as jnp
import numpy as np

from mcm_jax.diffusion import conditions

COND = {
    "label": jnp.array([1, 2, 3]),
    "mask": jnp.array([[True, True], [True, False], [False, True]]),
    "tokens": jnp.arange(12.0).reshape(3, 2, 2),
}
NULL = {"label": 9, "mask": np.zeros(2, bool), "tokens": np.full((2, 2), -1.0)}


def test_unconditional_is_the_null_condition_for_everyone():
    found = conditions.unconditional(COND, NULL)
    np.testing.assert_array_equal(found["label"], [9, 9, 9])
    np.testing.assert_array_equal(found["mask"], np.zeros((3, 2)))
    np.testing.assert_array_equal(found["tokens"], np.full((3, 2, 2), -1))
    assert {name: leaf.dtype for name, leaf in found.items()} == {n: leaf.dtype for n, leaf in COND.items()}


def test_all_parts_of_a_condition_are_dropped_together():
    found = conditions.drop(COND, jnp.array([False, True, False]), NULL)
    np.testing.assert_array_equal(found["label"], [1, 9, 3])
    np.testing.assert_array_equal(found["mask"], [[True, True], [False, False], [False, True]])
    expected = np.asarray(COND["tokens"]).copy()
    expected[1] = -1
    np.testing.assert_array_equal(found["tokens"], expected)
    assert {name: leaf.dtype for name, leaf in found.items()} == {n: leaf.dtype for n, leaf in COND.items()}


def test_nothing_to_drop():
    assert conditions.unconditional(None, None) is None
