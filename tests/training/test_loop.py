"""The loop with a made-up update: what happens, in which order, and what ends it."""

import os
import re
import signal
import socket
import threading

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mcm_jax.system import sharding
from mcm_jax.training import clock as clocks
from mcm_jax.training import loop, watch
from mcm_jax.training.checkpoints import Checkpoints
from mcm_jax.training.state import TrainState


class Story(Checkpoints):
    """Update, checkpoints and observer in one: it tells what was done, in order."""

    def __init__(self, *, saved=None, metrics=None, do=None):
        """saved: the newest checkpoint; metrics: of an update, by its number; do: what else it does."""
        self.told, self.saved, self.made_up, self.do = [], saved, metrics or {}, do or {}
        self.clock = clocks.Clock()

    def tell(self, what, number):
        self.told.append(f"{what} {number}")

    def train_step(self, state, teacher_params, batch):
        assert teacher_params == "teacher"
        number = int(jax.device_get(state.step)) + 1
        # Batches are numbered from 0.
        assert float(jax.device_get(batch["image"])[0]) == number - 1 - self.first
        self.tell("compute", number)
        self.do.get(number, lambda: None)()
        metrics = {"loss": float(number), "gradient_norm": 1.0} | self.made_up.get(number, {})
        number = jax.device_put(np.int32(number))
        return TrainState(number, ("params", number), ("ema", number), None), jax.device_put(metrics)

    # Checkpoints

    def retry_is_due(self):
        return False

    def save(self, state, data, *, step):
        assert int(jax.device_get(state.step)) == step
        assert data.get_state()["next_index"] == step - self.first
        self.tell("save", step)
        self.saved = step

    def finish(self, state, data, *, step):
        self.save(state, data, step=step)
        self.told.append("wait")

    # Observer

    def update(self, step):
        self.tell("update", step)

    def metrics(self, step, values):
        assert values["loss"] == step
        self.tell("metrics", step)

    def pictures(self, step, params):
        assert params[0] == "ema" and int(jax.device_get(params[1])) == step
        self.tell("picture", step)

    def example(self, number):
        return {"image": np.full(1, number, np.float32)}

    def train(self, num_steps, *, first=0, checkpoint_every=2, sample_every=3, minutes=0.0):
        self.first = first
        data = grain.MapDataset.range(1000).map(self.example)
        return loop.train(
            TrainState(jnp.int32(first), None, None, None),
            "teacher",
            self.train_step,
            iter(data.to_iter_dataset(grain.ReadOptions(num_threads=0))),
            mesh=sharding.make_mesh(data=-1, fsdp=1),
            settings=loop.TrainingSettings(
                num_steps=num_steps,
                checkpoint_every_steps=checkpoint_every,
                sample_every_steps=sample_every,
                checkpoint_every_minutes=minutes,
            ),
            checkpoints=self,
            observer=self,
        )


def test_everything_in_its_order():
    """Metrics one update late, so that the host never waits; but before a state is saved or shown."""
    story = Story()
    assert story.train(6) is True
    assert story.told == [
        *("compute 1", "update 1"),
        *("compute 2", "metrics 1", "update 2", "metrics 2", "save 2"),
        *("compute 3", "update 3", "metrics 3", "picture 3"),
        *("compute 4", "update 4", "metrics 4", "save 4"),
        *("compute 5", "update 5"),
        *("compute 6", "metrics 5", "update 6", "metrics 6", "save 6", "picture 6"),
        *("save 6", "wait"),
    ]


def test_checkpoints_by_time(monkeypatch):
    """Every three minutes since the last checkpoint, whatever was the reason for that one."""
    time = Clock()
    monkeypatch.setattr(loop, "time", time)
    story = Story(do={n: lambda: time.passes(60.0) for n in range(1, 13)})
    assert story.train(12, checkpoint_every=5, sample_every=0, minutes=3.0) is True
    # A minute has passed after update 1; the time is looked at before each update.
    assert [line for line in story.told if line.startswith("save")] == [
        *("save 4", "save 5", "save 9", "save 10"),
        "save 12",
    ]


def test_where_the_time_goes():
    story = Story(do={4: lambda: story.clock.seconds()})
    assert story.train(6) is True
    seconds = story.clock.seconds()
    assert all(value > 0 for value in seconds.values())


def test_the_last_update_is_saved_off_the_beat_and_no_pictures_if_never():
    story = Story()
    assert story.train(3, checkpoint_every=2, sample_every=0) is True
    assert story.told[-4:] == ["update 3", "metrics 3", "save 3", "wait"]
    assert not any(line.startswith("picture") for line in story.told)


def test_a_run_that_continues():
    story = Story(saved=4)
    assert story.train(5, first=4) is True
    assert story.told == ["compute 5", "update 5", "metrics 5", "save 5", "wait"]


def test_a_run_that_is_done_does_nothing_more():
    story = Story(saved=4)
    assert story.train(4, first=4) is True
    assert story.told == ["save 4", "wait"]


@pytest.mark.parametrize("name", ["loss", "gradient_norm"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    ("update", "first", "last_good"),
    [
        (1, 0, "there is no checkpoint yet"),
        (3, 0, "the last good checkpoint is 2"),
        (4, 0, "the last good checkpoint is 2"),  # Where the next checkpoint is due.
        (7, 0, "the last good checkpoint is 6"),  # The last update.
        (5, 4, "the last good checkpoint is 4"),  # The first after a restart.
    ],
)
def test_what_is_not_finite_stops_the_run_and_is_not_saved(name, value, update, first, last_good):
    story = Story(saved=first or None, metrics={update: {name: value}})
    host = re.escape(socket.gethostname())
    message = rf"update {update} is not finite on {host}: .*'{name}': {value}.*; {last_good}$"
    with pytest.raises(loop.NonFiniteError, match=message):
        story.train(7, first=first, sample_every=2)
    late = {f"{what} {n}" for what in ("save", "picture", "metrics") for n in range(update, 8)}
    assert not late & set(story.told)
    assert f"compute {update + 2}" not in story.told


@pytest.fixture
def handlers():
    """A handler of its own for each signal."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    mine = {number: (lambda *_, number=number: None) for number in before}
    for number, handler in mine.items():
        signal.signal(number, handler)
    yield mine
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_after_the_update_and_saves(number, handlers):
    story = Story(do={3: lambda: os.kill(os.getpid(), number)})
    assert story.train(9, sample_every=0) is False
    assert story.told[-5:] == ["compute 3", "update 3", "metrics 3", "save 3", "wait"]
    assert {number: signal.getsignal(number) for number in handlers} == handlers


def test_signals_are_given_back_after_an_error_too(handlers):
    with pytest.raises(loop.NonFiniteError):
        Story(metrics={1: {"loss": np.nan}}).train(1)
    assert {number: signal.getsignal(number) for number in handlers} == handlers


def test_it_trains_in_a_thread_where_no_signals_come():
    story, ends = Story(), []
    thread = threading.Thread(target=lambda: ends.append(story.train(3)))
    thread.start()
    thread.join()
    assert ends == [True] and story.told[-1] == "wait"


def test_transfers_that_nobody_asked_for_are_mistakes():
    """Each would make the host wait for the device."""
    story = Story(do={2: lambda: jnp.ones(3) + np.ones(3, np.float32)})
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        story.train(3)


class Clock:
    """In the place of the module `time`."""

    now = 0.0

    def monotonic(self):
        return self.now

    def passes(self, seconds):
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    found = Clock()
    monkeypatch.setattr(watch, "time", found)
    return found


def test_what_is_unusual_is_told_but_not_compiling_saving_or_drawing(clock, capsys):
    seconds = {1: 60.0, 50: 1.0, 51: 60.0}

    class Slow(Story):
        def example(self, number):
            clock.passes(2.0 if number == 49 else 0.0)
            return super().example(number)

        def save(self, state, data, *, step):
            clock.passes(60.0)
            self.saved = step

        def pictures(self, step, params):
            clock.passes(60.0)

    do = {n: lambda n=n: clock.passes(seconds.get(n, 0.125)) for n in range(1, 61)}
    story = Slow(do=do, metrics={46: {"gradient_norm": 500.0}})
    assert story.train(60, checkpoint_every=15, sample_every=17) is True
    host = socket.gethostname()
    assert capsys.readouterr().err.splitlines() == [
        f"note: the gradient of update 46 has norm 500 on {host}, usually 1; the last good checkpoint is 45",
        f"note: update 50 took 3.0 s on {host} (2.0 s of them to wait for data), usually 0.12 s",
    ]


def test_an_update_that_only_starts_the_device_is_not_taken_for_usual(clock, capsys):
    """As after each checkpoint, when there are no metrics to wait for."""

    class Waiting(Story):
        def metrics(self, step, values):
            clock.passes(2.0)

    assert Waiting().train(60, checkpoint_every=3, sample_every=0) is True
    assert capsys.readouterr().err == ""
