"""Which updates are reported as unusual, and how often, by a clock of our own."""

import socket

import pytest

from mcm_jax.system import distributed
from mcm_jax.training import watch
from mcm_jax.training.watch import Watch

HOST = socket.gethostname()


@pytest.fixture
def clock(monkeypatch):
    """A list of the time."""
    now = [0.0]
    monkeypatch.setattr(watch, "time", type("Time", (), {"monotonic": staticmethod(lambda: now[0])}))
    return now


def pass_updates(watching, clock, seconds, *, first=1, usual=True):
    for step, each in enumerate(seconds, first):
        clock[0] += each
        watching.updated(step, usual=usual)


def receive(watching, norms, *, first=1):
    for step, norm in enumerate(norms, first):
        watching.gradient(step, norm, last_good="the last good checkpoint is 5")


def notes(capsys):
    output = capsys.readouterr()
    assert output.out == ""
    return output.err.splitlines()


@pytest.mark.parametrize(
    ("usual", "slow", "told"),
    [
        (1.0, 10.5, "10.5 s on HOST (0.0 s of them to wait for data), usually 1 s"),
        (1.0, 9.5, None),
        (0.03125, 1.25, "1.2 s on HOST (0.0 s of them to wait for data), usually 0.031 s"),
        (0.03125, 1.0, None),  # Long for this run, but short.
    ],
)
def test_a_slow_update(usual, slow, told, clock, capsys):
    pass_updates(Watch(), clock, [usual] * 30 + [slow] + [usual])
    expected = [] if told is None else [f"note: update 31 took {told.replace('HOST', HOST)}"]
    assert notes(capsys) == expected


def test_a_slow_update_tells_how_long_it_waited_for_data(clock, capsys):
    watching = Watch()
    pass_updates(watching, clock, [0.5] * 30)

    def batches():
        clock[0] += 7.5
        yield "batch"
        yield "next"

    data = batches()
    assert watching.read(data) == "batch"
    pass_updates(watching, clock, [0.25], first=31)
    assert notes(capsys) == [
        f"note: update 31 took 7.8 s on {HOST} (7.5 s of them to wait for data), usually 0.5 s"
    ]
    assert watching.read(data) == "next"
    pass_updates(watching, clock, [30.0], first=200)
    assert "(0.0 s of them to wait for data)" in notes(capsys)[0]


def test_what_is_usual_are_the_last_updates_but_no_single_one_and_no_other_work(clock, capsys):
    watching = Watch()
    pass_updates(watching, clock, [1.0] * 19 + [100.0])  # Too early to know.
    pass_updates(watching, clock, [100.0] * 40, usual=False)
    assert notes(capsys) == []
    pass_updates(watching, clock, [100.0], first=21)
    assert len(notes(capsys)) == 1
    pass_updates(watching, clock, [100.0] * 60 + [1.0] * 30 + [100.0] * 9, first=1000)
    assert len(notes(capsys)) == 1  # The first of them.
    pass_updates(watching, clock, [100.0] * 200 + [1.0] * 60 + [100.0], first=2000)
    assert len(notes(capsys)) == 1


def test_an_exploding_gradient(capsys):
    receive(Watch(), [0.5] * 19 + [2.0, 0.5, 9.5, 10.5])
    assert notes(capsys) == [
        f"note: the gradient of update 23 has norm 10.5 on {HOST}, usually 0.5; the last good checkpoint is 5"
    ]


def test_a_gradient_of_zero_is_no_measure(capsys):
    receive(Watch(), [0.0] * 30 + [1.0])
    assert notes(capsys) == []


def test_only_the_first_process_tells_of_gradients_and_each_of_its_time(clock, capsys, monkeypatch):
    monkeypatch.setattr(distributed, "is_first", lambda: False)
    watching = Watch()
    receive(watching, [1.0] * 30 + [100.0])
    assert notes(capsys) == []
    pass_updates(watching, clock, [1.0] * 30 + [100.0])
    assert len(notes(capsys)) == 1


def test_many_notes_of_a_kind_become_one(clock, capsys):
    watching = Watch()
    receive(watching, [1.0] * 50)
    receive(watching, [100.0] * 7, first=51)
    receive(watching, [1.0] * 92, first=58)
    receive(watching, [50.0] * 3, first=150)
    receive(watching, [1.0] * 97, first=153)
    receive(watching, [50.0], first=400)
    pass_updates(watching, clock, [1.0] * 30 + [100.0])  # A kind of its own.
    told = notes(capsys)
    assert len(told) == 4
    assert told[0].startswith("note: the gradient of update 51 ") and told[0].endswith(" is 5")
    assert told[1].startswith("note: the gradient of update 151 ")
    assert told[1].endswith(" is 5 (7 more since the last note)")
    assert told[2].startswith("note: the gradient of update 400 ")
    assert told[2].endswith(" is 5 (1 more since the last note)")
    assert told[3].startswith("note: update 31 took ")
