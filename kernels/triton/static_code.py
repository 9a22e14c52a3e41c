"""What a kernel's machine code says without a GPU: registers, spills, shared memory, instructions of its inner loop.

A launch is recorded instead of made (:func:`record`), with the arguments and configuration that the launcher would use on a
given GPU, and compiled for that GPU (:func:`examine`). This is a static code report, not performance.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from qcompile.kernels.triton.target import Target, pretend

_POINTERS = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int8: "*i8", torch.uint8: "*u8",
    torch.int16: "*i16", torch.int32: "*i32", torch.int64: "*i64", torch.float8_e4m3fn: "*fp8e4nv",
    torch.float8_e4m3fnuz: "*fp8e4b8", torch.float8_e5m2: "*fp8e5",
}  # fmt: skip
_OPTIONS = ("num_warps", "num_stages")

#: Bytes of shared memory that a block may have, and per processor: bytes, threads of a warp x warps, blocks.
_PARTS = {
    "sm_80": (163 << 10, 164 << 10, 64, 32), "sm_89": (99 << 10, 100 << 10, 48, 24),
    "sm_90": (227 << 10, 228 << 10, 64, 32), "sm_100": (227 << 10, 228 << 10, 64, 32),
    "gfx942": (64 << 10, 64 << 10, 32, 32),
}  # fmt: skip


@dataclass(frozen=True)
class Launch:
    """A launch that was recorded: the kernel, its arguments by name, constants, grid, and Triton's options."""

    kernel: JITFunction[Any]
    arguments: dict[str, Any]
    grid: tuple[int, ...]
    options: dict[str, int]

    @property
    def name(self) -> str:
        """The kernel's."""
        return self.kernel.__name__


@dataclass(frozen=True)
class Facts:
    """What was read off one kernel's machine code; counts are of its largest loop.

    shared: bytes a block. occupancy: warps a processor may hold, of those that it could. per_weight: instructions of the
    loop, summed over the threads of a block, for each weight that the loop decodes (0 where it decodes none). wide: weight
    loads of 128 bits; narrow: weight loads of fewer than 32 bits. traps: the compiler gave up without an error, and made a
    kernel that stops (of too much tensor memory, for one).
    """

    registers: int
    spills: int
    shared: int
    shared_limit: int
    occupancy: float
    loop: int
    per_weight: float
    tensor_core: int
    wide: int
    narrow: int
    shuffles: int
    barriers: int
    traps: bool


@contextlib.contextmanager
def _recording(found: list[Launch]) -> Iterator[None]:
    def run(self: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        arguments = dict(zip(self.arg_names, args, strict=False))
        arguments |= {k: v for k, v in kwargs.items() if k not in _OPTIONS}
        found.append(Launch(self, arguments, tuple(grid), {k: kwargs[k] for k in _OPTIONS if k in kwargs}))

    with mock.patch.object(JITFunction, "run", run):
        yield


def record(target: Target, call: Callable[[], object]) -> list[Launch]:
    """The launches that ``call`` would make on ``target``; its tensors may be on the meta device."""
    found: list[Launch] = []
    with pretend(target), _recording(found):
        call()
    return found


def compiled(launch: Launch, arch: str) -> Any:
    """The kernel compiled for an architecture, specialized as a launch with these arguments specializes it."""
    signature, constants, attributes = {}, {}, {}
    for index, name in enumerate(launch.kernel.arg_names):
        value = launch.arguments[name]
        parameter = launch.kernel.params[index]
        if parameter.is_constexpr or (isinstance(value, int) and value == 1):
            signature[name], constants[(index,)] = "constexpr", value
            continue
        signature[name] = _POINTERS[value.dtype] if isinstance(value, Tensor) else "i32"
        if isinstance(value, Tensor) or value % 16 == 0:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    target = GPUTarget("hip", arch, 64) if arch.startswith("gfx") else GPUTarget("cuda", int(arch[3:]), 32)
    return triton.compile(source, target=target, options=launch.options)


def examine(launch: Launch, arch: str) -> Facts:
    """Compile a launch and read its machine code."""
    return read(compiled(launch, arch), arch, launch.options.get("num_warps", 4), weights_per_step(launch.arguments))


def read(kernel: Any, arch: str, in_block: int, weights: int) -> Facts:
    """The facts of a kernel that Triton compiled for ``arch``.

    in_block: warps of a block. weights: those that one pass through its loop decodes.
    """
    shared = kernel.metadata.shared
    most, whole, warps, blocks = _PARTS[arch]
    if arch.startswith("gfx"):
        registers, spills, loop = _amd(kernel.asm["amdgcn"])
        per_warp, threads = -(-registers // 8) * 8, 64 * in_block
        held = 4 * min(8, 512 // max(1, per_warp))
    else:
        registers, spills, loop = _nvidia(kernel.asm["cubin"], kernel.asm["ptx"])
        threads = 32 * in_block
        held = min(warps, 65536 // max(1, -(-registers * 32 // 256) * 256))
    resident = min(held // in_block, blocks, whole // max(1, shared + 1024)) * in_block
    count = Counter(_opcode(i) for i in loop)

    def total(*patterns: str) -> int:
        return sum(n for name, n in count.items() if any(re.match(p, name) for p in patterns))

    return Facts(
        registers=registers,
        spills=spills,
        shared=shared,
        shared_limit=most,
        occupancy=round(min(resident, warps) / warps, 2),
        loop=len(loop),
        per_weight=round(len(loop) * threads / weights, 2) if weights else 0.0,
        tensor_core=total(r".*MMA", r"v_mfma", r"v_smfmac"),
        wide=total(r"LDG\.E.*\.128", r"LDGSTS\.E.*\.128", r"UTMALDG", r"(global|buffer)_load_(dwordx4|b128)"),
        narrow=sum(_narrow(i) for i in loop),
        shuffles=total(r"SHFL", r"ds_bpermute", r"ds_permute", r"ds_swizzle"),
        barriers=total(r"BAR", r"s_barrier"),
        traps=bool(re.search(r"^\s*(trap;|s_trap)", kernel.asm.get("ptx") or kernel.asm["amdgcn"], re.M)),
    )


def weights_per_step(constants: Mapping[str, Any]) -> int:
    """Weights that one pass through the loop of a kernel with these constants decodes, in a whole block."""
    if "BITS" not in constants or "BN" not in constants:
        return 0
    columns = 512 if constants["BITS"] == 3 else 32 * (16 // constants["BITS"])
    return int(constants["BN"] * columns // constants.get("PARTS", 1) * constants.get("BB", 1))


def _narrow(instruction: str) -> bool:
    """Whether it copies codes in pieces smaller than 32 bits; plain loads of scales and zero points may be that small."""
    return bool(re.search(r"LDGSTS\.E\.(U?8|U?16)\b|LDGSTS\.E\.S(8|16)\b", instruction))


def _opcode(instruction: str) -> str:
    return re.sub(r"^@!?U?PT?\d*\s+", "", instruction).split()[0]


def _nvidia(cubin: bytes, ptx: str) -> tuple[int, int, list[str]]:
    """Registers, bytes of local memory, and the largest loop."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = subprocess.run(
            [tools / "cuobjdump", "--dump-resource-usage", path], capture_output=True, text=True, check=True
        ).stdout
        text = subprocess.run([tools / "nvdisasm", "-c", path], capture_output=True, text=True, check=True).stdout
    registers = max(map(int, re.findall(r"REG:(\d+)", usage)))
    local = sum(map(int, re.findall(r"(?:STACK|LOCAL):(\d+)", usage)))
    label, instruction = r"\s*(\.L_x_\d+):", r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);"
    return registers, local, _loop(text, label, instruction, r"BRA.*?(\.L_x_\d+)")


def _amd(text: str) -> tuple[int, int, list[str]]:
    registers = int(re.findall(r"\.vgpr_count:\s+(\d+)", text)[0])
    spills = sum(int(n) for n in re.findall(r"\.[sv]gpr_spill_count:\s+(\d+)", text))
    return registers, spills, _loop(text, r"(\.LBB\d+_\d+):", r"\t([a-z]+_\w+.*)", r"s_c?branch\w*\s+(\.LBB\d+_\d+)")


def _loop(text: str, label: str, instruction: str, branch: str) -> list[str]:
    """The longest stretch of instructions that a jump backwards closes, of those with tensor cores where there are any."""
    labels: dict[str, int] = {}
    instructions: list[str] = []
    for line in text.splitlines():
        if found := re.match(label, line):
            labels[found[1]] = len(instructions)
        if found := re.match(instruction, line):
            instructions.append(found[1].strip())
    longest: tuple[bool, list[str]] = (False, [])
    for index, text_of in enumerate(instructions):
        jump = re.search(branch, text_of)
        start = labels.get(jump[1], index) if jump else index
        stretch = instructions[start : index + 1]
        multiplies = any("MMA" in i or "v_mfma" in i for i in stretch)
        if index - start >= 4 and (multiplies, len(stretch)) > (longest[0], len(longest[1])):
            longest = multiplies, stretch
    return longest[1]
