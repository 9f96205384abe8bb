"""Reads dictionaries, lists, numbers, text and NumPy arrays from a pickle without running any code from it.

A pickle is a program. For Python's own unpickler it may call any function, and may allocate any amount of
memory or compute for any time in a few bytes. `run` therefore executes the program itself: it knows only the
instructions and the names that arrays need, and counts the work.
"""

import io
import math
import pickle
import pickletools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from mcm_jax.system.errors import InputError, reason

# What a pickle may hold here: nested dictionaries, lists, numbers, text and arrays.
Plain = Any

# Inception's weights take 16,000 instructions, statistics a hundred. This many take half a second.
MAX_INSTRUCTIONS = 100_000
_MAX_DEPTH = 50
# A pickle may refer to a part of itself again and again. All references together may copy, or hand to
# functions, this many times the bytes of the file.
_MAX_COPIES = 10
_MAX_INTEGER_BITS = 64
_MAX_KEY_CHARACTERS = 1000
# NumPy's own limit.
_MAX_DIMENSIONS = 64


def read(content: bytes, *, name: str) -> Plain:
    """Returns the content of the pickle.

    Args:
      name: the file's name, for the error message.

    Raises:
      InputError: the pickle holds anything else or exceeds a limit, whether malicious or merely damaged.
    """
    try:
        return _Copier(_MAX_COPIES * len(content)).copy(run(io.BytesIO(content), _KNOWN))
    # A malicious or truncated pickle can raise any exception; in every case the file is unusable.
    except Exception as error:
        raise InputError(
            f"{name}: not a pickle of plain arrays ({reason(error)}); get the file from its source again"
        ) from error


def run(
    file: io.BytesIO,
    known: Mapping[tuple[str, str], object],
    load_persistent: Callable[[Any], object] | None = None,
    *,
    max_instructions: int = MAX_INSTRUCTIONS,
) -> Any:
    """Executes the pickle that begins at the file's position, and leaves the position behind it.

    Args:
      known: what stands for each name, (module, name), that the pickle may refer to. An object with a method
        `set_state` or `set_attributes` receives the state, or the attributes, that the pickle says it has.
      load_persistent: converts references to objects outside the pickle; None: there must be none.
      max_instructions: limit on the work.

    Raises:
      Exception: of any class; the pickle is damaged or exceeds a limit.
    """
    machine = _Machine(known, load_persistent, max_bytes=_MAX_COPIES * len(file.getbuffer()))
    for count, (instruction, argument, _) in enumerate(pickletools.genops(file)):
        if instruction.name == "STOP":
            return machine.stack.pop()
        if count >= max_instructions:
            raise pickle.UnpicklingError(f"more than {max_instructions:,} instructions")
        # Among larger integers many have the same hash, and arithmetic with them can take any time.
        if isinstance(argument, int) and argument.bit_length() > _MAX_INTEGER_BITS:
            raise pickle.UnpicklingError(f"an integer of more than {_MAX_INTEGER_BITS} bits")
        machine.execute(instruction.name, argument)
    raise pickle.UnpicklingError("truncated")


@runtime_checkable
class HasAttributes(Protocol):
    """An object whose attributes the pickle sets."""

    def set_attributes(self, attributes: dict[str, Any]) -> None:
        """Receives all attributes."""
        ...


# Instructions that push their argument.
_ARGUMENTS = frozenset(
    "INT LONG BININT BININT1 BININT2 LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING BINBYTES "
    "SHORT_BINBYTES BINBYTES8 BYTEARRAY8 UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8".split()
)
_NEW: dict[str, Callable[[], object]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_SET": set,
}


class _Machine:
    """The stack machine for which pickles are programs; `pickletools` documents each instruction."""

    def __init__(
        self,
        known: Mapping[tuple[str, str], object],
        load_persistent: Callable[[Any], object] | None,
        max_bytes: int,
    ):
        self.stack: list[Any] = []
        self._below: list[list[Any]] = []  # the stacks below each mark
        self._memo: dict[int, object] = {}
        self._known, self._load_persistent = known, load_persistent
        self._bytes_left = max_bytes

    def execute(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in _ARGUMENTS:
            stack.append(argument)
            return
        if name in _NEW:
            stack.append(_NEW[name]())
            return
        match name:
            case "PROTO" | "FRAME":
                pass
            case "MARK":
                self._below.append(stack)
                self.stack = []
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                self._memo[argument] = stack[-1]
            case "MEMOIZE":
                self._memo[len(self._memo)] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(self._memo[argument])
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                size = int(name[-1])
                stack[-size:] = [tuple(stack[-size:])]
            case "TUPLE" | "LIST" | "DICT":
                items = self._pop_to_mark()
                self.stack.append({"TUPLE": tuple, "LIST": list, "DICT": _dictionary}[name](items))
            case "APPEND" | "APPENDS":
                items = [stack.pop()] if name == "APPEND" else self._pop_to_mark()
                _require(self.stack[-1], list).extend(items)
            case "SETITEM" | "SETITEMS":
                items = [stack.pop(-2), stack.pop()] if name == "SETITEM" else self._pop_to_mark()
                _require(self.stack[-1], dict).update(_dictionary(items))
            case "GLOBAL":
                stack.append(self._find(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                stack.append(self._find(*(_require(stack.pop(at), str) for at in (-2, -1))))
            case "REDUCE" | "NEWOBJ":
                arguments = _require(stack.pop(), tuple)
                self._pay_for(arguments)
                stack.append(stack.pop()(*arguments))
            case "BUILD":
                self._build(stack[-2], stack.pop())
            case "BINPERSID" if self._load_persistent is not None:
                stack.append(self._load_persistent(stack.pop()))
            case _:
                raise pickle.UnpicklingError(f"the instruction {name}, which no array needs")

    def _pop_to_mark(self) -> list[Any]:
        items, self.stack = self.stack, self._below.pop()
        return items

    def _find(self, module: str, name: str) -> object:
        if (module, name) not in self._known:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}, which no array needs")
        return self._known[module, name]

    def _build(self, value: Any, state: Any) -> None:
        if isinstance(state, dict) and isinstance(value, HasAttributes):
            value.set_attributes(state)
            return
        if isinstance(value, dict):  # Attributes of an OrderedDict, such as torch's versions of layers.
            return
        self._pay_for(_require(state, tuple))
        value.set_state(state)

    def _pay_for(self, arguments: tuple[object, ...]) -> None:
        """Counts what a function may copy: bytes, characters and values."""
        sized = (str, bytes, bytearray, tuple, list, dict)
        self._bytes_left -= len(arguments)
        self._bytes_left -= sum(len(one) for one in arguments if isinstance(one, sized))
        if self._bytes_left < 0:
            raise pickle.UnpicklingError(f"its data are copied more than {_MAX_COPIES} times")


def _require(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise pickle.UnpicklingError(f"a {type(value).__name__} in place of a {kind.__name__}")
    return value


def _dictionary(items: list[Any]) -> dict[str, Any]:
    """The dictionary of alternating keys and values."""
    return {_key(key): value for key, value in zip(items[::2], items[1::2], strict=True)}


def _key(value: Any) -> str:
    """Refuses keys other than short text: to hash or compare others can take any time."""
    if len(_require(value, str)) > _MAX_KEY_CHARACTERS:
        raise pickle.UnpicklingError(f"a key of more than {_MAX_KEY_CHARACTERS:,} characters")
    return value


def dictionary_of_pairs(pairs: Iterable[tuple[Any, Any]] = ()) -> dict[str, Any]:
    """Replaces collections.OrderedDict."""
    return {_key(key): value for key, value in pairs}


class _Dtype:
    """Replaces numpy.dtype; numbers and text only."""

    def __init__(self, code: Any, *_: object) -> None:
        code = _require(code, str)
        if not re.fullmatch(r"[<>|=]?(b1|[iu][1248]|f(2|4|8|16)|[SU][0-9]{1,9})", code):
            raise pickle.UnpicklingError(f"an array of {code}")
        self.value = np.dtype(code)

    def set_state(self, state: tuple[Plain, ...]) -> None:
        self.value = self.value.newbyteorder(_require(state[1], str))


class _Array:
    """Replaces numpy.ndarray: NumPy's pickles create an empty array and then set its state."""

    def __init__(self, *_: object) -> None:
        self.value: np.ndarray | None = None

    def set_state(self, state: tuple[Plain, ...]) -> None:
        *_, shape, dtype, is_fortran, data = state
        self.value = _from_buffer(data, dtype, shape, "F" if is_fortran else "C")


def _from_buffer(data: Any, dtype: Any, shape: Any, order: Literal["C", "F"] = "C") -> np.ndarray:
    """Replaces numpy._core.numeric._frombuffer."""
    dtype = _require(dtype, _Dtype).value
    data = data.encode("latin1") if isinstance(data, str) else data
    if not isinstance(data, bytes | bytearray) or len(shape) > _MAX_DIMENSIONS:
        raise pickle.UnpicklingError("an array without numbers or of too many dimensions")
    sizes = [_require(size, int) for size in _require(shape, tuple)]
    if min(sizes, default=0) < 0 or len(data) != math.prod(sizes) * dtype.itemsize:
        raise pickle.UnpicklingError("an array is truncated")
    return np.frombuffer(data, dtype).reshape(sizes, order=order)


def _scalar(dtype: Any, data: Any) -> Plain:
    """Replaces numpy._core.multiarray.scalar."""
    return _from_buffer(data, dtype, ())[()]


def _encode(text: Any, encoding: Any) -> bytes:
    """Replaces _codecs.encode, which Python 3 uses to write bytes in pickles for Python 2."""
    if encoding != "latin1":
        raise pickle.UnpicklingError("text that is not encoded as latin1")
    return _require(text, str).encode("latin1")


def _no_bytes() -> bytes:
    """Replaces the call of `bytes` that such pickles use for b""."""
    return b""


_KNOWN = {
    ("__builtin__", "bytes"): _no_bytes,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _encode,
} | {
    (f"numpy.{core}.{module}", name): function
    for core in ("core", "_core")
    for module, name, function in (
        ("multiarray", "_reconstruct", _Array),
        ("multiarray", "scalar", _scalar),
        ("numeric", "_frombuffer", _from_buffer),
    )
}


class _Copier:
    """Copies what a pickle holds, with each `_Array` replaced by its array.

    A part that the pickle refers to several times is copied, and counted, each time: whoever uses the copy
    may rely on its size.
    """

    def __init__(self, max_bytes: int):
        self._values_left, self._bytes_left = MAX_INSTRUCTIONS, max_bytes

    def copy(self, value: Any, depth: int = 0) -> Plain:
        if isinstance(value, _Array):
            value = _require(value.value, np.ndarray)
        self._values_left -= 1
        self._bytes_left -= value.nbytes if isinstance(value, np.ndarray) else 0
        self._bytes_left -= len(value) if isinstance(value, str | bytes | bytearray) else 0
        if self._values_left < 0 or self._bytes_left < 0 or depth > _MAX_DEPTH:
            raise pickle.UnpicklingError(
                f"it has more than {MAX_INSTRUCTIONS:,} values, {_MAX_COPIES} copies or {_MAX_DEPTH} levels"
            )
        if isinstance(value, dict):
            return {key: self.copy(part, depth + 1) for key, part in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self.copy(part, depth + 1) for part in value)
        if value is None or isinstance(value, bool | int | float | str | bytes | np.generic | np.ndarray):
            return value
        raise pickle.UnpicklingError(f"a {type(value).__name__}")
