"""Reads the constants of a frozen TensorFlow graph, a protocol buffer, without allocating what it declares.

The general reader would build an object for each message, many times the size of a file of empty messages,
and would repeat a single number to any shape. This one reads only the fields of

    GraphDef {node = 1}   NodeDef {name = 1, op = 2, attr = 5}   attr {key = 1, value = 2}
    AttrValue {tensor = 8}   TensorProto {dtype = 1, tensor_shape = 2, tensor_content = 4, float_val = 5}
    TensorShapeProto {dim = 2}   Dim {size = 1}
"""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

# Inception's graph has 16,000.
_MAX_FIELDS = 200_000
_MAX_DIMENSIONS = 64
_DT_FLOAT = 1
# How a field is stored.
_VARINT, _EIGHT_BYTES, _LENGTH, _FOUR_BYTES = 0, 1, 2, 5
_SIZES = {_EIGHT_BYTES: 8, _FOUR_BYTES: 4}


@dataclasses.dataclass(frozen=True)
class Constant:
    """A constant of float32: its shape, and all its numbers or one that is repeated."""

    shape: tuple[int, ...]
    numbers: np.ndarray

    def array(self) -> np.ndarray:
        """The array; a repeated number takes no memory.

        Raises:
          ValueError: the numbers do not have that shape.
        """
        if self.numbers.size == 1:
            return np.broadcast_to(self.numbers[0], self.shape)
        return self.numbers.reshape(self.shape)


def constants(content: bytes) -> dict[str, Constant]:
    """The constants of float32 by name.

    Raises:
      ValueError: the content is not a graph, or has more fields than a limit.
    """
    reader, found = _Reader(), {}
    for _, node in reader.fields(memoryview(content), wanted={1: _LENGTH}):
        parts = reader.only(node, {1: _LENGTH, 2: _LENGTH})
        if bytes(parts.get(2, b"")) != b"Const":
            continue
        for _, attribute in reader.fields(node, wanted={5: _LENGTH}):
            entry = reader.only(attribute, {1: _LENGTH, 2: _LENGTH})
            if bytes(entry.get(1, b"")) == b"value":
                tensor = reader.only(entry.get(2, memoryview(b"")), {8: _LENGTH}).get(8)
                constant = None if tensor is None else _constant(reader, tensor)
                if constant is not None:
                    found[bytes(parts.get(1, b"")).decode()] = constant
    return found


def _constant(reader: "_Reader", tensor: memoryview) -> Constant | None:
    """The tensor's constant; None if it is not of float32."""
    parts = reader.only(tensor, {1: _VARINT, 2: _LENGTH, 4: _LENGTH})
    if parts.get(1) != _DT_FLOAT:
        return None
    dimensions = [
        reader.only(dimension, {1: _VARINT}).get(1, 0)
        for _, dimension in reader.fields(parts.get(2, memoryview(b"")), wanted={2: _LENGTH})
    ]
    if len(dimensions) > _MAX_DIMENSIONS:
        raise ValueError("a tensor has too many dimensions")
    # Repeated numbers are packed into one field, or each has its own.
    packed = [bytes(parts.get(4, b""))]
    packed += [bytes(value) for _, value in reader.fields(tensor, wanted={5: _LENGTH})]
    packed += [bytes(value) for _, value in reader.fields(tensor, wanted={5: _FOUR_BYTES})]
    return Constant(tuple(dimensions), np.frombuffer(b"".join(packed), "<f4"))


class _Reader:
    """Splits messages into fields, and counts them."""

    def __init__(self) -> None:
        self._count = itertools.count()

    def only(self, message: memoryview, wanted: dict[int, int]) -> dict[int, Any]:
        """The wanted fields by number; of a repeated field, the last one, as the format demands."""
        return dict(self.fields(message, wanted))

    def fields(self, message: memoryview, wanted: dict[int, int]) -> Iterator[tuple[int, Any]]:
        """The fields of a message whose number and kind are wanted; the others are skipped.

        Raises:
          ValueError: the message is damaged, or there are too many fields.
        """
        place = 0
        while place < len(message):
            if next(self._count) >= _MAX_FIELDS:
                raise ValueError(f"more than {_MAX_FIELDS:,} fields")
            tag, place = _varint(message, place)
            number, kind = tag >> 3, tag & 7
            if kind == _VARINT:
                value, place = _varint(message, place)
            elif kind in (_EIGHT_BYTES, _FOUR_BYTES, _LENGTH):
                size, place = (_SIZES[kind], place) if kind in _SIZES else _varint(message, place)
                value, place = message[place : place + size], place + size
            else:
                raise ValueError(f"a field of the unknown kind {kind}")
            if place > len(message):
                raise ValueError("truncated")
            if wanted.get(number) == kind:
                yield number, value


def _varint(message: memoryview, place: int) -> tuple[int, int]:
    """The integer of seven bits per byte at `place`, and the place behind it."""
    value = 0
    for shift in range(0, 70, 7):
        if place + shift // 7 >= len(message):
            break
        byte = message[place + shift // 7]
        value |= (byte & 127) << shift
        if byte < 128:
            return value, place + shift // 7 + 1
    raise ValueError("truncated")
