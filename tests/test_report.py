"""The program: what it writes, prints, and says to bad input."""

import errno
import re
import subprocess
import sys

import pytest
from PIL import Image

from mcm_jax.bench import trajectories
from mcm_jax.bench import trajectories_figure as drawing
from mcm_jax.reporting import outputs
from mcm_jax.system.errors import InputError
from tests import forks
from tests.reporting.made_up import TEACHER, record, write


@pytest.fixture
def runs(tmp_path):
    write(tmp_path / "runs" / "smoke" / "teacher", record(466.0, **TEACHER))
    write(tmp_path / "runs" / "smoke" / "cd4", record(500.0))
    return tmp_path / "runs"


def test_the_program_writes_the_page_and_prints_the_table(runs):
    done = forks.program("report", f"--runs={runs}")
    assert done.returncode == 0
    table, _, last = done.stdout.rstrip("\n").rpartition("\n")
    assert (runs / "report.md").read_text() == table
    assert "| 4                          |         | 500.0 |" in table
    assert last == f"The page with plots and samples: {runs / 'report.html'}"
    assert (runs / "report.html").read_text().startswith("<!DOCTYPE html>")
    assert f"note: {'smoke/cd4'} has no run.json" in done.stderr
    assert sorted(path.name for path in runs.iterdir()) == ["report.html", "report.md", "report.png", "smoke"]


def test_out_names_the_page_and_is_made(runs, tmp_path):
    assert outputs.write_page(runs, tmp_path / "new" / "results.html")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "results.html",
        "results.md",
        "results.png",
    ]


def test_the_same_results_make_the_same_page(runs, tmp_path):
    for name in ("a", "b"):
        outputs.write_page(runs, tmp_path / f"{name}.html")
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_bad_input_is_one_line_and_code_2(runs, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    damaged = tmp_path / "damaged"
    path = write(damaged / "cd4", record())
    path.write_text("nonsense\n" + path.read_text())
    for arguments, message in [
        ((f"--runs={tmp_path / 'missing'}",), "no such directory"),
        ((f"--runs={tmp_path / 'empty'}",), "no results"),
        ((f"--runs={damaged}",), f"{path}:1 is damaged"),
        ((f"--runs={runs}", f"--out={tmp_path / 'report.pdf'}"), "must end in .html"),
        ((f"--runs={runs}", f"--out={tmp_path / 'file' / 'report.html'}"), "cannot write there"),
        ((), "--runs"),
        (("--runs=",), "--runs is empty"),
        ((f"--runs={runs}", "--tables", f"--out={path}"), "--out does not apply to --tables"),
        ((f"--runs={runs}", "--demo=a.html", "--out=b.html"), "--out does not apply to --demo"),
        ((f"--runs={runs}", "--seeds=2"), "--seeds applies only to --figure"),
        ((f"--runs={runs},{runs}",), "several apply only to --prompts=FILE"),
        ((f"--runs={runs}", f"--text_encoder={tmp_path}"), "--text_encoder applies only to --prompts"),
        (
            ("--figure=trajectories", f"--prompts={path}"),
            "--figure, --demo and --tables exclude each other",
        ),
        ((f"--runs={runs}", f"--prompts={tmp_path / 'missing'}"), "missing can't be read"),
        ((f"--runs={runs}", f"--prompts={path}", f"--out={tmp_path / 'a.pdf'}"), "must end in .png"),
        ((f"--runs={runs}", "--figure=trajectories"), "either --runs=DIR for a page or --figure=NAME"),
        (("--figure=table",), "trajectories"),
        (("--figure=trajectories", f"--out={tmp_path / 'figure.svg'}"), "must end in .png"),
        (("--figure=trajectories", f"--out={tmp_path / 'file' / 'figure.png'}"), "cannot write there"),
    ]:
        done = forks.program("report", *arguments)
        assert done.returncode == 2, arguments
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
        assert message in done.stderr


def test_the_figure_is_drawn_and_its_numbers_are_printed(tmp_path, capsys, monkeypatch):
    # Another student would take as long again, to compile.
    monkeypatch.setattr(drawing, "FIGURE_STEPS", (1, 4))
    out = tmp_path / "new" / "figure.png"
    line = drawing.trajectories_figure(out, num_paths=6, num_samples=200, num_updates=2)
    with Image.open(out) as picture:
        assert picture.format == "PNG" and max(picture.size) > 800
    assert "\n" not in line
    number = r"\d+\.\d{4}"
    assert re.search(
        f"200 samples .*: 1 step {number}, 4 steps {number}, diffusion model {number}; "
        f"exact samples {number} ± {number} over 100 draws$",
        line,
    )
    printed = capsys.readouterr().err
    assert [printed.count(f"{title}: ") for title in ("1 step", "4 steps")] == [2, 2]


def test_the_figure_s_numbers_over_training_seeds(tmp_path, monkeypatch):
    """Mean and standard error of those that every seed has alone."""
    monkeypatch.setattr(drawing, "FIGURE_STEPS", (1,))
    monkeypatch.setattr(drawing, "_SETS", 2)
    distances = {0: 0.25, 1: 0.5, 2: 0.75}

    def student(mixture, z_1, *, config, num_samples):
        found = trajectories.exact(mixture, z_1, num_samples=num_samples)
        return found._replace(distance=distances[config.seed])

    monkeypatch.setattr(trajectories, "student", student)
    line = drawing.trajectories_figure(tmp_path / "figure.png", seeds=3, num_paths=2, num_samples=50)
    # The sample's standard deviation is 1/4.
    assert f"1 step 0.2500 (0.5000 ± {0.25 / 3**0.5:.4f} over 3 training seeds), diffusion model" in line


def test_no_student_is_trained_for_a_picture_that_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr("mcm_jax.bench.vectors.train", None)
    (tmp_path / "taken.png").mkdir()
    (tmp_path / "file").write_text("")
    for out in ("figure.jpg", "taken.png", "file/figure.png"):
        with pytest.raises(InputError, match="--out"):
            drawing.trajectories_figure(tmp_path / out)


def test_a_page_is_replaced_whole_or_not_at_all(runs, tmp_path, monkeypatch):
    out = tmp_path / "report.html"
    for old in (out, out.with_suffix(".md")):
        old.write_text("the old one")

    def fail(descriptor):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(InputError, match="Input/output error"):
        outputs.write_page(runs, out)
    monkeypatch.undo()
    assert out.read_text() == out.with_suffix(".md").read_text() == "the old one"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.md", "runs"]


def test_it_starts_without_jax_and_tensorflow():
    code = (
        "import sys, mcm_jax.report, mcm_jax.reporting.page; "
        "print(sorted({'jax', 'tensorflow', 'flax'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
