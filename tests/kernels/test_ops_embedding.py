from __future__ import annotations

import oracle
import pytest
import torch

from qcompile.kernels import QTensor, Scheme

embedding = torch.ops.qcompile.embedding
BY_ROW = [t for t in oracle.SCHEMES if t.split("/")[1] in ("tensor", "channel=0") or "/group" in t]
OTHERS = [t for t in oracle.SCHEMES if t not in BY_ROW]


@pytest.mark.parametrize("text", BY_ROW)
@pytest.mark.parametrize("shape", [(11, 33), (5, 4, 19)])
def test_embedding(text: str, shape: tuple[int, ...]) -> None:
    q = QTensor.quantize(oracle.data(*shape), Scheme.parse(text))
    table = oracle.value(q)
    for indices in (
        torch.tensor([3, 0, 3, shape[0] - 1]),
        torch.tensor([[1, 2], [4, 0]], dtype=torch.int32),
        torch.tensor(2),
        torch.zeros(0, dtype=torch.int64),
        torch.arange(4).reshape(2, 2).t(),
    ):
        for dtype in (torch.float32, torch.bfloat16):
            args = (indices, q.data, q.scale, q.zero, text, list(shape), dtype)
            got = embedding(*args)
            assert got.dtype == dtype
            assert oracle.relative(got, table[indices.numpy()]) < oracle.TOLERANCE[dtype]
        oracle.opcheck(embedding, args)


@pytest.mark.parametrize("index", [-1, 11])
def test_an_index_out_of_range_raises(index: int) -> None:
    q = QTensor.quantize(oracle.data(11, 33), Scheme.parse("qint4/group=16/affine/float16"))
    with pytest.raises(IndexError):
        embedding(torch.tensor([0, index]), q.data, q.scale, q.zero, str(q.scheme), [11, 33], torch.float32)


@pytest.mark.parametrize("text", OTHERS)
def test_rows_that_share_scales_cannot_be_looked_up(text: str) -> None:
    q = QTensor.quantize(oracle.data(11, 33), Scheme.parse(text))
    with pytest.raises(ValueError, match="only where each has its own scale"):
        embedding(torch.tensor([0]), q.data, q.scale, q.zero, text, [11, 33], torch.float32)


def test_wrong_input() -> None:
    q = QTensor.quantize(oracle.data(32), Scheme.parse("qint4/group=16/affine/float16"))
    with pytest.raises(ValueError, match=r"table has shape \[V, D\], got \[32\]"):
        embedding(torch.tensor([0]), q.data, q.scale, q.zero, str(q.scheme), [32], torch.float32)
    q = QTensor.quantize(oracle.data(4, 32), Scheme.parse("qint4/group=16/affine/float16"))
    with pytest.raises(ValueError, match="has data of shape"):
        embedding(torch.tensor([0]), q.data, q.scale, q.zero, str(q.scheme), [5, 32], torch.float32)
    with pytest.raises(TypeError, match="indices must be an int64 or int32"):
        embedding(torch.tensor([0.0]), q.data, q.scale, q.zero, str(q.scheme), [4, 32], torch.float32)
