"""What a GPU is told in a turn of a program's main loop, read from XLA's list of it ("thunks").

The list is an outline: what is deeper stands inside a loop, a branch or a graph. Loops inside the
main loop count one turn, branches both sides.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable

_LINE = re.compile(r"^(\s*)\d+: k(\w+)\s+\[[^\]]*\]\s*(\S*)")
_CONTAINERS = {"AsyncDone", "AsyncStart", "CommandBuffer", "Conditional", "Sequential", "While"}
_PRODUCTS = {"Convolution", "CublasLtMatmul", "CuDnn", "Gemm"}
_MEMORY = {"Copy", "Memset32BitValue", "Memzero"}
_COLLECTIVES = {"AllGather", "AllReduce", "AllToAll", "CollectivePermute", "ReduceScatter"}
_COLLECTIVES |= {"RaggedAllToAll"}


@dataclasses.dataclass(frozen=True)
class Thunk:
    """One line: how deep it stands, what it is and, of a kernel, its name."""

    depth: int
    kind: str
    name: str


@dataclasses.dataclass(frozen=True)
class Kernels:
    """What runs in one turn of the main loop, and how it is started.

    ``starts`` is how many of these and of graphs of them the host starts in a turn: 0 where the
    whole loop is one graph (``one_graph``). ``copies`` are those that are no kernels but commands,
    of whatever size.
    """

    total: int
    products: int
    sorts: int
    copies: int
    collectives: int
    starts: int
    one_graph: bool


def parse(text: str) -> list[Thunk]:
    """The lines of a list."""
    found = (_LINE.match(line) for line in text.splitlines())
    return [Thunk(len(line[1]), line[2], line[3]) for line in found if line]


def summary(text: str) -> Kernels:
    """Figures of the loop of most lines outside any other loop; all zero where there is none."""
    program = parse(text)
    loops = [i for i, thunk in enumerate(program) if thunk.kind == "While"]
    place = max(loops, key=lambda i: len(_inside(program, i)), default=None)
    if place is None:
        return Kernels(0, 0, 0, 0, 0, 0, False)
    turn = _inside(program, place)
    one_graph = any(
        thunk.kind == "CommandBuffer" and place - i <= len(_inside(program, i))
        for i, thunk in enumerate(program[:place])
    )
    run = [thunk for thunk in turn if thunk.kind not in _CONTAINERS]
    return Kernels(
        total=len(run),
        products=_count(run, _PRODUCTS) + sum(t.name.startswith("gemm") for t in run),
        sorts=sum(t.name.startswith("sort") for t in run),
        copies=_count(run, _MEMORY),
        collectives=_count(run, _COLLECTIVES),
        starts=0 if one_graph else _starts(turn),
        one_graph=one_graph,
    )


def _inside(program: list[Thunk], place: int) -> list[Thunk]:
    """What stands deeper, up to the next line that does not."""
    end = place + 1
    while end < len(program) and program[end].depth > program[place].depth:
        end += 1
    return program[place + 1 : end]


def _count(run: Iterable[Thunk], kinds: set[str]) -> int:
    return sum(thunk.kind in kinds for thunk in run)


def _starts(turn: list[Thunk]) -> int:
    count = place = 0
    while place < len(turn):
        if turn[place].kind == "CommandBuffer":
            count += 1
            place += len(_inside(turn, place))
        else:
            count += turn[place].kind not in _CONTAINERS
        place += 1
    return count
