"""What an update of a student costs, in network calls per example of its batch."""

# By system. The student with its gradient counts as three calls, and a forward derivative as two.
CALLS: dict[str, float] = {
    "cd": 5,
    "ct": 4,
    "scd": 6,
    "sct": 5,
    "ayf": 6,
    "meanflow": 5,
    "shortcut": 3.25,  # Two further calls for one example in eight.
    "moments": 5,
    "progressive": 5,
}
