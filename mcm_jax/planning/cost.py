"""Estimates how long a scheduled module runs on a chip: the sum of the compiler's estimates and of models.

The time of an operation is its `estimated_cycles` times the number of times it runs. The compiler does not
estimate collectives, custom kernels, copies between memories, and a few other operations; these are modelled
here and reported separately. An asynchronous collective or copy overlaps the operations scheduled between its
start and its wait: only its remaining time at the wait adds to the step.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from mcm_jax.planning.chips import Chip, exchange_bytes_per_second, incoming_bytes_per_second
from mcm_jax.planning.hlo import Instruction, Module, array_dims, shape_bytes, tuple_parts

# "unestimated": operations that the compiler does not estimate, modelled by their bytes and FLOPs at peak.
Kind = Literal["estimated", "unestimated", "kernel", "collective", "copy"]
# Assumed share of peak FLOPs that a custom kernel reaches.
KERNEL_SHARE = 0.4
# For attention kernels that report no FLOPs: their number of products of an L x D and a D x L' matrix.
FORWARD, BACKWARD = "splash_mha_fwd", "splash_mha_dkv"
_ATTENTION_PRODUCTS = {FORWARD: 2, BACKWARD: 5}
_COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "ragged-all-to-all",
)
_COMPUTES = ("fusion", "convolution", "custom-call", "scatter", "gather", "sort")
# Custom calls that only allocate or relabel memory and move no data.
_FREE = ("AllocateBuffer", "ConcatBitcast")
_COPIES = ("copy", "slice", "dynamic-slice", "dynamic-update-slice")


class LoopError(Exception):
    """A loop whose number of iterations cannot be read."""


@dataclasses.dataclass(frozen=True)
class Operation:
    """One instruction of the schedule, summed over all its executions in a step."""

    name: str
    opcode: str
    kind: Kind
    count: int
    seconds: float  # total, overlapped or not
    exposed_seconds: float  # the part that adds to the step
    num_bytes: float  # total; for a collective, the bytes that each chip receives
    flops: float
    source: str
    attention: tuple[int, ...] = ()  # for an attention kernel: the shape (B, H, L, D) of its queries


@dataclasses.dataclass
class _Transfer:
    """A collective or copy in flight."""

    instruction: Instruction
    opcode: str
    kind: Kind
    num_bytes: float
    seconds: float
    remaining_seconds: float


def operations(
    module: Module, chip: Chip, *, coordinates: Sequence[Sequence[int]], bounds: Sequence[int], package: Path
) -> tuple[list[Operation], list[str]]:
    """Returns all operations of one step in order of first execution, and messages about unreadable parts.

    Args:
      coordinates: for each partition of the module, its chip's coordinates in the slice.
      bounds: the slice's size along each axis.
      package: directory of this package's files, preferred in source lines.
    """
    walk = _Walk(module, chip, coordinates, bounds, package)
    walk.computation(module.entry, 1)
    return walk.found, list(dict.fromkeys(walk.doubts))


class _Walk:
    def __init__(
        self,
        module: Module,
        chip: Chip,
        coordinates: Sequence[Sequence[int]],
        bounds: Sequence[int],
        package: Path,
    ):
        self.module, self.chip, self.package = module, chip, package
        self.coordinates, self.bounds = coordinates, bounds
        self.found: list[Operation] = []
        self.doubts: list[str] = []

    def computation(self, name: str, times: int) -> None:
        """Records all instructions of a computation that runs `times` times per step."""
        body = self.module.computations[name]
        by_name = {one.name: one for one in body}
        in_flight: dict[str, _Transfer] = {}
        for one in body:
            if one.opcode == "while":
                (inner,) = one.called("body")
                self.computation(inner, times * self._trip_count(one, by_name))
            elif one.opcode in ("call", "conditional"):
                for kind in ("to_apply", "branch_computations", "called_computations"):
                    for inner in one.called(kind):
                        self.computation(inner, times)
            elif (transfer := self._started(one)) is not None:
                in_flight[one.name] = transfer
            elif (start := _awaited_start(one, by_name, in_flight, self._contains_call)) is not None:
                transfer = in_flight.pop(start)
                _advance(in_flight, transfer.remaining_seconds, busy=transfer.kind)
                self._end(transfer, times)
            else:
                ran = self._run(one, times, by_name)
                if ran is not None:
                    _advance(in_flight, ran.seconds / times, busy=ran.kind)
        for transfer in in_flight.values():
            self._end(transfer, times)

    def _trip_count(self, loop: Instruction, by_name: dict[str, Instruction]) -> int:
        """Number of a loop's iterations; if it cannot be read, returns 1 and records a message."""
        try:
            return trip_count(self.module, loop, by_name)
        except LoopError as error:
            self.doubts.append(f"{error}; it is counted once, so the step takes longer than estimated")
            return 1

    def _run(self, one: Instruction, times: int, by_name: dict[str, Instruction]) -> Operation | None:
        """Records a synchronous instruction; returns None if there is nothing to run."""
        opcode, num_bytes, attention = one.opcode, 0.0, ()
        flops = instruction_flops(self.module, one, by_name)
        if one.estimated_cycles is not None:
            seconds, kind = one.estimated_cycles / self.chip.clock_hertz, "estimated"
        elif _is_done(one, self._contains_call):
            return None
        elif (transfer := self._collective_transfer(one)) is not None:
            opcode, num_bytes, seconds = transfer.opcode, transfer.num_bytes, transfer.seconds
            kind = "collective"
        elif one.opcode in _COMPUTES and one.attribute("custom_call_target") not in _FREE:
            kind, share = "unestimated", 1.0
            num_bytes = float(one.num_bytes + sum(by_name[name].num_bytes for name in one.operands))
            if one.attribute("custom_call_target") == "tpu_custom_call":
                kind, share = "kernel", KERNEL_SHARE
                flops, counted = _kernel_counts(one, by_name)
                num_bytes = counted or num_bytes
                attention, _ = _attention_sizes(one, by_name) or ((), ())
                if not flops:
                    self.doubts.append(f"the kernel {one.name} reports no FLOPs; only its bytes are modelled")
            seconds = max(flops / (share * self.chip.peak_flops), num_bytes / self.chip.hbm_bytes_per_second)
        else:
            return None
        self._record(one, opcode, kind, times, seconds, seconds, num_bytes, flops, attention)
        return self.found[-1]

    def _started(self, one: Instruction) -> _Transfer | None:
        """The collective or copy that `one` starts; None if it starts none."""
        if not one.opcode.endswith("-start") and not self._contains_call(one, "AsyncCollectiveStart"):
            return None
        if (transfer := self._collective_transfer(one)) is not None:
            return transfer
        if one.opcode.removesuffix("-start") in _COPIES:
            moved = float(_moved_bytes(one))
            seconds = moved / self.chip.hbm_bytes_per_second
            return _Transfer(one, one.opcode.removesuffix("-start"), "copy", moved, seconds, seconds)
        return None

    def _collective_transfer(self, one: Instruction) -> _Transfer | None:
        """The transfer of the collective that `one` is or contains; None if there is none."""
        inner = self._collective(one)
        if inner is None:
            return None
        num_bytes = _received_bytes(inner, len(self._group(inner)))
        opcode = inner.opcode.removesuffix("-start")
        if any(name.startswith("all-reduce-scatter") for name in one.called("calls")):
            # The compiler writes a reduce-scatter as an all-reduce followed by a slice.
            num_bytes, opcode = num_bytes / 2, "reduce-scatter"
        seconds = self._link_seconds(inner, num_bytes)
        return _Transfer(one, opcode, "collective", num_bytes, seconds, seconds)

    def _end(self, transfer: _Transfer, times: int) -> None:
        self._record(
            transfer.instruction,
            transfer.opcode,
            transfer.kind,
            times,
            transfer.seconds,
            transfer.remaining_seconds,
            transfer.num_bytes,
            0.0,
        )

    def _record(
        self,
        one: Instruction,
        opcode: str,
        kind: Kind,
        times: int,
        seconds: float,
        exposed: float,
        num_bytes: float,
        flops: float,
        attention: tuple[int, ...] = (),
    ) -> None:
        self.found.append(
            Operation(
                name=one.name,
                opcode=opcode,
                kind=kind,
                count=times,
                seconds=seconds * times,
                exposed_seconds=exposed * times,
                num_bytes=num_bytes * times,
                flops=flops * times,
                source=self.module.source(one, package=self.package),
                attention=attention,
            )
        )

    def _contains_call(self, one: Instruction, target: str) -> bool:
        """Whether `one` is a fusion that contains a custom call with this target."""
        return any(
            inner.attribute("custom_call_target") == target
            for name in one.called("calls")
            for inner in self.module.computations[name]
        )

    def _collective(self, one: Instruction) -> Instruction | None:
        """The collective that `one` is or contains; None if there is none."""
        if one.opcode.removesuffix("-start") in _COLLECTIVES:
            return one
        for name in (*one.called("calls"), *one.called("called_computations")):
            for inner in self.module.computations[name]:
                if inner.opcode.removesuffix("-start") in _COLLECTIVES:
                    return inner
        return None

    def _group(self, one: Instruction) -> list[Sequence[int]]:
        """Coordinates of the chips in a collective's first replica group."""
        return [self.coordinates[i] for i in first_group(one.attributes, len(self.coordinates))]

    def _link_seconds(self, one: Instruction, num_bytes: float) -> float:
        exchange = "all-to-all" in one.opcode
        speed_of = exchange_bytes_per_second if exchange else incoming_bytes_per_second
        speed = speed_of(self.chip, self._group(one), self.bounds)
        return num_bytes / speed if speed else 0.0


def instruction_flops(module: Module, one: Instruction, by_name: dict[str, Instruction]) -> float:
    """FLOPs of the convolutions in an instruction; on TPUs, matrix products are convolutions too."""
    if one.opcode == "convolution":
        return convolution_flops(one, *(array_dims(by_name[name].shape)[0] for name in one.operands[:2]))
    total = 0.0
    for name in one.called("calls"):
        inside = {inner.name: inner for inner in module.computations[name]}
        total += sum(instruction_flops(module, inner, inside) for inner in inside.values())
    return total


def convolution_flops(one: Instruction, image: Sequence[int], kernel: Sequence[int]) -> float:
    """Two FLOPs per multiplication; skips kernel taps that fall into padding or between dilated values.

    The compiler writes batched matrix products, such as those of attention, as convolutions in which nearly
    all taps are skipped.
    """
    image_labels, kernel_labels, result_labels = re.split(r"_|->", one.attribute("dim_labels") or "")
    (result,) = array_dims(one.shape)
    found = re.search(r"window=\{([^}]*)\}", one.attributes)
    window = dict(part.split("=") for part in found.group(1).split()) if found else {}
    products = float(
        result[result_labels.index("b")] * result[result_labels.index("f")] * kernel[kernel_labels.index("i")]
    )
    for axis in sorted(label for label in image_labels if label.isdigit()):

        def setting(name: str, default: str, axis: int = int(axis)) -> int:
            values = window[name].split("x") if name in window else []
            return int((values[axis] if values else default).partition("_")[0])

        output = np.arange(result[result_labels.index(axis)])[:, None]
        tap = np.arange(kernel[kernel_labels.index(axis)])
        dilation = setting("lhs_dilate", "1")
        at = output * setting("stride", "1") - setting("pad", "0_0") + tap * setting("rhs_dilate", "1")
        last = (image[image_labels.index(axis)] - 1) * dilation
        products *= int(np.count_nonzero((at >= 0) & (at <= last) & (at % dilation == 0)))
    return 2 * products


def trip_count(module: Module, loop: Instruction, by_name: dict[str, Instruction]) -> int:
    """Number of iterations of a while loop, from its counter's start and stride and its condition's bound.

    Raises:
      LoopError: the condition does not compare a counter with a constant, or the counter's start or
        stride is not constant.
    """
    (condition,), (body,) = loop.called("condition"), loop.called("body")
    inside = {one.name: one for one in module.computations[condition]}
    (root,) = [one for one in inside.values() if one.is_root]
    if root.opcode != "compare" or root.attribute("direction") not in ("LT", "GT", "NE"):
        raise LoopError(f"the loop {loop.name} has no counter: its condition is {root.opcode}")
    bounds = [_constant(inside.get(name)) for name in root.operands]
    counters = [inside[name] for name in root.operands if inside[name].opcode == "get-tuple-element"]
    bound = next((value for value in bounds if value is not None), None)
    if bound is None or not counters:
        raise LoopError(f"the loop {loop.name} has no constant bound")
    index = int(counters[0].attribute("index") or 0)
    initial = by_name.get(loop.operands[0])
    start = None
    if initial is not None and initial.opcode == "tuple":
        start = _constant(_through_copies(by_name, initial.operands[index]))
    stride = _stride(module.computations[body], index)
    if start is None or not stride:
        raise LoopError(f"the loop {loop.name} has no constant {'start' if start is None else 'stride'}")
    return max(0, math.ceil((bound - start) / stride))


def _stride(body: Sequence[Instruction], index: int) -> int | None:
    """The constant that a loop's body adds to entry `index` of its tuple; None if it cannot be read."""
    by_name = {one.name: one for one in body}
    (root,) = [one for one in body if one.is_root]
    update = _through_copies(by_name, root.operands[index]) if root.opcode == "tuple" else None
    if update is not None and update.opcode == "add":
        for name in update.operands:
            value = _constant(_through_copies(by_name, name))
            if value is not None:
                return value
    return None


def _through_copies(by_name: dict[str, Instruction], name: str) -> Instruction | None:
    one = by_name.get(name)
    while one is not None and one.opcode in ("copy", "bitcast"):
        one = by_name.get(one.operands[0])
    return one


def _constant(one: Instruction | None) -> int | None:
    """The value of a scalar integer constant; None for anything else."""
    if one is None or one.opcode != "constant":
        return None
    found = re.match(r"-?\d+$", one.literal)
    return int(found.group()) if found else None


def _advance(in_flight: dict[str, _Transfer], seconds: float, *, busy: Kind) -> None:
    """Advances transfers by `seconds`, the oldest of each kind first, except those of kind `busy`.

    Collectives and copies advance independently: they use links and memory.
    """
    for kind in ("collective", "copy"):
        budget = 0.0 if kind == busy else seconds
        for transfer in in_flight.values():
            if transfer.kind == kind:
                used = min(transfer.remaining_seconds, budget)
                transfer.remaining_seconds -= used
                budget -= used


def _is_done(one: Instruction, contains_call: Callable[..., bool]) -> bool:
    """Whether an instruction waits for an asynchronous one."""
    return one.opcode.endswith("-done") or contains_call(one, "AsyncCollectiveDone")


def _awaited_start(
    one: Instruction,
    by_name: dict[str, Instruction],
    in_flight: dict[str, _Transfer],
    contains_call: Callable[..., bool],
) -> str | None:
    """The name of the start that `one` waits for; None if it waits for none."""
    if not _is_done(one, contains_call):
        return None
    # The operands of a fused wait may lead to its start through other fusions.
    seen, names = set(), list(one.operands)
    while names:
        name = names.pop()
        if name in in_flight:
            return name
        if name in by_name and name not in seen:
            seen.add(name)
            names.extend(by_name[name].operands)
    return None


def first_group(attributes: str, count: int) -> list[int]:
    """Indices of the partitions in the first replica group, in any of HLO's notations for groups."""
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
        return [int(n) for n in found.group(1).split(",")]
    if found := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", attributes):
        return [int(n) for n in found.groups()]
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", attributes):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", found.group(1))}
        over = re.findall(r"'([^']+)'", found.group(2))
        return _first_of_mesh(sizes, over)
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        rows, size = int(found.group(1)), int(found.group(2))
        reshape = [int(n) for n in found.group(3).split(",")]
        order = [int(n) for n in found.group(4).split(",")] if found.group(4) else range(len(reshape))
        ids = np.arange(math.prod(reshape)).reshape(reshape).transpose(list(order)).reshape(rows, size)
        return [int(n) for n in ids[0]]
    return list(range(count))


def _first_of_mesh(sizes: dict[str, int], over: Sequence[str]) -> list[int]:
    ids = np.arange(math.prod(sizes.values())).reshape(list(sizes.values()))
    return [int(n) for n in ids[tuple(slice(None) if name in over else 0 for name in sizes)].ravel()]


def _received_bytes(one: Instruction, group: int) -> float:
    """Bytes that each of the n chips in a group must receive, which is what a ring algorithm moves.

    all-gather: the other chips' parts of the result. reduce-scatter: n - 1 times its own part of the result.
    all-reduce: a reduce-scatter, then an all-gather.
    """
    opcode = one.opcode.removesuffix("-start")
    num_bytes = float(one.num_bytes)
    if one.opcode.endswith("-start") and opcode != "all-reduce":
        # (operands, results, ...)
        num_bytes = float(shape_bytes(tuple_parts(one.shape)[1]))
    if opcode == "reduce-scatter":
        return num_bytes * (group - 1)
    if opcode == "all-reduce":
        return 2 * num_bytes * (group - 1) / group
    if opcode == "collective-permute":
        return num_bytes
    return num_bytes * (group - 1) / group


def _moved_bytes(one: Instruction) -> int:
    """Bytes moved by an asynchronous copy or slice.

    Its shape is (destination, source, context) for a copy, and ((source), destination, context) for a slice.
    """
    first, second, *_ = tuple_parts(one.shape)
    return shape_bytes(first if one.opcode == "copy-start" else second)


def _kernel_counts(one: Instruction, by_name: dict[str, Instruction]) -> tuple[float, float]:
    """(FLOPs, bytes) of a custom kernel: its own cost estimate, else our count for attention, else 0."""
    estimate = one.config.get("custom_call_config", {}).get("cost_estimate", {})
    flops, sizes = float(estimate.get("flops", 0)), _attention_sizes(one, by_name)
    kernel = attention_kernel(one.name)
    if not flops and sizes and kernel is not None:
        query, key = sizes
        flops = 2.0 * _ATTENTION_PRODUCTS[kernel] * math.prod(query) * key[2]
    return flops, float(estimate.get("bytes_accessed", 0))


def attention_kernel(name: str) -> str | None:
    """The attention kernel that an instruction's name starts with; None if there is none."""
    return next((kernel for kernel in _ATTENTION_PRODUCTS if name.startswith(kernel)), None)


def _attention_sizes(
    one: Instruction, by_name: dict[str, Instruction]
) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Shapes (B, H, L, D) of the queries and the keys of an attention kernel; None for other instructions."""
    if attention_kernel(one.name) is None:
        return None
    # Small arrays that describe the mask come first.
    operands = (dims for o in one.operands for dims in array_dims(by_name[o].shape))
    arrays = [dims for dims in operands if len(dims) == 4]
    return (arrays[0], arrays[1]) if len(arrays) >= 2 else None
