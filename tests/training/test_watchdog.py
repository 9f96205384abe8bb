"""A process that hangs prints its stacks and ends."""

import pytest

from tests import forks

PROGRAM = """
import os, sys, time
from mcm_jax.training import watchdog
watchdog._LINGER_SECONDS = 0.5

def stuck_in_a_dead_mount():
    time.sleep(60)

with watchdog.Watchdog(LIMIT) as dog:
    CODE
print("not hanging")
"""


def run(code, *, limit):
    return forks.run(PROGRAM.replace("LIMIT", str(limit)).replace("CODE", code.replace("\n", "\n    ")))


@pytest.mark.parametrize(
    ("code", "limit", "after"),
    [
        ("stuck_in_a_dead_mount()", 0.5, "no update is done yet"),
        ("dog.alive(7); stuck_in_a_dead_mount()", 0.5, "the last was update 7"),
    ],
)
def test_a_process_that_hangs_prints_its_stacks_and_ends(code, limit, after):
    result = run(code, limit=limit)
    assert result.returncode == 1 and "not hanging" not in result.stdout
    assert "error: training hangs on " in result.stderr and f"({after});" in result.stderr
    assert "in stuck_in_a_dead_mount" in result.stderr


@pytest.mark.parametrize(
    ("code", "limit"),
    [
        ("for step in range(8):\n    time.sleep(0.2)\n    dog.alive(step)", 1.0),
        ("time.sleep(1.0)", 0),
    ],
)
def test_a_process_that_goes_on_is_left_alone(code, limit):
    result = run(code, limit=limit)
    assert result.returncode == 0 and "not hanging" in result.stdout, result.stderr


def test_it_ends_even_if_nothing_can_be_printed():
    """Standard error may be on the mount that is dead."""
    reading = (
        "class Dead:\n    def write(self, text): time.sleep(60)\nsys.stderr = Dead()\nstuck_in_a_dead_mount()"
    )
    result = run(reading, limit=0.5)
    assert result.returncode == 1 and "not hanging" not in result.stdout
