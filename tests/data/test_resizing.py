import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mcm_jax.data import resizing


@given(st.integers(1, 12), st.integers(1, 24), st.integers(0, 2**32))
def test_area_sums_are_exact(resolution, side, seed):
    """Repeat every pixel `resolution` times, and the cells are blocks of whole pixels; enlarging too."""
    values = np.random.default_rng(seed).integers(0, 256, (side, 2, 3), np.uint8)
    expected = values.repeat(resolution, axis=0).reshape(resolution, side, 2, 3).sum(1)
    for given_as in (values, values.astype(np.int32)):
        found = resizing._sums_over_cells(given_as, resolution, np.int32)
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("side", [257, 258, 900, 3000])
def test_sums_of_large_images_do_not_overflow(side):
    """Two cells of white: up to 257 rows fit 16 bits, up to 2,901 pixels squared 31 bits."""
    white = Image.fromarray(np.full((side, side, 3), 255, np.uint8))
    assert (resizing.square_area(white, 1) == 255).all() and (resizing.square_area(white, 2) == 255).all()


def test_a_half_is_rounded_to_even():
    """As in NumPy."""
    halves = Image.fromarray(np.array([[0, 1], [1, 0]], np.uint8)).convert("RGB")
    odd_halves = Image.fromarray(np.array([[1, 2], [2, 1]], np.uint8)).convert("RGB")
    assert (resizing.square_area(halves, 1) == 0).all() and (resizing.square_area(odd_halves, 1) == 2).all()
