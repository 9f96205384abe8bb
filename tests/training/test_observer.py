"""Progress on a terminal, in a log, in TensorBoard and as pictures, by a clock of our own."""

import errno
import io
import json
import sys
import time

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing import plugin_event_accumulator
from tensorboard.util.tensor_util import make_ndarray

from mcm_jax.training import clock as clocks
from mcm_jax.training import observer, writers
from mcm_jax.training.observer import RunObserver


class Events:
    """In the place of TensorBoard's event file."""

    def __init__(self):
        self.logged_scalars, self.logged_images, self.closed = {}, {}, 0

    def scalars(self, step, values):
        self.logged_scalars[step] = self.logged_scalars.get(step, {}) | values

    def image(self, step, name, image):
        self.logged_images[step, name] = image

    def close(self):
        self.closed += 1


class Clock:
    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now

    def passes(self, seconds):
        self.now += seconds


@pytest.fixture
def events(monkeypatch):
    found = Events()
    monkeypatch.setattr(writers, "TensorBoard", lambda workdir, *, first_step: found)
    return found


@pytest.fixture
def clock(monkeypatch):
    found = Clock()
    for module in (observer, clocks):
        monkeypatch.setattr(module, "time", found)
    return found


def test_training_goes_on_if_nothing_can_be_written(tmp_path, capsys):
    """Neither pictures nor metrics are worth a run."""
    with observe(tmp_path) as found:
        (tmp_path / "samples").write_text("a file in the place of the directory")
        found._writers[0]._records.close()
        found._writers[0]._records = Refusing()
        found.metrics(2, {"loss": 1.0})
        found.pictures(2, None)
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    assert any("samples could not be written" in note for note in notes)
    assert any("No space left on device" in note for note in notes)


class Refusing:
    def write(self, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    close = flush = lambda self: None


GRID = np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8)


def observe(
    workdir,
    *,
    draw=lambda params: GRID,
    num_steps=10_000,
    log_every_steps=2,
    first_step=0,
    to=("tensorboard",),
):
    return RunObserver(
        workdir,
        first_step=first_step,
        num_steps=num_steps,
        batch_size=16,
        log_every_steps=log_every_steps,
        draw=draw,
        clock=clocks.Clock(),
        writers=writers.opened(to, workdir, first_step=first_step, config={}),
    )


def test_lines_where_there_is_no_terminal(events, clock, tmp_path, capsys):
    with observe(tmp_path, num_steps=5, first_step=1) as run:
        clock.passes(3.0)
        run.update(2)  # The first one compiles: it does not count in the speed.
        run.clock.updates_begin()
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
        # 2.25 of 5.25 seconds.
        "5 s: 42.9% of the time on updates (goodput), 57.1% on start, 0.0% on data, 0.0% on checkpoints, "
        "0.0% on samples",
    ]
    assert set(events.logged_scalars) == {2, 4, 5}
    assert events.logged_scalars[2].items() >= {"loss": 1.0, "gradient_norm": 8.0}.items()
    assert "steps_per_second" not in events.logged_scalars[2]
    assert events.logged_scalars[4]["seconds/updates"] == 1.5 / 2
    assert events.logged_scalars[5]["share/updates"] == pytest.approx(2.25 / 5.25)
    assert (
        events.logged_scalars[5].items()
        >= {
            "loss": 7.0,
            "gradient_norm": 1.0,
            "steps_per_second": 4.0,
            "images_per_second": 64.0,
            "seconds/updates": 0.25,
        }.items()
    )
    assert events.closed == 1


def test_a_picture_is_drawn_saved_and_shown_and_its_time_does_not_count(events, clock, tmp_path):
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
    np.testing.assert_array_equal(events.logged_images[1, "samples"], GRID)
    assert events.logged_scalars[2]["steps_per_second"] == 2.0


def test_a_picture_may_be_the_first_thing(events, clock, tmp_path):
    with observe(tmp_path) as run:
        run.pictures(0, "params")
    assert (tmp_path / "samples/step_0000000.png").exists()


def test_all_is_written_when_the_run_fails(events, tmp_path):
    with pytest.raises(ValueError, match="a bug"), observe(tmp_path):
        raise ValueError("a bug")
    assert events.closed == 1


class Bar:
    """In rich's place."""

    def __init__(self, *columns, **options):
        self.calls, self.console = [], self

    def add_task(self, description, **fields):
        self.calls.append(("add", description, fields))
        return "task"

    def start(self):
        self.calls.append("start")

    def stop(self):
        self.calls.append("stop")

    def update(self, task, **fields):
        assert task == "task"
        self.calls.append(fields)

    def print(self, text):
        self.calls.append(text)


def test_a_bar_on_a_terminal(events, clock, tmp_path, monkeypatch, capsys):
    bars = []
    monkeypatch.setattr(observer, "Progress", lambda *args, **kwargs: bars.append(Bar()) or bars[0])
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with observe(tmp_path, num_steps=8, first_step=5) as run:
        run.update(6)
        clock.passes(0.5)
        run.update(7)
        run.metrics(6, {"loss": 1.0})
    assert bars[0].calls == [
        ("add", "compiling", {"total": 8, "completed": 5}),
        "start",
        "first update after 0.0 s",
        {"completed": 6},
        {"completed": 7},
        {"description": "step 6/8  loss 1"},
        "stop",
        "0 s: 0.0% of the time on updates (goodput), 100.0% on start, 0.0% on data, 0.0% on checkpoints, "
        "0.0% on samples",
    ]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("rate_seconds", "left"),
    [(1.0, "59 s"), (60.0, "59 min 00 s"), (61.5, "1 h 00 min"), (200.0, "3 h 16 min")],
)
def test_how_long_it_still_takes(rate_seconds, left, events, clock, tmp_path, capsys):
    with observe(tmp_path, num_steps=61, log_every_steps=1) as run:
        clock.passes(7.0)  # Compiling is over when the first update is told.
        run.update(1)
        clock.passes(rate_seconds)
        run.metrics(2, {"loss": 1.0})
    assert capsys.readouterr().out.splitlines()[-2].endswith(f"  {left} left")


def shown(workdir):
    """tag -> steps that TensorBoard shows, and the losses."""
    board = plugin_event_accumulator.EventAccumulator(str(workdir)).Reload()
    steps = {tag: [event.step for event in board.Tensors(tag)] for tag in board.Tags()["tensors"]}
    losses = [float(make_ndarray(event.tensor_proto)) for event in board.Tensors("loss")]
    return steps, losses


def start(workdir, *, first_step, last_step, loss):
    """Logs every fifth update, and a picture at every tenth."""
    with observe(workdir, log_every_steps=5, first_step=first_step) as run:
        for step in range(first_step + 1, last_step + 1):
            run.metrics(step, {"loss": loss})
            if step % 10 == 0:
                run.pictures(step, "params")
    # The names of event files have whole seconds; a new start takes longer than one.
    for path in sorted(workdir.glob("events.out.tfevents.*")):
        events, out, tfevents, seconds, rest = path.name.split(".", 4)
        path.rename(path.with_name(f"{events}.{out}.{tfevents}.{int(seconds) - 100}.{rest}"))


def test_every_step_is_shown_once_after_a_restart(tmp_path, capsys):
    """Killed at update 50 with the newest checkpoint at 20, then continued; killed before any; not killed."""
    start(tmp_path, first_step=0, last_step=50, loss=1.0)
    start(tmp_path, first_step=20, last_step=60, loss=2.0)
    steps, losses = shown(tmp_path)
    assert steps["loss"] == list(range(5, 61, 5)) and losses == [1.0] * 4 + [2.0] * 8
    assert steps["samples"] == list(range(10, 61, 10))
    start(tmp_path, first_step=60, last_step=70, loss=3.0)
    steps, losses = shown(tmp_path)
    assert steps["loss"] == list(range(5, 71, 5)) and losses == [1.0] * 4 + [2.0] * 8 + [3.0] * 2
    start(tmp_path, first_step=0, last_step=10, loss=4.0)
    steps, losses = shown(tmp_path)
    assert (steps["loss"], steps["samples"], losses) == ([5, 10], [10], [4.0, 4.0])


def test_tensorboard_has_metrics_and_pictures(tmp_path, capsys):
    start(tmp_path, first_step=0, last_step=10, loss=1.5)
    board = plugin_event_accumulator.EventAccumulator(str(tmp_path)).Reload()
    tags = {tag for tag in board.Tags()["tensors"] if not tag.startswith(("seconds/", "share/"))}
    assert tags == {"loss", "steps_per_second", "images_per_second", "samples"}
    (image,) = board.Tensors("samples")
    width, height, encoded = make_ndarray(image.tensor_proto)
    assert (int(width), int(height)) == (6, 4)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(encoded))), GRID)


def test_a_run_goes_on_without_a_picture(tmp_path, capsys):
    with observe(tmp_path, draw=lambda params: None) as run:
        run.pictures(10, "params")
    assert "the samples of step 10 contain NaN or infinity and are not saved" in capsys.readouterr().out
    assert not list(tmp_path.glob("samples/*"))


def test_json_lines(tmp_path):
    for first_step, loss in ((0, 1.5), (2, 2.5)):
        with observe(tmp_path, to=("json", "json"), log_every_steps=1, first_step=first_step) as run:
            run.metrics(first_step + 1, {"loss": loss})
            run.metrics(first_step + 2, {"loss": loss + 1})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    found = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    assert found == [(1, 1.5), (2, 2.5), (3, 2.5), (4, 3.5)]
    assert [line["step"] for line in lines if "share/updates" in line] == [2, 4]
    assert all(abs(line["time"] - time.time()) < 60 for line in lines)
    assert not list(tmp_path.glob("events*"))


def test_the_peak_memory_is_reported_if_devices_know_it(events, clock, tmp_path, monkeypatch, capsys):
    class Device:
        def __init__(self, stats):
            self.memory_stats = lambda: stats

    devices = [Device({"peak_bytes_in_use": int(gib * 2**30)}) for gib in (1.5, 2.25)]
    monkeypatch.setattr(observer.jax, "local_devices", lambda: devices)
    with observe(tmp_path, log_every_steps=1) as run:
        clock.passes(1.0)
        run.metrics(1, {"loss": 1.0})
    assert capsys.readouterr().out.endswith("; peak memory 2.25 GiB per device\n")
    assert events.logged_scalars[1]["peak_memory_gib"] == 2.25
    for stats in (None, {}):  # As CPUs.
        monkeypatch.setattr(observer.jax, "local_devices", lambda stats=stats: [Device(stats)])
        assert observer.peak_memory_bytes() is None
