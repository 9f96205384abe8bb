"""Tables as text, cell by cell, and what is said beside them."""

import pytest

from mcm_jax.reporting import averages, results, tables
from mcm_jax.reporting.averages import Estimate
from tests.reporting.made_up import TEACHER, config, record, write


def estimate(objective="cd", steps=4, mean=480.0, error=None, count=1, runs=("run",), **changes) -> Estimate:
    fields = {
        "objective": objective,
        "student_steps": None if objective == "diffusion" else steps,
        "steps": steps,
        "sampler": "addim" if objective == "diffusion" else "ddim",
        "mean": mean,
        "standard_error": error,
        "count": count,
        "runs": runs,
    }
    return Estimate(**(fields | changes))


def only_group(runs):
    (group,), _ = averages.group(results.collect(runs))
    return group


def test_markdown_table():
    table = tables.results_table(
        [
            estimate("diffusion", 64, 466.25),
            estimate("cd", 1, 805.44),
            estimate("cd", 4, 548.21, 12.34, 3),
            estimate("ct", 4, 600.0),
            estimate("cd", 16, 31.4159),
            estimate("cd", 8, 9.0, student_steps=4),
        ]
    )
    assert tables.markdown_table(table).splitlines() == [
        "| Student steps                   | Teacher | CD                   | CT    |",
        "|---------------------------------|---------|----------------------|-------|",
        "| 1                               |         | 805.4                |       |",
        "| 4                               |         | 548.2 ± 12.3 (n = 3) | 600.0 |",
        "| 4, sampled with 8 steps of ddim |         | 9.000                |       |",
        "| 16                              |         | 31.42                |       |",
        "| teacher, 64 steps of addim      | 466.2   |                      |       |",
    ]


def test_only_the_columns_that_there_are():
    assert tables.results_table([estimate("ct")]).head == ("Student steps", "CT")


def test_unlike_runs_share_a_cell_by_name():
    table = tables.results_table([estimate(mean=1.0, runs=("a", "b")), estimate(mean=2.0, runs=("c",))])
    assert table.rows == ((("4",), ("1.000 [a, b]", "2.000 [c]")),)


def test_names_are_escaped():
    name = "<b>|`x`*_&"
    table = tables.results_table([estimate(runs=(name,)), estimate(runs=("z",))])
    assert r"480.0 \[&lt;b&gt;\|\`x\`\*_&amp;\]<br>480.0 \[z\]" in tables.markdown_table(table)
    assert "<td>480.0 [&lt;b&gt;|`x`*_&amp;]<br>480.0 [z]</td>" in tables.html_table(table)


def test_html_table_has_the_same_cells():
    assert tables.html_table(tables.results_table([estimate("diffusion", 64), estimate("cd", 1)])) == (
        '<div class="wide"><table>\n'
        '<thead><tr><th scope="col">Student steps</th><th scope="col">Teacher</th><th scope="col">CD</th>'
        "</tr></thead>\n<tbody>\n"
        '<tr><th scope="row">1</th><td></td><td>480.0</td></tr>\n'
        '<tr><th scope="row">teacher, 64 steps of addim</th><td>480.0</td><td></td></tr>\n'
        "</tbody></table></div>"
    )


@pytest.mark.parametrize(
    ("value", "text"),
    [(1464.06, "1464.1"), (100.0, "100.0"), (25.704, "25.70"), (9.8765, "9.877"), (-0.5, "-0.500")],
)
def test_numbers(value, text):
    assert tables.number(value) == text


def test_the_floor_is_only_beside_a_distance_of_as_many_images(tmp_path):
    write(tmp_path / "cd4", record())
    group = only_group(tmp_path)
    assert group.distances == ("fd_effnet_lite0_1024", "fd_effnet_lite0_132")
    ceilings = [("ceiling (untrained network)", "1464.0"), ("ceiling (mean image)", "2000.0")]
    all_samples = [(bound.label, bound.value) for bound in tables.distance_bounds(group, group.distances[0])]
    first_few = [(bound.label, bound.value) for bound in tables.distance_bounds(group, group.distances[1])]
    assert all_samples == ceilings
    assert first_few == [("floor (test images)", "386.2"), *ceilings]
    assert [(bound.label, bound.value) for bound in tables.nearest_bounds(group)] == [
        ("test images", "21.00")
    ]


def test_a_bound_that_varies_says_from_where_to_where():
    bound = tables.Bound("ceiling (mean image)", 1464.06, 1469.89, "what it means.")
    assert bound.sentence == "Ceiling (mean image), 1464.1 to 1469.9: what it means."


def test_the_conditions_say_what_the_number_depends_on(tmp_path):
    write(tmp_path / "cd4", record(guidance=1.5))
    group = only_group(tmp_path)
    assert tables.heading(group.conditions) == "openmoji 16x16, 1024 samples, ema parameters"
    assert tables.conditions_text(group) == (
        "1024 samples each, with the averaged (EMA) parameters; sampling seed 0; classes drawn as often as "
        "in the training set; guidance 1.5; against the 1260 images of split train (reference aaaaaaaaaaaa); "
        "efficientnet-lite0 features (ffffffffffff) at 96x96 pixels."
    )


def test_how_runs_were_trained(tmp_path):
    write(tmp_path / "cd4", record(), config=config(teacher_checkpoint="runs/teacher"))
    write(tmp_path / "teacher", record(**TEACHER))
    table = tables.runs_table(results.collect(tmp_path))
    cells = [[line for (line,) in row] for row in table.rows]
    assert cells[0] == [
        *("cd4", "CD, 4 steps", "0", "500 of 500", "128", "0.0003, warm-up 100, linear decay", "0.99"),
        *("runs/teacher", "widths 32-64; teacher grid 64 to 1280 steps over 400 updates"),
    ]
    assert cells[1] == ["teacher", "Teacher", "0", "500 of –", "–", "–", "–", "–", "–"]


@pytest.mark.parametrize(
    ("objective", "settings", "text"),
    [
        (
            "ct",
            {"teacher_grid": "ect", "ect_q": 2.0, "ect_stages": 8, "ect_stage_steps": 30}
            | {"proposal": "lognormal", "loss_weight": "edm"},
            "teacher steps of ECT, q 2, 8 stages of 30 updates, t lognormal, weight edm",
        ),
        (
            "ct",
            {"teacher_grid": "doubling", "teacher_steps_first": 10.0, "teacher_steps_last": 1280.0}
            | {"anneal_steps": 250, "loss_weight": "inverse_gap"},
            "teacher grid 10 to 1280 steps over 250 updates, doubling, weight inverse_gap",
        ),
        (
            "shortcut",
            {"every": 8, "target_decay": 0.999},
            "one in 8 learns from two steps of an average with decay 0.999",
        ),
    ],
)
def test_how_later_methods_were_trained(objective, settings, text, tmp_path):
    section = "shortcut" if objective == "shortcut" else "consistency"
    write(tmp_path / "run", record(objective=objective), config={"objective": objective, section: settings})
    ((*_, notes),) = tables.runs_table(results.collect(tmp_path)).rows
    assert notes == (text,)


def test_the_other_methods_have_columns_and_rows_of_their_own():
    table = tables.results_table(
        [
            estimate("diffusion", 64, 500.0),
            estimate("guidance", 64, 510.0, student_steps=None, sampler="addim"),
            estimate("progressive", 4, 520.0),
            estimate("tract", 1, 530.0),
        ]
    )
    assert table.head == ("Student steps", "Teacher", "Guidance distilled", "PD", "TRACT")
    labels = [row[0] for row in table.rows]
    assert labels == [
        ("1",),
        ("4",),
        ("teacher, 64 steps of addim",),
        ("guidance distilled, 64 steps of addim",),
    ]
