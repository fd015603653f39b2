"""What a compiled program does, read from its text (HLO): which operations run, how often, and what they send to whom.

A compiler's own cost analysis counts the body of a loop once. The text still has the loops, whose trips are read from
the comparison that ends them.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator

import numpy as np

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BITS = {"pred": 8, "s4": 4, "u4": 4, "s2": 2, "u2": 2, "token": 0, "opaque": 0}


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation: `%name = shape opcode(operands), attributes`."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    """Names; of a parameter or a constant, what stands between its brackets."""
    attributes: str

    def attribute(self, name: str) -> str | None:
        """The computation that an attribute names."""
        found = re.search(rf"\b{name}=%?([\w.\-]+)", self.attributes)
        return found and found[1]

    @property
    def bytes(self) -> int:
        """Of its result; of a tuple, all of it."""
        return size_in_bytes(self.shape)


@dataclasses.dataclass(frozen=True)
class Program:
    """Computations by name; the one that runs is `entry`."""

    computations: dict[str, dict[str, Instruction]]
    entry: str


@dataclasses.dataclass(frozen=True)
class Collective:
    """What one device sends in one kind of collective, over a whole run of the program."""

    kind: str
    groups: tuple[tuple[int, ...], ...]
    """Devices that take part together, by their places in the mesh; each device is in one group (in a permutation, in two)."""
    times: int
    bytes: int
    """Of the whole array that is gathered, reduced, scattered or exchanged, summed over `times`."""
    where: str
    """The operation it comes from, as the program names it."""

    @property
    def group(self) -> int:
        """How many devices take part together."""
        return len(self.groups[0])

    @property
    def sent(self) -> float:
        """Bytes that each device sends when the group is a ring; half of them go each way."""
        share = (self.group - 1) / self.group
        return self.bytes * {"all-reduce": 2 * share, "collective-permute": 1.0}.get(self.kind, share)


def size_in_bytes(shape: str, *, in_main_memory: bool = False) -> int:
    """Of `f32[2,3]{1,0}`, or of a tuple of such; all of it, or without what a layout puts into another memory, `S(1)`.

    >>> size_in_bytes("(f32[2,3]{1,0:T(8,128)}, /*index=1*/bf16[4]{0:S(1)})")
    32
    >>> size_in_bytes("(f32[2,3]{1,0:T(8,128)}, /*index=1*/bf16[4]{0:S(1)})", in_main_memory=True)
    24
    """
    total = 0
    for kind, dims, layout in re.findall(r"([a-z]\w*)\[([\d,<=]*)\](\{[^}]*\})?", shape):
        if in_main_memory and "S(" in layout:
            continue
        digits = re.match(r"[a-z]+(\d+)", kind)
        bits = _BITS.get(kind, int(digits[1]) if digits else 0)
        total += -(-bits * math.prod(int(n.removeprefix("<=")) for n in dims.split(",") if n) // 8)
    return total


def parse(text: str) -> Program:
    """Reads the text of one module.

    Raises ValueError where it has no entry computation, or ends inside of one.
    """
    computations: dict[str, dict[str, Instruction]] = {}
    entry, name, current = "", "", None
    for line in _statements(text):
        if current is None:
            head = re.match(r"(ENTRY )?%?([\w.\-]+) .*\{\s*$", line)
            if head is not None and not line.startswith("HloModule"):
                name, current = head[2], computations.setdefault(head[2], {})
                entry = name if head[1] else entry
        elif _CLOSES.match(line):
            current = None
        elif found := _instruction(line):
            current[found.name] = found
    if current is not None:
        raise ValueError(f"the text ends inside of {name!r}.")
    if not entry:
        raise ValueError("the text has no ENTRY computation, so it is no compiled program.")
    return Program(computations, entry)


def _statements(text: str) -> Iterator[str]:
    """The lines of a module, each whole: what a kernel says of itself may hold line breaks."""
    held = ""
    for line in text.split("\n"):
        inside = held.startswith(" ")  # of a computation, whose lines are indented
        if inside and line and not line.startswith(" ") and not _CLOSES.match(line):
            held += line
        else:
            yield held
            held = line
    yield held


_CLOSES = re.compile(r"\}(, execution_thread=.*)?$")
"""The line that ends a computation."""


def _instruction(line: str) -> Instruction | None:
    head = re.match(r"\s*(?:ROOT )?%?([\w.\-]+) = ", line)
    if head is None:
        return None
    at = head.end()
    end = _closing(line, at) if line[at] == "(" else line.index(" ", at)
    call = re.compile(r"\s*([\w\-]+)\(").match(line, end)
    if call is None:
        return None
    close = _closing(line, call.end() - 1)
    inside = line[call.end() : close - 1]
    names = tuple(re.findall(r"%([\w.\-]+)", inside)) or tuple(part for part in (inside.strip(),) if part)
    return Instruction(head[1], line[at:end], call[1], names, line[close:])


def _closing(line: str, start: int) -> int:
    """Where the bracket that opens at `start` has been closed."""
    depth = 0
    for at in range(start, len(line)):
        depth += {"(": 1, ")": -1}.get(line[at], 0)
        if not depth:
            return at + 1
    raise ValueError(f"a bracket is never closed in {line[start : start + 80]!r}.")


def runs(program: Program) -> Iterator[tuple[Instruction, dict[str, Instruction], int]]:
    """(instruction, its computation, how often it runs); what stands inside a fusion is part of the fusion's one run.

    A loop whose trips the text does not tell counts once, a conditional as if every branch ran.
    """
    yield from _runs(program, program.entry, 1)


def _runs(program: Program, name: str, times: int) -> Iterator[tuple[Instruction, dict[str, Instruction], int]]:
    computation = program.computations[name]
    for instruction in computation.values():
        yield instruction, computation, times
        if instruction.opcode == "while":
            body, often = instruction.attribute("body"), trips(program, computation, instruction)
            yield from _runs(program, str(body), times * (1 if often is None else often))
        elif instruction.opcode in ("call", "async-start", "conditional"):
            branches = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
            names = re.findall(r"%?([\w.\-]+)", branches[1]) if branches else []
            parts = (
                instruction.attribute(part) for part in ("to_apply", "calls", "true_computation", "false_computation")
            )
            for called in (*names, *filter(None, parts)):
                yield from _runs(program, called, times)


def trips(program: Program, computation: dict[str, Instruction], loop: Instruction) -> int | None:
    """How often the body of a `while` runs; None where that depends on data.

    Read from the compiler's note, else from a condition `counter < constant` whose counter starts at a constant; loops of
    JAX count in ones.
    """
    if noted := re.search(r'known_trip_count"?:\{"n":"?(\d+)', loop.attributes):
        return int(noted[1])
    condition = program.computations[str(loop.attribute("condition"))]
    test = next((i for i in reversed(condition.values()) if i.shape.startswith("pred[]")), None)
    while test is not None and test.opcode == "fusion":  # the comparison alone, wrapped
        inner = program.computations[str(test.attribute("calls"))]
        given = dict(zip((i.name for i in inner.values() if i.opcode == "parameter"), test.operands, strict=False))
        compare = next((i for i in inner.values() if i.opcode == "compare"), None)
        test = compare and dataclasses.replace(compare, operands=tuple(given.get(o, o) for o in compare.operands))
        condition = condition | inner
    if test is None or test.opcode != "compare" or "direction=LT" not in test.attributes:
        return None
    counter, bound = (condition.get(name) for name in test.operands)
    last = _constant(bound)
    if counter is None or last is None or counter.opcode != "get-tuple-element":
        return None
    index = re.search(r"index=(\d+)", counter.attributes)
    start = computation.get(loop.operands[0])
    first = None
    if index is not None and start is not None and start.opcode == "tuple":
        first = _constant(_origin(computation, start.operands[int(index[1])]))
    return max(last - (first or 0), 0)


def _origin(computation: dict[str, Instruction], name: str) -> Instruction | None:
    found = computation.get(name)
    while found is not None and found.opcode in ("copy", "bitcast", "copy-done", "copy-start"):
        found = computation.get(found.operands[0])
    return found


def _constant(instruction: Instruction | None) -> int | None:
    if instruction is None or instruction.opcode != "constant":
        return None
    text = instruction.operands[0] if instruction.operands else ""
    return int(text) if re.fullmatch(r"-?\d+", text) else None


def collectives(program: Program, devices: int) -> list[Collective]:
    """What devices send each other in one run, by kind, group and origin, the largest first."""
    found: dict[tuple[str, tuple[tuple[int, ...], ...], str], tuple[int, int]] = {}
    steps: set[tuple[int, str]] = set()
    for instruction, computation, runs_in, times in _with_fused(program):
        kind = instruction.opcode.removesuffix("-start")
        if kind not in COLLECTIVES:
            continue
        channel = re.search(r"channel_id=(\d+)", instruction.attributes)
        if channel is not None and computation is not runs_in:  # one step of a collective that several fusions carry on
            if (id(runs_in), channel[1]) in steps:
                continue
            steps.add((id(runs_in), channel[1]))
        if kind == "all-reduce" and _is_scattered(instruction, computation):
            kind = "reduce-scatter"
        inputs = sum(computation[name].bytes for name in instruction.operands if name in computation)
        groups = _groups(instruction.attributes, devices)
        whole = inputs * len(groups[0]) if kind == "all-gather" else inputs
        origin = re.search(r'op_name="([^"]*)"', instruction.attributes)
        key = (kind, groups, origin[1] if origin else "")
        often, so_far = found.get(key, (0, 0))
        found[key] = often + times, so_far + times * whole
    made = [Collective(kind, groups, often, size, where) for (kind, groups, where), (often, size) in found.items()]
    return sorted((c for c in made if c.group > 1), key=lambda c: -c.sent)


def _is_scattered(reduce: Instruction, computation: dict[str, Instruction]) -> bool:
    """Whether all that is used of an all-reduce is this device's slice: how a TPU's compiler writes a reduce-scatter."""
    uses = [i for i in computation.values() if reduce.name in i.operands]
    return bool(uses) and all(i.opcode == "dynamic-slice" for i in uses)


def _with_fused(
    program: Program,
) -> Iterator[tuple[Instruction, dict[str, Instruction], dict[str, Instruction], int]]:
    """As `runs`, with what stands inside of fusions: a TPU's compiler puts collectives there.

    (instruction, its computation, the one that runs it, how often).
    """
    for instruction, computation, times in runs(program):
        yield instruction, computation, computation, times
        if instruction.opcode == "fusion":
            for inner, inside in _inside(program, str(instruction.attribute("calls"))):
                yield inner, inside, computation, times


def _inside(program: Program, name: str) -> list[tuple[Instruction, dict[str, Instruction]]]:
    computation = program.computations[name]
    found = []
    for instruction in computation.values():
        found.append((instruction, computation))
        if instruction.opcode == "fusion":
            found += _inside(program, str(instruction.attribute("calls")))
    return found


def _groups(attributes: str, devices: int) -> tuple[tuple[int, ...], ...]:
    """Which devices take part together, in each of the ways that it is written."""
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\]([^{]*)\{([^}]*)\}", attributes):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        listed = re.search(r"device_ids=\((?:\[([\d,]+)\](?:T\(([\d,]+)\))?|([\d,]+))\)", mesh[2])
        if listed is None:
            order = np.arange(math.prod(sizes.values()))
        else:
            order = np.array(_integers(listed[3])) if listed[3] else _iota(listed[1], listed[2])
        return _over_axes(order, sizes, mesh[3])
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        return _tuples(_iota(iota[3], iota[4]).reshape(int(iota[1]), int(iota[2])))
    if listed := re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{}]*\})\}", attributes):
        return tuple(tuple(_integers(group)) for group in re.findall(r"\{([\d,]+)\}", listed[1]))
    if written := re.search(r"replica_groups=(?!\{\})[^ ]*", attributes):
        raise ValueError(f"{written[0]!r} is a way to write groups of devices that is not known here.")
    return (tuple(range(devices)),)


def _over_axes(order: np.ndarray, sizes: dict[str, int], named: str) -> tuple[tuple[int, ...], ...]:
    """The groups of a mesh over some of its axes, or over parts of them: `'x':(2)4` is the 4 in an axis of 2 x 4 x rest."""
    parts = {name: (before, size) for name, before, size in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", named)}
    shape: list[int] = []
    within: list[int] = []
    for name, size in sizes.items():
        if name in parts:
            before, part = (int(n) for n in parts[name]) if parts[name][1] else (1, size)
            within.append(len(shape) + 1)
            shape += [before, part, size // (before * part)]
        else:
            shape.append(size)
    grid = np.moveaxis(order.reshape(shape), within, range(-len(within), 0))
    return _tuples(grid.reshape(-1, math.prod(shape[axis] for axis in within)))


def _iota(dims: str, permutation: str | None) -> np.ndarray:
    """0, 1, 2, ... in an array of these sizes, its axes permuted, read row by row."""
    sizes = _integers(dims)
    return (
        np.arange(math.prod(sizes))
        .reshape(sizes)
        .transpose(_integers(permutation) if permutation else None)
        .reshape(-1)
    )


def _integers(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]


def _tuples(groups: np.ndarray) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(group) for group in groups.tolist())


def memory_traffic(program: Program, *, kernels: bool = True) -> int:
    """Bytes that one run reads from and writes to main memory, if each operation reads its operands and writes its result.

    Of an operand that an operation only slices, the slice is counted; of an array that it updates in place, the update. What
    the compiler holds on the chip is not counted. Of a Pallas kernel the text tells no more than that; without `kernels` they
    are left out, for `cost.count` to say what their grids move.
    """
    fused = functools.cache(functools.partial(_fused_traffic, program))
    counted = ((i, c, times) for i, c, times in runs(program) if kernels or _PALLAS not in i.attributes)
    return sum(times * _traffic(i, computation, fused) for i, computation, times in counted)


_PALLAS = 'custom_call_target="tpu_custom_call"'


_FREE = """
    parameter constant tuple get-tuple-element bitcast while conditional call after-all partition-id replica-id iota
    opt-barrier async-start async-update async-done copy-done all-gather-done all-reduce-done collective-permute-done
    send recv send-done recv-done
"""
_NO_TRAFFIC = frozenset(_FREE.split())


def _traffic(
    instruction: Instruction, computation: dict[str, Instruction], fused: Callable[[str], tuple[dict[int, int], int]]
) -> int:
    if instruction.opcode in _NO_TRAFFIC:
        return 0
    written = size_in_bytes(instruction.shape, in_main_memory=True)
    if instruction.opcode == "copy-start":  # its result names what it reads and what it writes
        return written
    operands = [computation[name].shape if name in computation else "" for name in instruction.operands]
    sizes = [size_in_bytes(shape, in_main_memory=True) for shape in operands]
    if instruction.opcode in ("slice", "dynamic-slice"):
        return min(sizes[0], instruction.bytes) + written
    if instruction.opcode == "dynamic-update-slice":
        return 2 * sizes[1]
    if instruction.opcode == "gather":
        return min(sizes[0], instruction.bytes) + sizes[1] + written
    if instruction.opcode != "fusion":
        return sum(sizes) + written
    reads, not_written = fused(str(instruction.attribute("calls")))
    return sum(min(size, reads.get(at, size)) for at, size in enumerate(sizes)) + max(written - not_written, 0)


def _fused_traffic(program: Program, name: str) -> tuple[dict[int, int], int]:
    """(bytes read of the operands that are only sliced or updated, by number; bytes of the result that stay as they are)."""
    inner = program.computations[name]

    def uses(computation: dict[str, Instruction], operand: str) -> Iterator[tuple[Instruction, str]]:
        for user in computation.values():
            if operand not in user.operands:
                continue
            if user.opcode in ("bitcast", "reshape"):
                yield from list(uses(computation, user.name)) or [(user, operand)]  # unused: the whole is handed on
            elif user.opcode == "fusion":  # one inside of the other
                nested = program.computations[str(user.attribute("calls"))]
                for at in (at for at, name in enumerate(user.operands) if name == operand):
                    parameter = next(i for i in nested.values() if i.opcode == "parameter" and i.operands == (str(at),))
                    yield from list(uses(nested, parameter.name)) or [(user, operand)]
            else:
                yield user, operand

    reads: dict[int, int] = {}
    for parameter in (i for i in inner.values() if i.opcode == "parameter"):
        found = list(uses(inner, parameter.name))
        if all(user.opcode in _PARTIAL and user.operands[0] == operand for user, operand in found):
            # An array that is updated in place is not read; one that is sliced, or looked up, is read in part.
            sliced = (user.bytes for user, _ in found if user.opcode != "dynamic-update-slice")
            reads[int(parameter.operands[0])] = sum(sliced)
    updates = (i for i in inner.values() if i.opcode == "dynamic-update-slice" and i.operands[1] in inner)
    results = (update for update in updates if all(user.opcode == "tuple" for user, _ in uses(inner, update.name)))
    return reads, sum(update.bytes - inner[update.operands[1]].bytes for update in results)


_PARTIAL = ("slice", "dynamic-slice", "dynamic-update-slice", "gather")
