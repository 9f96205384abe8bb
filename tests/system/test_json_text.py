"""Whatever is wrong with JSON, it is a ValueError; what is read can be printed, copied and computed with."""

import copy
import json

import pytest

from mcm_jax.system import json_text
from tests.limits import limited

GOOD = {"a": [1, -2.5, None, True, "text"], "b": {"c": 2**64}, "d": []}


def test_what_was_written():
    assert json_text.loads(json.dumps(GOOD)) == json_text.loads(json.dumps(GOOD).encode()) == GOOD


BAD = {
    "a bracket that no other closes": (b"[" * 10**6, "levels"),
    "levels": (b"[" * 10**5 + b"]" * 10**5, "levels"),
    "fewer levels": (b'{"a":' * 60 + b"1" + b"}" * 60, "levels"),
    "digits": (b"1" * 10**5, "20 digits"),
    "an integer that is no float": (b"1" + b"0" * 400, "20 digits"),
    "NaN": (b"[NaN]", "NaN is not a number"),
    "infinity": (b"-Infinity", "not a number"),
    "length": (b"[" + b"[]," * 10**7 + b"1]", "bytes of JSON"),
    "bytes that are no text": (b'"\xff"', "utf-8"),
    "the beginning of an object": (b'{"a', "Unterminated"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_refused(kind):
    text, message = BAD[kind]
    with limited(), pytest.raises(ValueError, match=message):
        json_text.loads(text)


def test_what_is_read_can_be_printed_and_copied():
    value = json_text.loads("[" * 49 + "]" * 49)
    assert repr(copy.deepcopy(value)) == "[" * 49 + "]" * 49
