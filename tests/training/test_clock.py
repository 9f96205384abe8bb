"""Where the time goes, by a clock of our own."""

import pytest

from mcm_jax.training import clock as clocks
from mcm_jax.training.clock import Clock


class Time:
    def __init__(self):
        self.now = 100.0

    def monotonic(self):
        return self.now


@pytest.fixture
def time(monkeypatch):
    found = Time()
    monkeypatch.setattr(clocks, "time", found)
    return found


def test_every_second_has_one_cause(time):
    clock = Clock()
    time.now += 1
    with clock.spent("data"):
        time.now += 2  # The run is still starting.
    time.now += 4
    clock.updates_begin()
    time.now += 8
    with clock.spent("data"):
        time.now += 16
    time.now += 32
    with clock.spent("checkpoints"):
        time.now += 64
        assert clock.seconds()["checkpoints"] == 64
    clock.updates_begin()
    with clock.spent("samples"):
        time.now += 128
    time.now += 256
    expected = {"start": 7, "updates": 8 + 32 + 256, "data": 16, "checkpoints": 64, "samples": 128}
    assert clock.seconds() == expected
    assert sum(expected.values()) == time.now - 100


def test_an_error_ends_the_cause(time):
    clock = Clock()
    clock.updates_begin()

    def fail():
        with clock.spent("checkpoints"):
            time.now += 1
            raise OSError

    with pytest.raises(OSError):
        fail()
    time.now += 2
    assert clock.seconds()["updates"] == 2
