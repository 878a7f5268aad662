"""The fewest instructions that a thread of a kernel can execute: a shortest path through its disassembly."""

from __future__ import annotations

import heapq
import re
from dataclasses import dataclass

_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+ )?([A-Z][\w.]*)([^;]*);", re.M)


@dataclass(frozen=True)
class Instruction:
    """One line of the disassembly."""

    address: int
    predicated: bool
    opcode: str
    operands: str

    @property
    def target(self) -> int:
        """Where a branch goes."""
        return int(re.search(r"0x([0-9a-f]+)\s*$", self.operands)[1], 16)


def instructions(code: str) -> list[Instruction]:
    """The instructions of one function in cuobjdump's output."""
    return [Instruction(int(a, 16), bool(p), op, rest.strip()) for a, p, op, rest in _LINE.findall(code)]


def _successors(program: list[Instruction], index: dict[int, int], i: int) -> list[int | None]:
    """Where control can go after instruction i; None is the end. Subroutines, for rare operands, are not taken."""
    instruction, kind = program[i], program[i].opcode.split(".")[0]
    after: list[int | None] = [i + 1] if i + 1 < len(program) else []
    if kind == "BRA":
        # A branch to itself pads the code behind the end.
        branch = index.get(instruction.target)
        return [branch, *after] if instruction.predicated or "P" in instruction.operands.split(",")[0] else [branch]
    if kind == "EXIT":
        return [None, *after] if instruction.predicated else [None]
    if kind in ("CALL", "RET", "BRX", "JMP"):
        return after if instruction.predicated else []
    return after


def shortest_path(code: str, required: dict[str, int]) -> int:
    """Instructions on the shortest way through a function that executes certain instructions.

    Args:
        code: the function in cuobjdump's output.
        required: how often at least an opcode that matches the pattern has to be executed, by pattern.

    Raises:
        ValueError: there is no such way.
    """
    program = instructions(code)
    index = {instruction.address: i for i, instruction in enumerate(program)}
    patterns = [re.compile(pattern) for pattern in required]
    goal = tuple(required.values())
    counted = [next((k for k, p in enumerate(patterns) if p.match(one.opcode)), None) for one in program]
    queue, done = [(0, 0, (0,) * len(goal))], set()
    while queue:
        length, i, counts = heapq.heappop(queue)
        # In a run of instructions without branches there is nothing to choose.
        while True:
            length += 1
            if counted[i] is not None:
                k = counted[i]
                counts = (*counts[:k], min(counts[k] + 1, goal[k]), *counts[k + 1 :])
            following = _successors(program, index, i)
            if len(following) != 1 or following[0] is None or program[i].opcode.startswith("BRA"):
                break
            i = following[0]
        for j in following:
            if j is None:
                if counts == goal:
                    return length
            elif (j, counts) not in done:
                done.add((j, counts))
                heapq.heappush(queue, (length, j, counts))
    raise ValueError(f"no way through the function executes {required}")
