"""Our quantized linear as compiled models have it: programs of several of them on one input, each run as one call."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["linears"]

_PROGRAM = 32  # layers; of a model of 30 blocks one has more
_ALIGNED = 256  # bytes, as passes/constant_store.py has it


def linears(
    weights: Sequence[tuple[Tensor, Tensor]], bits: int, group: int
) -> tuple[Callable[..., tuple[Callable[[], object], int]], int]:
    """Pack weights and put them where compiled models keep theirs: together, in memory of large pages.

    Args:
        weights: codes uint8 ``[N, K]`` with zero point ``2 ** (bits - 1)``, and scales float32 ``[N, ceil(K / group)]``.
        bits, group: of the weights; group ``K`` is one scale a row.

    Returns:
        A function from ``x``, float32 ``[M, K]``, and from how activations are rounded if not block by block
        (``per_row=True``, or ``x_scale``, a scalar), to a function that runs all layers once and returns the last one's
        result, and to the number of layers (two where more than 64 rows make the weight's way from memory unimportant).
        And the bytes of a packed weight.
    """
    from qcompile.kernels.layouts.tiled import pack
    from qcompile.kernels.memory import ask_for_large_pages

    n = weights[0][0].shape[0]
    shapes: list[Tensor] = []
    memory, own = torch.empty(0), 0
    for i, (codes, scale) in enumerate(weights):
        packed = pack(codes, scale, None, bits, group)
        if i == 0:
            shapes = [packed.codes, packed.scale]
            own = sum(map(_padded, shapes))
            memory = torch.empty(own * len(weights), dtype=torch.uint8)
            ask_for_large_pages(memory)
        at = i * own
        for t in (packed.codes, packed.scale):
            memory[at : at + t.nbytes] = t.contiguous().view(-1).view(torch.uint8)
            at += _padded(t)

    def bind(x: Tensor, per_row: bool = False, x_scale: Tensor | None = None) -> tuple[Callable[[], object], int]:
        layers = len(weights) if len(x) <= 64 else min(2, len(weights))
        given = []
        for first in range(0, layers, _PROGRAM):
            count = min(_PROGRAM, layers - first)
            store = memory[first * own : (first + count) * own]
            text = _program(x, shapes, count, bits, group, n, per_row, x_scale is not None)
            given.append(([x, *([] if x_scale is None else [x_scale]), store], text))
        run = torch.ops.qcompile.sequence.default

        def turn() -> Tensor:
            for inputs, text in given:
                (y,) = run(inputs, text)
            return y

        return turn, layers

    return bind, sum(t.nbytes for t in shapes)


def _padded(t: Tensor) -> int:
    return -(-t.nbytes // _ALIGNED) * _ALIGNED


def _program(
    x: Tensor, shapes: Sequence[Tensor], count: int, bits: int, group: int, n: int, per_row: bool, static: bool
) -> str:
    """The text of ``count`` linears, chained where the compiler chains them: where rows are few and rounded by blocks."""
    from qcompile.kernels.ops.linear_chain import MOST_ROWS, MOST_STAGES, Stage
    from qcompile.kernels.ops.sequence import Kind, Writer

    scalar = [Kind(torch.float32, (), ())] if static else []
    store = 1 + len(scalar)
    write = Writer(0, [Kind.of(x), *scalar, Kind(torch.uint8, (count * sum(map(_padded, shapes)),), (1,))])
    parts, at = [], 0
    for _ in range(count):
        for t in shapes:
            parts.append(write.view(store, at, Kind.of(t)))
            at += _padded(t)
    out = Kind(x.dtype, (len(x), n), (n, 1))
    pairs = list(zip(parts[::2], parts[1::2], strict=True))
    chained = len(x) <= MOST_ROWS and not (per_row or static)
    width = MOST_STAGES if chained else 1
    for few in (pairs[i : i + width] for i in range(0, count, width)):
        if chained:
            stages = [
                Stage(0, -1, -1, False, 2 * i, 2 * i + 1, -1, -1, bits, group, "none", False, -1, (n,)).numbers()
                for i in range(len(few))
            ]
            constants = [number for pair in few for number in pair]
            numbers = [number for stage in stages for number in stage]
            results = list(range(1, 1 + len(few)))
            last = write.step("linear_chain", [[0], constants, numbers, [0.0] * len(few), results], [out] * len(few))[-1]
        else:
            codes, scale = few[0]
            rest = ["none", None, None, False, False, 1 if static else None, per_row]
            last = write.step("linear_tiled", [0, codes, scale, None, None, bits, group, n, *rest], [out])[0]
    return write.text([(last, out)])
