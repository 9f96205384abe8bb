"""The plot's points, bars and lines."""

import io

import numpy as np
from PIL import Image

from mcm_jax.reporting import plots
from mcm_jax.reporting.tables import Bound
from tests.reporting.test_tables import estimate

FLOOR = Bound("floor (test images)", 386.0, 386.0, "")
CEILING = Bound("ceiling (untrained network)", 1400.0, 1500.0, "")


def draw(estimates, bounds=()):
    return plots.distance_plot(estimates, bounds, title="a title", distance="fd_effnet_lite0_1024")


def test_points_error_bars_and_lines():
    figure = draw(
        [
            estimate("diffusion", 64, 466.0, 2.0, 3),
            estimate("cd", 4, 548.0, 12.0, 3),
            estimate("cd", 1, 805.0),
            estimate("ct", 4, 600.0, 30.0, 2),
            estimate("cd", 8, 1.0, student_steps=4),
        ],
        [FLOOR, CEILING],
    )
    (axes,) = figure.axes
    cd, ct = axes.containers
    assert [bars.get_label() for bars in (cd, ct)] == ["CD", "CT"]
    np.testing.assert_array_equal(cd.lines[0].get_xydata(), [[1, 805], [4, 548]])
    np.testing.assert_array_equal(ct.lines[0].get_xydata(), [[4, 600]])
    segments = cd.lines[2][0].get_segments()
    np.testing.assert_allclose(segments[-1], [[4, 536], [4, 560]])
    assert [len(segment) for segment in segments] == [0, 2]
    np.testing.assert_allclose(ct.lines[2][0].get_segments()[0], [[4, 570], [4, 630]])
    lines = {line.get_label(): line.get_ydata()[0] for line in axes.lines if line.get_label()[0] != "_"}
    assert lines == {
        "teacher, 64 steps of addim": 466.0,
        "floor (test images): 386.0": 386.0,
        "ceiling (untrained network): 1400.0 to 1500.0": 1450.0,
    }
    bands = sorted((patch.get_y(), patch.get_height()) for patch in axes.patches)
    assert bands == [(464.0, 4.0), (1400.0, 100.0)]
    assert axes.get_title() == "a title"
    assert axes.get_xlabel() and "fd_effnet_lite0_1024" in axes.get_ylabel()
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "4"]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["CD", "CT", *lines]


def test_unlike_runs_at_one_number_of_steps_are_not_joined():
    (axes,) = draw([estimate(mean=1.0), estimate(mean=2.0), estimate(steps=8, mean=3.0)]).axes
    assert axes.containers[0].lines[0].get_linestyle() == "None"


def test_no_students_no_plot():
    assert draw([estimate("diffusion", 64)]) is None


def test_names_are_no_formulas():
    figure = plots.distance_plot(
        [estimate(), estimate("diffusion", 64, sampler="$x^$")], [], title="$_$", distance=""
    )
    assert plots.svg(figure)


def test_distances_of_zero_are_drawn():
    figure = draw([estimate(mean=-1e-9), estimate(steps=8, mean=3.0)])
    assert figure.axes[0].get_yscale() == "linear"
    assert plots.svg(figure).startswith(b"<?xml")


def test_equal_figures_are_equal_files():
    first, second = (plots.svg(draw([estimate(error=1.0, count=2)], [FLOOR])) for _ in range(2))
    assert first == second


def test_pictures_side_by_side_are_a_column_each():
    png = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), 200, np.uint8)).save(png, format="PNG")
    widths = [
        Image.open(io.BytesIO(plots.side_by_side([("a", png.getvalue())] * count))).width for count in (1, 3)
    ]
    assert widths[1] == 3 * widths[0]
