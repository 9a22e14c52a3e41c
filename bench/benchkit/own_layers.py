"""Our quantized linear as compiled models have it: programs of several of them on one input, each run as one call."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["linears"]

_PROGRAM = 32  # layers; of a model of 30 blocks one has more


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
    from qcompile.passes.constant_store import places

    n = weights[0][0].shape[0]
    first = pack(*weights[0], None, bits, group)
    shapes = [t.to("meta") for t in (first.codes, first.scale)]
    memory = list(places(shapes * len(weights)))
    for i, (codes, scale) in enumerate(weights):
        packed = pack(codes, scale, None, bits, group)
        memory[2 * i].copy_(packed.codes)
        memory[2 * i + 1].copy_(packed.scale)
    store = torch.empty(0, dtype=torch.uint8).set_(memory[0].untyped_storage())
    begins = [t.data_ptr() - store.data_ptr() for t in memory[: 2 * _PROGRAM]]
    own = len(store) // len(weights)

    def bind(x: Tensor, per_row: bool = False, x_scale: Tensor | None = None) -> tuple[Callable[[], object], int]:
        layers = len(weights) if len(x) <= 64 else min(2, len(weights))
        given = []
        for first in range(0, layers, _PROGRAM):
            count = min(_PROGRAM, layers - first)
            text = _program(x, shapes, begins[: 2 * count], count * own, bits, group, n, per_row, x_scale is not None)
            given.append(([x, *([] if x_scale is None else [x_scale]), store[first * own : (first + count) * own]], text))
        run = torch.ops.qcompile.sequence.default

        def turn() -> Tensor:
            for inputs, text in given:
                (y,) = run(inputs, text)
            return y

        return turn, layers

    return bind, sum(t.nbytes for t in shapes)


def _program(
    x: Tensor, shapes: Sequence[Tensor], begins: Sequence[int], size: int, bits: int, group: int, n: int, per_row: bool,
    static: bool,
) -> str:  # fmt: skip
    """The text of linears whose codes and scales begin there in a store of ``size`` bytes, chained where the compiler chains
    them: where rows are few and rounded by blocks."""
    from qcompile.kernels.ops.linear_chain import MOST_ROWS, MOST_STAGES, Stage
    from qcompile.kernels.ops.sequence import Kind, Writer

    scalar = [Kind(torch.float32, (), ())] if static else []
    write = Writer(0, [Kind.of(x), *scalar, Kind(torch.uint8, (size,), (1,))])
    parts = [write.view(1 + len(scalar), at, Kind.of(shapes[i % 2])) for i, at in enumerate(begins)]
    out = Kind(x.dtype, (len(x), n), (n, 1))
    pairs = list(zip(parts[::2], parts[1::2], strict=True))
    chained = len(x) <= MOST_ROWS and not (per_row or static)
    width = MOST_STAGES if chained else 1
    for few in (pairs[i : i + width] for i in range(0, len(pairs), width)):
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
