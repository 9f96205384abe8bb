"""What a run tells people: on a terminal, in a log, in TensorBoard, as pictures; by a clock of our own."""

import sys

import numpy as np
import pytest
from PIL import Image

from mcm_jax.training import observer
from mcm_jax.training.observer import RunObserver


class Writer:
    """In TensorBoard's place."""

    def __init__(self):
        self.scalars, self.images, self.told = {}, {}, []

    def write_scalars(self, step, scalars):
        self.scalars[step] = dict(scalars)

    def write_images(self, step, images):
        self.images[step] = images

    def flush(self):
        self.told.append("flush")

    def close(self):
        self.told.append("close")


class Clock:
    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now

    def passes(self, seconds):
        self.now += seconds


@pytest.fixture
def writer(monkeypatch):
    found = Writer()
    monkeypatch.setattr(observer.metric_writers, "SummaryWriter", lambda workdir: workdir)
    monkeypatch.setattr(observer.metric_writers, "AsyncMultiWriter", lambda writers: found)
    return found


@pytest.fixture
def clock(monkeypatch):
    found = Clock()
    monkeypatch.setattr(observer, "time", found)
    return found


GRID = np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8)


def observe(workdir, *, draw=lambda params: GRID, num_steps=10_000, log_every_steps=2, first_step=0):
    return RunObserver(
        workdir,
        first_step=first_step,
        num_steps=num_steps,
        batch_size=16,
        log_every_steps=log_every_steps,
        draw=draw,
    )


def test_lines_where_there_is_no_terminal(writer, clock, tmp_path, capsys):
    with observe(tmp_path, num_steps=5, first_step=1) as run:
        clock.passes(3.0)
        run.update(2)  # The first one compiles: it does not count in the speed.
        clock.passes(0.5)
        run.update(3)
        run.metrics(2, {"loss": 1.0, "gradient_norm": 8.0})
        clock.passes(0.5)
        run.update(4)
        run.metrics(3, {"loss": 2.0, "gradient_norm": 0.0})
        clock.passes(1.0)
        run.metrics(4, {"loss": 4.0, "gradient_norm": 1.0})
        run.update(5)
        clock.passes(0.25)
        run.metrics(5, {"loss": 7.0, "gradient_norm": 1.0})
    assert capsys.readouterr().out.splitlines() == [
        "first update after 3.0 s",
        "step 2/5  loss 1  gradient norm 8",
        # Two updates in 1.5 seconds.
        "step 4/5  loss 3  gradient norm 0.5  steps per second 1.333  images per second 21.33  1 s left",
        "step 5/5  loss 7  gradient norm 1  steps per second 4  images per second 64  0 s left",
    ]
    assert set(writer.scalars) == {2, 4, 5}
    assert writer.scalars[2] == {"loss": 1.0, "gradient_norm": 8.0}
    assert writer.scalars[5] == {
        "loss": 7.0,
        "gradient_norm": 1.0,
        "steps_per_second": 4.0,
        "images_per_second": 64.0,
    }
    assert writer.told == ["flush", "close"]


def test_a_picture_is_drawn_saved_and_shown_and_its_time_does_not_count(writer, clock, tmp_path):
    drawn = []

    def draw(params):
        drawn.append(params)
        clock.passes(100.0)
        return GRID

    with observe(tmp_path, draw=draw, log_every_steps=1) as run:
        run.update(1)
        run.metrics(1, {"loss": 1.0})
        run.pictures(1, "params")
        clock.passes(0.5)
        run.metrics(2, {"loss": 1.0})
    assert drawn == ["params"]
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "samples/step_0000001.png")), GRID)
    np.testing.assert_array_equal(writer.images[1]["samples"], GRID[None])
    assert writer.scalars[2]["steps_per_second"] == 2.0


def test_a_picture_may_be_the_first_thing(writer, clock, tmp_path):
    with observe(tmp_path) as run:
        run.pictures(0, "params")
    assert (tmp_path / "samples/step_0000000.png").exists()


def test_all_is_written_when_the_run_fails(writer, tmp_path):
    with pytest.raises(ValueError, match="a bug"), observe(tmp_path):
        raise ValueError("a bug")
    assert writer.told == ["flush", "close"]


class Bar:
    """In rich's place."""

    def __init__(self, *columns, **options):
        self.told, self.console = [], self

    def add_task(self, description, **fields):
        self.told.append(("add", description, fields))
        return "task"

    def start(self):
        self.told.append("start")

    def stop(self):
        self.told.append("stop")

    def update(self, task, **fields):
        assert task == "task"
        self.told.append(fields)

    def print(self, text):
        self.told.append(text)


def test_a_bar_on_a_terminal(writer, clock, tmp_path, monkeypatch, capsys):
    bars = []
    monkeypatch.setattr(observer, "Progress", lambda *args, **kwargs: bars.append(Bar()) or bars[0])
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with observe(tmp_path, num_steps=8, first_step=5) as run:
        run.update(6)
        clock.passes(0.5)
        run.update(7)
        run.metrics(6, {"loss": 1.0})
    assert bars[0].told == [
        ("add", "compiling", {"total": 8, "completed": 5}),
        "start",
        "first update after 0.0 s",
        {"completed": 6},
        {"completed": 7},
        {"description": "step 6/8  loss 1"},
        "stop",
    ]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("rate_seconds", "left"),
    [(1.0, "59 s"), (60.0, "59 min 00 s"), (61.5, "1 h 00 min"), (200.0, "3 h 16 min")],
)
def test_how_long_it_still_takes(rate_seconds, left, writer, clock, tmp_path, capsys):
    with observe(tmp_path, num_steps=61, log_every_steps=1) as run:
        clock.passes(7.0)  # Compiling is over when the first update is told.
        run.update(1)
        clock.passes(rate_seconds)
        run.metrics(2, {"loss": 1.0})
    assert capsys.readouterr().out.splitlines()[-1].endswith(f"  {left} left")
