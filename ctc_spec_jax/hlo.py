"""What a compiled program does, read from its text: collectives, copies, estimated cycles.

A decode and a training step spend their time in loops whose bodies stand in the text once, so
every figure is for one turn of each loop. Shapes in a partitioned program are those of one chip.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Collection, Iterable

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)
"""Operations that move data between chips."""

Shape = tuple[str, tuple[int, ...]]
"""Type and dimensions: ``("bf16", (8, 128))``."""


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a program: ``name = result opcode(...)`` in a computation."""

    computation: str
    name: str
    opcode: str
    results: tuple[Shape, ...]
    line: str

    @property
    def calls(self) -> tuple[str, ...]:
        """Computations that it runs."""
        return tuple(_CALL.findall(self.line)) + tuple(
            name for names in _CALLS.findall(self.line) for name in re.findall(r"[\w.\-]+", names)
        )


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Operations of one kind and the bytes of their results on one chip."""

    count: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class Part:
    """Figures of a part of a program.

    ``cycles`` adds up what the compiler of TPUs expects of every fusion and copy; it is 0 where
    the text does not say. Time on the wires between chips is not in it.
    """

    collectives: dict[str, Traffic]
    copies: int
    cycles: int


def summary(text: str, caches: Collection[Shape] = ()) -> tuple[Part, Part]:
    """Figures of the main loop, and of all that runs before and after it.

    Args:
      text: ``compiled.as_text()``.
      caches: shapes whose copies are counted.

    Returns:
      Those of one turn of the loop of most instructions outside any other loop; all zero where
      there is none. Then those of the rest.
    """
    program = parse(text)
    inside = main_loop(program)
    turn = [i for i in program if i.computation in inside]
    rest = [i for i in program if i.computation not in inside]
    return _figures(turn, caches), _figures(rest, caches)


def _figures(program: list[Instruction], caches: Collection[Shape]) -> Part:
    return Part(collectives(program), copies(program, caches), estimated_cycles(program))


_HEAD = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_LINE = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_CALL = re.compile(r"(?:calls|body|condition|to_apply)=%?([\w.\-]+)")
_CALLS = re.compile(r"(?:branch_computations|called_computations)=\{([^}]*)\}")
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_UNKNOWN = 2**63 - 1
"""What the compiler writes where it has no estimate."""
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')


def parse(text: str) -> list[Instruction]:
    """The instructions of all computations, in the order of the text."""
    found, computation = [], ""
    for line in text.splitlines():
        if head := _HEAD.match(line):
            computation = head[1]
        elif match := _LINE.match(line):
            kind, rest = _split_type(match[2])
            opcode = rest.split("(", 1)[0].strip()
            found.append(Instruction(computation, match[1], opcode, _shapes(kind), line))
    return found


def _split_type(text: str) -> tuple[str, str]:
    """The type of a result, a tuple in parentheses or one word, and what follows it."""
    if not text.startswith("("):
        kind, _, rest = text.partition(" ")
        return kind, rest
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return text[: place + 1], text[place + 1 :]
    return text, ""


def _shapes(kind: str) -> tuple[Shape, ...]:
    return tuple(
        (dtype, tuple(int(size) for size in sizes.split(",") if size))
        for dtype, sizes in _SHAPE.findall(kind)
    )


def shape_bytes(shape: Shape) -> int:
    """Bytes of an array without padding; 0 for what is no array."""
    dtype, sizes = shape
    if dtype == "pred":
        return math.prod(sizes)
    bits = re.search(r"\d+", dtype)
    return math.prod(sizes) * int(bits[0]) // 8 if bits else 0


def main_loop(program: Iterable[Instruction]) -> frozenset[str]:
    """Computations that a turn of the main loop runs; see ``summary``."""
    program = list(program)
    called: dict[str, set[str]] = {}
    sizes: dict[str, int] = {}
    for instruction in program:
        called.setdefault(instruction.computation, set()).update(instruction.calls)
        sizes[instruction.computation] = sizes.get(instruction.computation, 0) + 1
    reach = functools.cache(lambda name: _reached(called, name))
    loops = [
        frozenset().union(*(reach(name) for name in instruction.calls))
        for instruction in program
        if instruction.opcode == "while"
    ]
    # A loop inside another is part of it, hence smaller.
    return max(loops, key=lambda names: sum(sizes.get(n, 0) for n in names), default=frozenset())


def _reached(called: dict[str, set[str]], root: str) -> frozenset[str]:
    seen, waiting = {root}, [root]
    while waiting:
        new = called.get(waiting.pop(), set()) - seen
        seen |= new
        waiting += new
    return frozenset(seen)


def collectives(program: Iterable[Instruction]) -> dict[str, Traffic]:
    """Traffic by kind of collective.

    The parts of one that is spread over several computations, to hide it behind others, share
    its channel and count once.
    """
    found: dict[str, dict[str, int]] = {}
    for instruction in program:
        kind = instruction.opcode.removesuffix("-start")
        if kind not in COLLECTIVES:
            continue
        channel = re.search(r"channel_id=(\d+)", instruction.line)
        name = channel[1] if channel else f"{instruction.computation}/{instruction.name}"
        results = instruction.results
        if kind != instruction.opcode and kind != "all-reduce":
            results = results[1:2]  # operand, result, and what the runtime needs
        found.setdefault(kind, {})[name] = sum(map(shape_bytes, results))
    return {kind: Traffic(len(x), sum(x.values())) for kind, x in sorted(found.items())}


def copies(program: Iterable[Instruction], shapes: Collection[Shape]) -> int:
    """Copies of arrays of the given shapes within a chip's main memory, also as transposes."""
    program = list(program)
    count = _transposes(program, shapes)
    for instruction in program:
        if instruction.opcode in ("copy", "copy-start") and instruction.results[0] in shapes:
            # Spaces 1 and 3 are fast memory: fetching into it and writing back is no copy.
            kind = _split_type(instruction.line.split(" = ", 1)[1])[0]
            count += not re.search(r"S\([13]\)", kind)
    return count


def _transposes(program: list[Instruction], shapes: Collection[Shape]) -> int:
    """Arrays of as many numbers as the given ones that are read and written in another order.

    Axes that stay neighbours may have been merged, so sizes are compared. Of a fusion those count
    that it reads and writes back as they are; one that also computes or pads makes something new.
    """
    sizes = {(dtype, math.prod(axes)) for dtype, axes in shapes}
    fused = {name for i in program if i.opcode == "fusion" for name in i.calls}
    by_name = {(i.computation, i.name): i for i in program}
    written: set[tuple[str, str]] = set()
    waiting = [i for i in program if i.computation in fused and i.line.lstrip()[:5] == "ROOT "]
    while waiting:
        found = waiting.pop()
        written.add((found.computation, found.name))
        if found.opcode in ("bitcast", "tuple"):
            waiting += _operands(found, by_name)

    def as_given(instruction: Instruction) -> bool:
        while instruction.opcode in ("bitcast", "copy", "transpose"):
            (instruction,) = _operands(instruction, by_name)
        return instruction.opcode == "parameter"

    moved = (
        i
        for i in program
        if i.opcode == "transpose" and (i.results[0][0], math.prod(i.results[0][1])) in sizes
    )
    return sum(
        i.computation not in fused or ((i.computation, i.name) in written and as_given(i))
        for i in moved
    )


def _operands(
    instruction: Instruction, by_name: dict[tuple[str, str], Instruction]
) -> list[Instruction]:
    given = instruction.line.split(f" {instruction.opcode}(", 1)[1].split("), ", 1)[0]
    names = re.findall(r"%([\w.\-]+)", given)
    return [by_name[instruction.computation, name] for name in names]


def estimated_cycles(program: Iterable[Instruction]) -> int:
    """Sum of what the compiler of TPUs expects of every instruction."""
    found = (int(n) for instruction in program for n in _CYCLES.findall(instruction.line))
    return sum(n for n in found if n < _UNKNOWN)
