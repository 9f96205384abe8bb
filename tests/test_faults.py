"""The bench of faults would report what is wrong; .ci/run runs it with a few faults."""

import pytest

from tests import faults

RECORD = {
    "seed": 0,
    "fault": "SIGTERM",
    "storage": "disk",
    "processes": 1,
    "objective": "cd",
    "lost": 0,
    "bound": 0,
    "seconds": 1.0,
    "recovered": True,
    "equal": True,
    "wrong": "",
    "date": "2026-01-01",
    "versions": {"jax": "1"},
}


@pytest.mark.parametrize(
    ("changed", "columns"),
    [
        ({}, ["1", "1", "0", "0", "0"]),
        ({"recovered": False, "equal": False}, ["1", "0", "0", "0", "0"]),
        ({"equal": False}, ["1", "1", "1", "0", "0"]),
        ({"lost": 5, "wrong": "5 updates lost"}, ["1", "1", "0", "1", "5"]),
        ({"lost": 5, "bound": None}, ["1", "1", "0", "0", ""]),
    ],
)
def test_the_table_counts_what_is_wrong(changed, columns, tmp_path):
    text = faults.report([RECORD | changed], tmp_path)
    rows = [line for line in text.splitlines() if line.startswith(("| SIGTERM", "| **all**"))]
    assert len(rows) == 2
    for row in rows:
        assert [cell.strip() for cell in row.split("|")[3:8]] == columns


@pytest.mark.parametrize(
    ("hung", "codes", "text", "lost", "expected"),
    [
        (False, [130], "stopped", 0, ""),
        (True, [-9], "", 0, "a process hung"),
        (False, [130], "stopped", 1, "1 updates lost, at most 0 expected"),
        (False, [1], "Traceback (most recent call last)", 0, "a traceback"),
        (False, [-9, 1], "Traceback (most recent call last)", 0, ""),
    ],
)
def test_a_start_that_does_what_it_should_not(hung, codes, text, lost, expected):
    found = faults._wrong(hung, codes, text, lost, 0)
    assert found.startswith(expected) and bool(found) == bool(expected)
