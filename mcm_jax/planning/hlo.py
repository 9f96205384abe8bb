"""Parses the text of a compiled, scheduled HLO module as written by XLA's TPU compiler.

Only what a cost model needs: the computations in schedule order, and each instruction's opcode, result,
operands, called computations, estimated cycles and source line.
"""

import dataclasses
import json
import math
import re
from pathlib import Path

from mcm_jax.records import JsonObject

_DTYPE_BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\]")
_NAME = re.compile(r"%([\w.\-]+)")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^  (ROOT )?%([\w.\-]+) = ")
_CALLED = re.compile(
    r"\b(calls|body|condition|to_apply|branch_computations|called_computations)=(\{[^}]*\}|%[\w.\-]+)"
)
_COMMENT = re.compile(r"/\*.*?\*/")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    opcode: str
    shape: str
    operands: tuple[str, ...]
    literal: str  # the text between the parentheses; a constant's value
    attributes: str  # everything after the operands, except the backend config
    config: JsonObject  # the backend config
    is_root: bool

    @property
    def estimated_cycles(self) -> int | None:
        """The compiler's estimate; None if it gives none."""
        cycles = self.config.get("window_config", {}).get("estimated_cycles")
        return None if cycles is None else int(cycles)

    @property
    def num_bytes(self) -> int:
        """Bytes of the result; for a tuple, of all its elements."""
        return shape_bytes(self.shape)

    def attribute(self, name: str) -> str | None:
        """The value of an attribute name=value, without quotes; None if absent."""
        found = re.search(rf"\b{name}=(?:\"([^\"]*)\"|([^\s,}}{{]+))", self.attributes)
        return None if found is None else next(group for group in found.groups() if group is not None)

    def called(self, kind: str) -> tuple[str, ...]:
        """Names of the computations called via the attribute `kind`: calls, body, condition, to_apply, ..."""
        names = [value for key, value in _CALLED.findall(self.attributes) if key == kind]
        return tuple(name for value in names for name in _NAME.findall(value))


@dataclasses.dataclass(frozen=True)
class Module:
    """Computations by name, each with its instructions in schedule order."""

    entry: str
    computations: dict[str, tuple[Instruction, ...]]
    frames: dict[int, tuple[tuple[str, int], ...]]  # by id: (file, line), innermost call first

    def source(self, instruction: Instruction, *, package: Path) -> str:
        """'file:line' of the innermost call in `package`, else of the innermost call; '' if unknown."""
        file, line = instruction.attribute("source_file"), instruction.attribute("source_line")
        frames = self.frames.get(int(instruction.attribute("stack_frame_id") or 0), ())
        if file is not None and line is not None:
            frames = ((file, int(line)),)
        inside = [frame for frame in frames if Path(frame[0]).is_relative_to(package)]
        if inside:
            file, line = inside[0]
            return f"{Path(file).relative_to(package)}:{line}"
        return "{}:{}".format(*frames[0]) if frames else ""


def shape_bytes(shape: str) -> int:
    """Bytes of an HLO shape such as f32[8,256]{1,0:T(8,128)}, or of all elements of a tuple."""
    return sum(
        math.prod(int(n) for n in dims.split(",") if n) * _bits(dtype) // 8
        for dtype, dims in _ARRAY.findall(_COMMENT.sub("", shape))
    )


def tuple_parts(shape: str) -> list[str]:
    """Shapes of the elements of a tuple shape."""
    parts, depth = [""], 0
    for character in _COMMENT.sub("", shape).strip()[1:-1]:
        depth += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(character, 0)
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts]


def array_dims(shape: str) -> list[tuple[int, ...]]:
    """Dimensions of each array in an HLO shape."""
    arrays = _ARRAY.findall(_COMMENT.sub("", shape))
    return [tuple(int(n) for n in dims.split(",") if n) for _, dims in arrays]


def parse(text: str) -> Module:
    """Parses the output of `compiled.as_text()`.

    Raises:
      ValueError: the text is not that of a scheduled module.
    """
    if not text.startswith("HloModule") or "is_scheduled=true" not in text.partition("\n")[0]:
        raise ValueError("this is not the text of a scheduled HLO module")
    computations: dict[str, tuple[Instruction, ...]] = {}
    entry, name, body = "", None, []
    for line in text.splitlines():
        if (head := _HEAD.match(line)) and not line.startswith(" "):
            name, body = head.group(2), []
            entry = name if head.group(1) else entry
        elif name is not None and line == "}":
            computations[name], name = tuple(body), None
        elif name is not None and (start := _INSTRUCTION.match(line)):
            body.append(_instruction(line, start))
    return Module(entry, computations, _frames(text))


def _instruction(line: str, start: re.Match[str]) -> Instruction:
    shape, rest = _split_shape(line[start.end() :])
    opcode, _, rest = rest.partition("(")
    end = _closing(rest)
    operands, attributes = rest[:end], rest[end + 1 :]
    config: JsonObject = {}
    before, found, after = attributes.partition("backend_config=")
    if found and after.startswith("{"):
        config, length = json.JSONDecoder().raw_decode(after)
        attributes = before + after[length:]
    return Instruction(
        name=start.group(2),
        opcode=opcode.strip(),
        shape=shape,
        operands=tuple(_NAME.findall(operands)),
        literal=operands,
        attributes=attributes,
        config=config,
        is_root=bool(start.group(1)),
    )


def _split_shape(text: str) -> tuple[str, str]:
    """Splits 'f32[2]{0} add(...)' into ('f32[2]{0}', 'add(...)'); a tuple shape is in parentheses."""
    if text.startswith("("):
        end = _closing(text[1:]) + 2
        return text[:end], text[end:].lstrip()
    shape, _, rest = text.partition(" ")
    return shape, rest


def _closing(text: str) -> int:
    """Index of the parenthesis that closes one opened just before `text`."""
    depth = 1
    for index, character in enumerate(text):
        depth += {"(": 1, ")": -1}.get(character, 0)
        if depth == 0:
            return index
    raise ValueError(f"unbalanced parentheses: {text[:80]}")


def _bits(dtype: str) -> int:
    if dtype in _DTYPE_BITS:
        return _DTYPE_BITS[dtype]
    digits = re.match(r"[a-z]+(\d+)", dtype)
    return int(digits.group(1)) if digits else 0


def _frames(text: str) -> dict[int, tuple[tuple[str, int], ...]]:
    """Stack frames from the tables before the computations, which store a parent frame as its id plus one."""
    files = {int(n): name for n, name in re.findall(r'^(\d+) "(.*)"$', _table(text, "FileNames"), re.M)}
    locations = {
        int(n): (files.get(int(file), "?"), int(line))
        for n, file, line in re.findall(
            r"^(\d+) \{file_name_id=(\d+) .*?\bline=(\d+)", _table(text, "FileLocations"), re.M
        )
    }
    rows = re.findall(
        r"^(\d+) \{file_location_id=(\d+) parent_frame_id=(\d+)", _table(text, "StackFrames"), re.M
    )
    parents = {int(n): (int(location), int(parent) - 1) for n, location, parent in rows}
    result = {}
    for number in parents:
        chain, at = [], number
        while at in parents and len(chain) < len(parents):
            location, at = parents[at]
            chain.append(locations.get(location, ("?", 0)))
        result[number] = tuple(chain)
    return result


def _table(text: str, title: str) -> str:
    found = re.search(rf"^{title}\n((?:.+\n)*)", text, re.M)
    return found.group(1) if found else ""
