"""Which kernel, in which configuration: THE table, by architecture, rows of x (M) and bits of the weight.

Three ways to compute ``y = x @ W.T``:

- ``gemv``: M of 1 or 2; no tensor cores, every weight read once, float32 arithmetic;
- ``gemm``: tensor cores, weights decoded in registers; K is split while there are fewer tiles than processors;
- ``dense``: W decoded to the dtype of x, then the vendor's matmul. Decoding W costs a pass over memory once, whatever M is;
  a kernel that decodes W again for each tile of x loses in proportion to M. On paper it loses nothing, at any M and width
  (``docs/rooflines.md``); if it reaches 80 % of the vendor's rate, the pass is cheaper from about 1000 rows on, and from
  about 1500 on Hopper and Blackwell, whose memory is slower for their tensor cores' rate.

The numbers are seeds: they compile without spills and within shared memory on each architecture (``docs/gpu_report.md``),
and follow the rooflines (``docs/rooflines.md``). None was measured on a GPU yet.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Literal

from qcompile.kernels.layouts.planes import block_columns
from qcompile.kernels.triton.target import Target


@dataclass(frozen=True)
class Config:
    """How one launch is made.

    way: see the module's docstring. bn: rows of W a program. bm: rows of x (gemm). bb: blocks of W at a time (gemv). bk:
    columns at a time (quantized x quantized).
    parts: steps in which a block is taken (gemm).
    waves: programs a processor that splitting K aims at. warps, stages: Triton's.
    """

    way: Literal["gemv", "gemm", "dense"]
    bn: int = 0
    bm: int = 0
    bb: int = 0
    bk: int = 0
    parts: int = 1
    waves: int = 2
    warps: int = 4
    stages: int = 3


_GEMV = Config("gemv", bn=2, bb=8, waves=32, warps=1, stages=2)
_GEMV_CDNA = Config("gemv", bn=4, bb=16, waves=16, warps=1, stages=2)
_DENSE = Config("dense")

#: Up to this many rows of x the CUDA C++ kernel (``kernels/cuda``) takes what it can, on NVIDIA GPUs that have a compiler:
#: 4 and 8 bits, float16 and bfloat16, groups of a multiple of 32.
CUDA_ROWS = 8

#: Tiles of W that go through all of x together, so that both stay in the L2 cache.
PANEL = 8

#: family -> rows of (largest M, configuration); the first row that M fits is taken. 0 stands for any M.
TABLE: dict[str, tuple[tuple[int, Config], ...]] = {
    "ampere": (
        (2, _GEMV),
        (16, Config("gemm", bn=64, bm=16, waves=4, warps=4, stages=4)),
        (32, Config("gemm", bn=64, bm=32, waves=3, warps=4, stages=4)),
        (1024, Config("gemm", bn=128, bm=64, waves=2, warps=8, stages=3)),
        (0, _DENSE),
    ),
    "ada": (
        (2, _GEMV),
        (16, Config("gemm", bn=64, bm=16, waves=4, warps=4, stages=4)),
        (32, Config("gemm", bn=64, bm=32, waves=3, warps=4, stages=4)),
        (64, Config("gemm", bn=64, bm=64, waves=2, warps=4, stages=3)),
        (1024, Config("gemm", bn=128, bm=128, waves=1, warps=8, stages=2)),
        (0, _DENSE),
    ),
    "hopper": (
        (2, _GEMV),
        (16, Config("gemm", bn=64, bm=16, waves=4, warps=4, stages=4)),
        (32, Config("gemm", bn=64, bm=32, waves=3, warps=4, stages=4)),
        (64, Config("gemm", bn=128, bm=64, waves=2, warps=8, stages=3)),
        (1536, Config("gemm", bn=128, bm=128, waves=1, warps=8, stages=3)),
        (0, _DENSE),
    ),
    # A tile of 128 x 128 wants more than the 512 columns of tensor memory, and compiles to a trap.
    "blackwell": (
        (2, _GEMV),
        (16, Config("gemm", bn=64, bm=16, waves=4, warps=4, stages=4)),
        (32, Config("gemm", bn=64, bm=32, waves=3, warps=4, stages=4)),
        (1536, Config("gemm", bn=128, bm=64, waves=2, warps=4, stages=3)),
        (0, _DENSE),
    ),
    "cdna": (
        (2, _GEMV_CDNA),
        (16, Config("gemm", bn=64, bm=16, waves=4, warps=4, stages=2)),
        (32, Config("gemm", bn=64, bm=32, waves=3, warps=4, stages=2)),
        (64, Config("gemm", bn=64, bm=64, waves=2, warps=4, stages=2)),
        (1024, Config("gemm", bn=128, bm=128, waves=1, warps=4, stages=2)),
        (0, _DENSE),
    ),
}


#: Where the wide blocks of codes of these bits are taken in parts of 128 columns, for more than 32 rows of x: a tile of more
#: rows is worth reading the words again. (On Blackwell a whole block's weights would not fit tensor memory.)
IN_PARTS: dict[str, tuple[int, ...]] = {"hopper": (3,), "blackwell": (2, 3), "cdna": (2, 3)}


@functools.lru_cache(maxsize=4096)
def choose(target: Target, rows: int, n: int, cols: int, bits: int, float32: bool) -> tuple[Config, int]:
    """The configuration for ``rows`` rows of x and a weight ``[n, cols]``, and among how many programs K is split."""
    config = next(c for most, c in TABLE[target.family] if most == 0 or rows <= most)
    if config.way == "dense":
        return config, 1
    if config.way == "gemv" and (float32 or bits == 3 or rows == 2):
        config = dataclasses.replace(config, bn=2)  # else more than the registers hold for two waves
    if config.way == "gemm" and float32 and config.bm > 16:
        # three products for one, of operands twice as wide, and all of them in registers
        config = dataclasses.replace(config, bn=64, bm=32, warps=4, stages=2)
    if config.way == "gemm":
        config = _fit(_in_parts(config, target, bits), *_x_buffers(target, bits, float32))
    tiles = -(-n // config.bn) * (-(-rows // config.bm) if config.way == "gemm" else 1)
    blocks = -(-cols // block_columns(bits))
    steps = -(-blocks // config.bb) if config.way == "gemv" else blocks
    # each part still has a few steps to overlap
    most = max(1, steps // (1 if config.way == "gemv" else 4))
    split = 1
    while split * 2 <= most and split < 16 and tiles * split < config.waves * target.processors:
        split *= 2
    return config, split


def _in_parts(config: Config, target: Target, bits: int) -> Config:
    """A configuration that takes wide blocks in parts, where that is worth it."""
    wide = config.bm > 32 and bits in IN_PARTS.get(target.family, ())
    return dataclasses.replace(config, parts=block_columns(bits) // 128 if wide else 1)


def _fit(config: Config, width: int, limit: int) -> Config:
    """A configuration whose buffers of x (``stages - 1`` of ``bm`` rows, ``width`` bytes a block) take ``limit`` at most.

    A block of W is 64 to 512 columns, by its bits: where it is wide, fewer rows of x, or fewer buffers, fit.
    """
    bm, stages, width = config.bm, config.stages, width // config.parts
    while bm * width * (stages - 1) > limit:
        if stages > 2:
            stages -= 1
        else:
            bm //= 2
    return config if (bm, stages) == (config.bm, config.stages) else dataclasses.replace(config, bm=bm, stages=stages)


def neighbours(target: Target, config: Config, bits: int, float32: bool) -> tuple[Config, ...]:
    """What autotuning tries besides ``config``, which the table gave: few, so that it takes seconds."""
    if config.way == "gemv":
        other = functools.partial(dataclasses.replace, config)
        return other(bn=2 * config.bn), other(bb=2 * config.bb), other(bb=config.bb // 2)
    deeper = dataclasses.replace(config, stages=config.stages + 1)
    tried = [_fit(c, *_x_buffers(target, bits, float32)) for c in (*smaller(config), deeper)]
    return tuple(c for c in dict.fromkeys(tried) if c != config)


def smaller(config: Config) -> tuple[Config, ...]:
    """What takes no more room than ``config``, a tile on tensor cores: half of it, other warps, fewer stages."""
    other = functools.partial(dataclasses.replace, config)
    tried = (other(bn=config.bn // 2), other(warps=12 - config.warps), other(stages=2))
    return tuple(c for c in tried if c != config)


def words(target: Target, bits: int, kind: str) -> tuple[bool, int]:
    """Whether a GEMV reads codes two by two, and the constant that it takes as an argument, which keeps it in a register.

    That is the mask of ``byte_f32``, or the bits of 2 ** 23 for ``code_f32``.
    """
    if kind == "int" and target.hip:
        return True, 0x01010101 * ((1 << (2 if bits == 3 else bits)) - 1) if bits < 8 else 0
    return kind.startswith("finite"), 150 << 23


def most_rows(target: Target) -> int:
    """Up to how many rows of x a weight is decoded in registers."""
    return max(most for most, config in TABLE[target.family] if config.way != "dense")


def _x_buffers(target: Target, bits: int, float32: bool) -> tuple[int, int]:
    """Bytes of a row of x that go with a block of W, and of all buffers of x together."""
    return block_columns(bits) * (4 if float32 else 2), (48 if target.hip else 80) << 10


def grouped(target: Target, rows: int, experts: int, bits: int, float32: bool) -> Config:
    """The configuration of a grouped product: that of the rows which an expert gets on average, tensor cores throughout."""
    each = max(3, min(512, -(-rows // max(1, experts))))
    return choose(target, each, 1 << 20, 1 << 12, bits, float32)[0]


#: Of int8 x int8 and float8 x float8: as TABLE.
QUANTIZED: dict[str, tuple[tuple[int, Config], ...]] = {
    "ampere": (
        (16, Config("gemm", bn=64, bm=16, bk=128, waves=4, warps=4, stages=4)),
        (64, Config("gemm", bn=64, bm=64, bk=128, waves=2, warps=4, stages=3)),
        (0, Config("gemm", bn=128, bm=128, bk=64, waves=1, warps=8, stages=3)),
    ),
    "hopper": (
        (16, Config("gemm", bn=64, bm=16, bk=128, waves=4, warps=4, stages=4)),
        (64, Config("gemm", bn=128, bm=64, bk=128, waves=2, warps=4, stages=4)),
        (0, Config("gemm", bn=128, bm=128, bk=128, waves=1, warps=8, stages=3)),
    ),
    "cdna": (
        (16, Config("gemm", bn=64, bm=16, bk=128, waves=4, warps=4, stages=2)),
        (64, Config("gemm", bn=64, bm=64, bk=128, waves=2, warps=4, stages=2)),
        (0, Config("gemm", bn=128, bm=128, bk=64, waves=1, warps=8, stages=2)),
    ),
}
QUANTIZED |= {"ada": QUANTIZED["ampere"], "blackwell": QUANTIZED["hopper"]}

#: The smallest group of columns, a multiple of 32, whose sums of products of codes are worth scaling by themselves, at two
#: or three instructions each: with smaller ones the product in float16 costs less, by the loops in ``docs/gpu_report.md``.
CODES_GROUP: dict[str, int] = {"ampere": 32, "ada": 32, "hopper": 64, "blackwell": 64, "cdna": 64}


@functools.lru_cache(maxsize=4096)
def quantized(target: Target, rows: int, n: int, cols: int, native: bool, group: int = 0) -> tuple[Config, int, int]:
    """The configuration of a product of codes, among how many programs K is split, and products of depth bk in a step.

    native: tensor cores multiply the codes themselves; otherwise they are decoded to float16, and the tile is halved.
    group: columns that share a scale, a multiple of 32; 0 = a whole row.
    """
    config = next(c for most, c in QUANTIZED[target.family] if most == 0 or rows <= most)
    if not native:
        config = dataclasses.replace(config, bk=64, stages=min(config.stages, 3))
    runs = 1
    if group:
        depth = config.bk
        while group % depth:
            depth //= 2
        config, runs = dataclasses.replace(config, bk=depth), config.bk // depth
    tiles = -(-n // config.bn) * -(-rows // config.bm)
    most = max(1, -(-cols // (config.bk * runs)) // 4)
    split = 1
    while split * 2 <= most and split < 16 and tiles * split < config.waves * target.processors:
        split *= 2
    return config, split, runs
