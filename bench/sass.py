"""Compiled GPU kernels: registers, accesses, and the instructions a thread executes, from their disassembly."""

from __future__ import annotations

import heapq
import importlib.util
import operator
import re
import shutil
import subprocess
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from operator import ge
from pathlib import Path

CUDA = Path(__file__).resolve().parent.parent / "csrc" / "cuda"
_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+ )?([A-Z][\w.]*)([^;]*);", re.M)
_OPCODE = re.compile(r"/\*[0-9a-f]{4,}\*/ +(?:@\S+ +)?([A-Z][\w.]*)")


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
    """Return the instructions of one function in cuobjdump's output."""
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


def _left(runs: dict[int, tuple[int, list[int], list[int]]], k: int, goal: int, end: int) -> dict[tuple[int, int], int]:
    """Fewest instructions from a run to the end, by how many of requirement k were executed; no entry: no way."""
    before = defaultdict(list)
    for i, (length, counts, following) in runs.items():
        for j in following:
            for count in range(goal + 1):
                before[j, min(count + counts[k], goal)].append((i, count, length))
    left, queue = {}, [(0, end, goal)]
    while queue:
        length, i, count = heapq.heappop(queue)
        if (i, count) not in left:
            left[i, count] = length
            for j, fewer, more in before[i, count]:
                heapq.heappush(queue, (length + more, j, fewer))
    return left


def shortest_path(code: str, required: dict[str, int]) -> int:
    """Instructions on the shortest way through a function that executes certain instructions.

    Args:
        code: the function in cuobjdump's output.
        required: how often at least an instruction that begins with the pattern has to be executed, by pattern.

    Raises:
        ValueError: there is no such way.
    """
    program = instructions(code)
    index = {instruction.address: i for i, instruction in enumerate(program)}
    patterns = [re.compile(pattern) for pattern in required]
    goal = tuple(required.values())
    lines = [f"{one.opcode} {one.operands}" for one in program]
    counted = [next((k for k, p in enumerate(patterns) if p.match(line)), None) for line in lines]

    def run(i: int) -> tuple[int, list[int], list[int]]:
        """Length and counts of the instructions from i to a branch, with nothing to choose, and what follows."""
        length, counts = 0, [0] * len(goal)
        while True:
            length += 1
            if counted[i] is not None:
                counts[counted[i]] += 1
            following = _successors(program, index, i)
            if len(following) != 1 or following[0] is None or program[i].opcode.startswith("BRA"):
                return length, counts, [len(program) if j is None else j for j in following]
            i = following[0]

    runs, new = {}, [0]
    while new:
        i = new.pop()
        runs[i] = run(i)
        new += [j for j in runs[i][2] if j < len(program) and j not in runs and j not in new]
    # A*: what one requirement alone leaves to be done is never more than what all of them do.
    left = [_left(runs, k, goal[k], len(program)) for k in range(len(goal))]
    queue, done = [(0, 0, 0, (0,) * len(goal))], defaultdict(list)
    while queue:
        _, length, i, counts = heapq.heappop(queue)
        if i == len(program):
            return length
        if any(shorter <= length and all(map(ge, before, counts)) for shorter, before in done[i]):
            continue  # no shorter, and nothing more executed
        done[i].append((length, counts))
        more, found, following = runs[i]
        counts = tuple(map(min, map(operator.add, counts, found), goal))
        for j in following:
            rest = [left[k].get((j, counts[k])) for k in range(len(goal))]
            if None not in rest:
                heapq.heappush(queue, (length + more + max(rest, default=0), length + more, j, counts))
    raise ValueError(f"no way through the function executes {required}")


def loops(code: str) -> list[list[Instruction]]:
    """Return the bodies of innermost loops that read global memory; a branch over a part of one is not taken."""
    program = instructions(code)
    index = {instruction.address: i for i, instruction in enumerate(program)}
    spans = []
    for i, instruction in enumerate(program):
        if instruction.opcode.startswith("BRA") and (begin := index.get(instruction.target, i)) < i:
            spans.append((begin, i + 1))
    inner = [a for a in spans if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
    bodies = [program[begin:end] for begin, end in inner]
    return [body for body in bodies if any(one.opcode.startswith("LDG") for one in body)]


# ---- what the compilers say ------------------------------------------------------------------------------------------


@dataclass
class Kernel:
    """One compiled kernel."""

    registers: int = 0
    stack: int = 0
    wide_loads: int = 0  # of 128 bits
    wide_stores: int = 0
    local: int = 0  # accesses to local memory
    generic: int = 0  # accesses that look up at run time which memory an address is in
    code: str = field(default="", repr=False)

    @classmethod
    def of(cls, code: str, **facts: int) -> Kernel:
        """Return what the disassembly of a function tells."""
        kinds = {
            "wide_loads": r"LDG\.E\.(?:\w+\.)*128\b",
            "wide_stores": r"STG\.E\.(?:\w+\.)*128\b",
            "local": r"(?:LDL|STL)\b",
            "generic": r"(?:LD|ST)\.E\b",
        }
        opcodes = Counter(_OPCODE.findall(code))
        count = {kind: sum(opcodes[op] for op in opcodes if re.match(form, op)) for kind, form in kinds.items()}
        return cls(code=code, **facts, **count)


def tool(name: str) -> str | None:
    """Return a program of the CUDA toolkit, or of Triton's package, which has some of them; None if it is not here."""
    found = shutil.which(name)
    if found is None and (spec := importlib.util.find_spec("triton")) is not None:
        path = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / name
        found = str(path) if path.exists() else None
    return found


def kernels(binary: Path, arch: str = "sm_90") -> dict[str, Kernel]:
    """Return the kernels in a cubin or a library that are for ``arch``; by their mangled names."""

    def say(what: str) -> list[str]:
        command = [str(tool("cuobjdump")), f"--dump-{what}", "--gpu-architecture", arch, str(binary)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("Function")[1:]

    facts = {}
    for text in say("resource-usage"):
        name = text.strip(" ").split(":")[0]
        registers, stack = (int(re.search(rf"{field}:(\d+)", text)[1]) for field in ("REG", "STACK"))
        facts[name] = {"registers": registers, "stack": stack}
    code = {text.split()[1]: text.removeprefix(" : ") for text in say("sass")}
    return {name: Kernel.of(text, **facts[name]) for name, text in code.items()}


def compile_cuda(source: Path, folder: Path, arch: str = "sm_90") -> dict[str, Kernel]:
    """Compile a file with nvcc; its kernels by their mangled names.

    Raises:
        RuntimeError: it does not compile, or not without a warning.
    """
    cubin = folder / f"{source.stem}.cubin"
    command = ["nvcc", "-O3", "-std=c++20", "-fmad=false", f"-arch={arch}", f"-I{CUDA}", "-cubin", "-o", cubin, source]
    compiled = subprocess.run(command, capture_output=True, text=True, check=False)
    if compiled.returncode or "warning" in compiled.stderr:
        raise RuntimeError(compiled.stderr)
    return kernels(cubin, arch)


def built(arch: str = "sm_90") -> dict[str, Kernel]:
    """Return the kernels of the library built from the sources as they are; none if there is no such library."""
    library = Path(importlib.util.find_spec("adahessian_fused").origin).with_name("libadahessian_ops.so")
    sources = [*CUDA.parent.glob("*.h"), *CUDA.iterdir()]
    if not library.exists() or library.stat().st_mtime < max(source.stat().st_mtime for source in sources):
        return {}
    return kernels(library, arch)
