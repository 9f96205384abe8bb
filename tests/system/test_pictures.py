"""Grids hold every image in reading order, and PNG files hold the grid."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mcm_jax.system.errors import InputError
from mcm_jax.system.pictures import image_grid, save_png


@given(st.integers(1, 9), st.integers(1, 4), st.integers(0, 2), st.integers(1, 3))
def test_every_image_is_in_its_place_and_the_rest_is_white(count, columns, gap, scale):
    images = np.random.default_rng(0).integers(0, 255, (count, 3, 5, 3), dtype=np.uint8)
    grid = image_grid(images, columns, gap=gap, scale=scale)
    small = grid[::scale, ::scale]
    np.testing.assert_array_equal(grid, small.repeat(scale, 0).repeat(scale, 1))
    rest = small.copy()
    for index, image in enumerate(images):
        row, column = divmod(index, min(columns, count))
        place = np.s_[row * (3 + gap) : row * (3 + gap) + 3, column * (5 + gap) : column * (5 + gap) + 5]
        np.testing.assert_array_equal(small[place], image)
        rest[place] = 255
    assert rest.min() == 255


def test_a_png_holds_the_pixels_and_replaces_the_old_one(tmp_path):
    path = tmp_path / "new" / "grid.png"
    for seed in range(2):
        image = np.random.default_rng(seed).integers(0, 256, (6, 4, 3), dtype=np.uint8)
        save_png(image, path)
        np.testing.assert_array_equal(np.asarray(Image.open(path)), image)
    assert list(path.parent.iterdir()) == [path]


def test_bad_input_is_named(tmp_path):
    with pytest.raises(InputError, match="0 images"):
        image_grid(np.zeros((0, 2, 2, 3), np.uint8), 4)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"x.png: cannot write there .*choose another path"):
        save_png(np.zeros((2, 2, 3), np.uint8), tmp_path / "file" / "x.png")
