"""Rows of a gate and of up in one tile, so that their product never leaves the registers.

The rows of a tile come in runs: a run of rows of the gate, then as many rows of up that belong to them. A run is the 8 rows
that a tensor core's result has in one lane's reach: row r and row r + 8 of a tile of 16 are registers of the same thread.
"""

import triton
import triton.language as tl


@triton.jit
def paired_rows(first, N, ROWS: tl.constexpr):
    """The ``ROWS`` rows of W, int64, for ``ROWS / 2`` results from ``first`` on; all exist. Up begins at row ``N``."""
    RUN: tl.constexpr = 8 if ROWS >= 16 else ROWS // 2
    place = tl.arange(0, ROWS)
    result = first + place // (2 * RUN) * RUN + place % RUN
    return tl.minimum(result, N - 1).to(tl.int64) + place // RUN % 2 * N


@triton.jit
def unpair(values):
    """Gate and up, ``[rows / 2, columns]`` each, out of results ``[rows, columns]`` for :func:`paired_rows`."""
    ROWS: tl.constexpr = values.shape[0]
    RUN: tl.constexpr = 8 if ROWS >= 16 else ROWS // 2
    runs = values.reshape(ROWS // (2 * RUN), 2, RUN, values.shape[1]).permute(0, 2, 3, 1)
    gate, up = tl.split(runs)
    return gate.reshape(ROWS // 2, values.shape[1]), up.reshape(ROWS // 2, values.shape[1])
