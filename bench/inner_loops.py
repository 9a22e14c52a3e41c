"""What the compiler made of the hot loops: instructions, loads for each multiply, and spills, out of the built library.

    python bench/inner_loops.py                    # the innermost loops around integer products
    python bench/inner_loops.py --all --code       # those of floats as well, and each loop's instructions

A loop is what lies between a jump backwards and its target, innermost where no other lies inside. Listed are those with at
least four multiplies: ``vpmaddubsw`` (AVX2), ``vpdpbusd`` (VNNI), and with ``--all`` the fused multiply-adds of floats. A
load is an operand in memory that is no stack; a spill is a vector register that is written to or read from the stack in
the loop. Needs ``objdump`` and a library with symbols, as the project builds it.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchkit import command
from benchkit.records import Record, table

INTEGER = ("vpmaddubsw", "vpdpbusd")
FLOAT = ("vfmadd", "vfnmadd")
LEAST = 4

_FUNCTION = re.compile(r"^[0-9a-f]+ <(.+)>:$")
_LINE = re.compile(r"^\s+([0-9a-f]+):\s+(\S+)\s*(.*?)(?:\s*#.*|\s*<.*)?$")


@dataclass(frozen=True)
class Instruction:
    """One line of objdump: its address, its mnemonic and its operands as written (AT&T)."""

    address: int
    name: str
    operands: str

    @property
    def memory(self) -> bool:
        """Whether it reads or writes memory."""
        return "(" in self.operands and not self.name.startswith(("lea", "nop", "prefetch"))

    @property
    def vector(self) -> bool:
        """Whether a vector register takes part."""
        return "mm" in self.operands

    @property
    def target(self) -> int | None:
        """Where it jumps to, if it is a jump to a known address."""
        return int(self.operands, 16) if self.name.startswith("j") and re.fullmatch("[0-9a-f]+", self.operands) else None


@dataclass(frozen=True)
class Loop:
    """An innermost loop of a function: what it holds, and whether rbp points into the stack there."""

    function: str
    body: tuple[Instruction, ...]
    framed: bool

    def multiplies(self, names: tuple[str, ...] = INTEGER + FLOAT) -> int:
        """How many instructions begin with one of ``names``."""
        return sum(i.name.startswith(names) for i in self.body)

    @property
    def loads(self) -> int:
        """Operands in memory outside the stack, stores not among them."""
        return sum(i.memory and not self._on_stack(i) and not _stores(i) for i in self.body)

    @property
    def spills(self) -> int:
        """Vector registers written to the stack, or read from it."""
        return sum(i.memory and i.vector and self._on_stack(i) for i in self.body)

    def _on_stack(self, instruction: Instruction) -> bool:
        return "(%rsp" in instruction.operands or (self.framed and "(%rbp" in instruction.operands)


def loops(library: Path) -> Iterator[Loop]:
    """The innermost loops of every function of a library. Raises RuntimeError where objdump is missing or fails."""
    tool = shutil.which("objdump")
    if tool is None:
        raise RuntimeError("objdump is not on the PATH: install binutils")
    command = [tool, "--disassemble", "--demangle", "--no-show-raw-insn", str(library)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"objdump failed with status {done.returncode}: {done.stderr.strip()}")
    for name, body in functions(done.stdout):
        yield from innermost(name, body)


def functions(listing: str) -> Iterator[tuple[str, list[Instruction]]]:
    """Name and instructions of each function in what objdump printed."""
    name = ""
    body: list[Instruction] = []
    for line in listing.splitlines():
        if head := _FUNCTION.match(line):
            if body:
                yield name, body
            name, body = head[1], []
        elif found := _LINE.match(line):
            body.append(Instruction(int(found[1], 16), found[2], found[3].strip()))
    if body:
        yield name, body


def innermost(name: str, body: list[Instruction]) -> Iterator[Loop]:
    """The loops of one function that hold no other loop."""
    position = {instruction.address: i for i, instruction in enumerate(body)}
    spans = {
        (position[i.target], at) for at, i in enumerate(body) if i.target in position and position[i.target] <= at
    }  # a jump backwards closes a loop
    framed = any(i.name == "mov" and i.operands == "%rsp,%rbp" for i in body)
    for first, last in sorted(spans):
        if not any((a, b) != (first, last) and first <= a and b <= last for a, b in spans):
            yield Loop(name, tuple(body[first : last + 1]), framed)


def short(function: str) -> str:
    """A function's name without namespaces and parameters."""
    function = re.sub(r"qcompile::|\(anonymous namespace\)::|^void ", "", function)
    depth = 0
    for at, letter in enumerate(function):
        depth += {"<": 1, ">": -1}.get(letter, 0)
        if letter == "(" and depth == 0 and function[at : at + 2] != "()":
            return function[:at]
    return function


def _stores(instruction: Instruction) -> bool:
    return instruction.operands.endswith(")") and instruction.name.startswith(("mov", "vmov", "vext", "vcvtps2ph"))


def main() -> None:
    args = _arguments()
    from qcompile.kernels.cpu import build

    names = INTEGER + FLOAT if args.all else INTEGER
    rows, records = [], []
    for loop in loops(args.library or build.library_path()):
        count = loop.multiplies(names)
        if count < LEAST or "Portable" in loop.function:
            continue
        rows.append([
            short(loop.function), str(len(loop.body)), str(count), f"{count / len(loop.body):.0%}",
            f"{loop.loads / count:.2f}", str(loop.spills),
        ])  # fmt: skip
        case = {"function": short(loop.function), "instructions": len(loop.body), "multiplies": count, "loads": loop.loads}
        records.append(Record(case, "qcompile", loop.spills, "spills"))
        if args.code:
            print(f"\n{loop.function}")
            print("\n".join(f"  {i.address:x}  {i.name:14}{i.operands}" for i in loop.body))
    print(table(["function", "instructions", "multiplies", "share", "loads a multiply", "spills"], sorted(rows)))
    command.finish(args, "inner_loops", sorted(records, key=lambda r: (r.case["function"], r.case["multiplies"])))


def _arguments() -> argparse.Namespace:
    parser = command.parser(__doc__)
    parser.add_argument("--library", type=Path, default=None, help="default: the one that this checkout builds")
    parser.add_argument("--all", action="store_true", help="also the loops of float products")
    parser.add_argument("--code", action="store_true", help="print the instructions")
    return parser.parse_args()


if __name__ == "__main__":
    main()
