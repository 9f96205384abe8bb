"""The picture of paths, of made-up ones."""

import io

import numpy as np
from PIL import Image

from mcm_jax.reporting import trajectories

BLUE, VERMILION = (0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)


def panel(title, starts):
    t = np.linspace(1, 0, 9)
    z = np.outer(t, starts) + np.outer(1 - t, np.sign(starts))
    return trajectories.Panel(title, "of 3", t, z, np.array([0.0, 0.5, 1.0]), np.sign(starts))


def plot(starts):
    z = np.linspace(-2, 2, 41)
    density = np.broadcast_to(np.exp(-(z**2)), (11, 41))
    marginals = trajectories.Marginals(np.linspace(1, 0, 11), z, density)
    return trajectories.trajectories_plot(
        [panel("one", starts), panel("two", starts)], marginals, caption="said below"
    )


def near(png, colour):
    pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"), int)
    return np.abs(pixels - colour).max(axis=-1) < 24


def test_every_panel_has_its_paths_dots_title_and_densities():
    starts = np.array([-1.5, -0.5, 0.5, 1.0])
    figure = plot(starts)
    axes = np.array(figure.axes).reshape(3, 2)
    assert [a.get_title() for a in axes[0]] == ["one", "two"]
    assert [text.get_text() for text in axes[0, 1].texts] == ["of 3"]
    assert [text.get_text() for text in figure.texts] == ["said below"]
    # A line and its dots for each start, and one line across for the boundary inside.
    lines = axes[1, 0].get_lines()
    assert len(lines) == 2 * len(starts) + 1
    path, dots = lines[:2]
    np.testing.assert_allclose(path.get_xdata()[[0, -1]], [-1.5, -1.0])
    np.testing.assert_allclose(path.get_ydata()[[0, -1]], [1, 0])
    np.testing.assert_allclose(dots.get_ydata(), [1, 0.5, 0])
    # Data above: t = 0 is at the top.
    assert axes[1, 0].get_ylim() == (1, 0)
    assert axes[2, 0].get_ylim()[1] == 0 < axes[2, 0].get_ylim()[0]


def test_a_path_has_the_colour_of_its_starts_side():
    left, right = (trajectories.png(plot(np.array(starts))) for starts in ([-1.0, -0.5], [0.5, 1.0]))
    assert near(left, BLUE).any() and not near(left, VERMILION).any()
    assert near(right, VERMILION).any() and not near(right, BLUE).any()


def test_equal_numbers_make_equal_files():
    starts = np.array([-1.0, 1.0])
    assert trajectories.png(plot(starts)) == trajectories.png(plot(starts))
