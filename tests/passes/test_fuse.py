"""Each rule that fuses a dequantization into its reader fires where it may, and not where it must not."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from harness import operators
from torch import Tensor, fx

from qcompile.kernels.qtensor import QTensor
from qcompile.kernels.scheme import Scheme
from qcompile.passes.fuse import RULES, Fuse
from qcompile.passes.program import Program
from qcompile.passes.verify import Signature, VerificationError, verify

aten, qc = torch.ops.aten, torch.ops.qcompile
SCHEME = Scheme.parse("qint8/group=16/symmetric/float32")


class Built:
    """A program that is built call by call, with one weight in codes."""

    def __init__(self, weight: tuple[int, ...], dtype: torch.dtype = torch.float32) -> None:
        graph = fx.Graph()
        self.program = Program(fx.GraphModule({}, graph), {}, torch._subclasses.FakeTensorMode())
        self.inputs: list[Tensor] = []
        self.graph = self.program.graph
        self.graph.output(())
        q = QTensor.quantize(torch.randn(weight), SCHEME)
        self.weight = q.dequantize(dtype)
        data, scale = self.program.add_constant("w_data", q.data), self.program.add_constant("w_scale", q.scale)
        self.parts = (data, scale, None, str(SCHEME), list(weight))
        self.dequantized = self.call(qc.dequantize.default, *self.parts, dtype)

    def input(self, tensor: Tensor) -> fx.Node:
        """An input of the program."""
        with self.graph.inserting_before(next(iter(self.graph.nodes))):
            node = self.graph.placeholder(f"x{len(self.inputs)}")
        node.meta["val"] = self.program.fake_mode.from_tensor(tensor, static_shapes=True)
        self.inputs.insert(0, tensor)
        return node

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Add a call at the end."""
        with self.graph.inserting_before(self.graph.output_node()):
            return self.program.call(target, *args, **kwargs)

    def results(self, *nodes: fx.Node) -> None:
        """Set what the program returns."""
        self.graph.output_node().args = (tuple(nodes),)

    def run(self) -> tuple[Tensor, ...]:
        """What the program returns for its inputs."""
        self.program.recompile()
        held = [c.tensor for c in (self.program.constant(n) for n in self.graph.nodes) if c is not None]
        return self.program.module(*self.inputs, *held)

    @property
    def ops(self) -> Counter[str]:
        """How often each operator stands in the program."""
        return operators(self.program.module)


def _fused(built: Built) -> Counter[str]:
    """Run the pass, check that results stay the same, and return the operators."""
    want, before = built.run(), Signature.of(built.program)
    Fuse().run(built.program)
    verify(built.program, "fuse", before)
    for a, b in zip(built.run(), want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    return built.ops


def _linear(x: Tensor, **options: Any) -> Built:
    built = Built((8, 32), **options)
    built.results(built.call(aten.linear.default, built.input(x), built.dequantized))
    return built


def test_linear() -> None:
    assert _fused(_linear(torch.randn(3, 32))) == {"qcompile.linear": 1}


def test_linear_with_bias() -> None:
    built = Built((8, 32))
    x, bias = built.input(torch.randn(3, 32)), built.input(torch.randn(8))
    built.results(built.call(aten.linear.default, x, built.dequantized, bias))
    assert _fused(built) == {"qcompile.linear": 1}


def test_linear_of_two_inputs_shares_the_codes() -> None:
    built = Built((8, 32))
    ys = [built.call(aten.linear.default, built.input(torch.randn(n, 32)), built.dequantized) for n in (2, 3)]
    built.results(*ys)
    assert _fused(built) == {"qcompile.linear": 2}
    assert set(built.program.constants) == {"c_w_data", "c_w_scale"}


def test_dequantize_that_is_also_a_result_stays() -> None:
    built = Built((8, 32))
    built.results(built.call(aten.linear.default, built.input(torch.randn(3, 32)), built.dequantized), built.dequantized)
    assert _fused(built) == {"qcompile.linear": 1, "qcompile.dequantize": 1}


def test_linear_whose_weight_is_the_input_is_not_fused() -> None:
    built = Built((8, 32))
    built.results(built.call(aten.linear.default, built.dequantized, built.input(torch.randn(5, 32))))
    assert _fused(built) == {"aten.linear": 1, "qcompile.dequantize": 1}


def test_cast_is_folded_into_the_dequantize() -> None:
    built = Built((8, 32))
    cast = built.call(aten.to.dtype, built.dequantized, torch.bfloat16)
    built.results(built.call(aten.linear.default, built.input(torch.randn(3, 32).bfloat16()), cast))
    want = built.run()[0].float()
    Fuse().run(built.program)
    assert built.ops == {"qcompile.linear": 1}
    assert float((built.run()[0].float() - want).norm() / want.norm()) < 0.01


def test_embedding() -> None:
    built = Built((8, 32))
    built.results(built.call(aten.embedding.default, built.dequantized, built.input(torch.tensor([[7, 0], [3, 3]]))))
    assert _fused(built) == {"qcompile.embedding": 1}


def test_index_of_rows() -> None:
    built = Built((4, 8, 32))
    built.results(built.call(aten.index.Tensor, built.dequantized, [built.input(torch.tensor([3, 0, 3]))]))
    assert _fused(built) == {"qcompile.embedding": 1}


def test_index_of_two_axes_is_not_fused() -> None:
    built = Built((8, 32))
    i, j = built.input(torch.tensor([3, 0])), built.input(torch.tensor([1, 31]))
    built.results(built.call(aten.index.Tensor, built.dequantized, [i, j]))
    assert _fused(built) == {"aten.index.Tensor": 1, "qcompile.dequantize": 1}


def test_grouped() -> None:
    built = Built((4, 8, 32))
    transposed = built.call(aten.transpose.int, built.dequantized, 1, 2)
    built.results(built.call(aten.bmm.default, built.input(torch.randn(4, 3, 32)), transposed))
    assert _fused(built) == {"qcompile.grouped_linear": 1}


def test_bmm_with_other_axes_is_not_fused() -> None:
    built = Built((4, 32, 32))
    transposed = built.call(aten.transpose.int, built.dequantized, 0, 1)
    built.results(built.call(aten.bmm.default, built.input(torch.randn(32, 3, 4)), transposed))
    assert _fused(built)["qcompile.grouped_linear"] == 0


def test_grouped_by_offsets() -> None:
    built = Built((4, 8, 32), dtype=torch.bfloat16)
    transposed = built.call(aten.transpose.int, built.dequantized, 1, 2)
    x = built.input(torch.randn(10, 32).bfloat16())
    offsets = built.input(torch.tensor([2, 2, 7, 10], dtype=torch.int32))
    built.results(built.call(aten._grouped_mm.default, x, transposed, offsets))
    want = built.run()[0].float()
    Fuse().run(built.program)
    assert built.ops == {"qcompile.grouped_linear": 1}
    assert float((built.run()[0].float() - want).norm() / want.norm()) < 0.01


def _conv(transposed: bool, groups: int, split: list[int] | None = None) -> Built:
    sizes = [8, 4, 3] if not transposed else [8, 12 // groups, 3]
    rows = 8 if not transposed else 12
    built = Built((rows, sizes[0] * sizes[1] * sizes[2] // rows))
    kernel = built.dequantized
    if transposed:
        kernel = built.call(aten.reshape.default, kernel, split or [groups, 12 // groups, 8 // groups, 3])
        kernel = built.call(aten.transpose.int, kernel, 1, 2)
    kernel = built.call(aten.reshape.default, kernel, sizes)
    x = built.input(torch.randn(2, 8 if transposed else 4 * groups, 9))
    built.results(
        built.call(aten.convolution.default, x, kernel, None, [1], [1], [1], transposed, [0], groups)
    )  # fmt: skip
    return built


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("transposed", [False, True])
def test_convolution(transposed: bool, groups: int) -> None:
    assert _fused(_conv(transposed, groups)) == {"qcompile.conv": 1}


def test_no_rule_takes_an_input_of_another_dtype() -> None:
    # Under autocast a linear in float32 may meet an input in bfloat16; the fused operator would compute in bfloat16.
    built = _linear(torch.randn(3, 32))
    node = built.program.calls(aten.linear.default)[0]
    node.args[0].meta["val"] = built.program.fake_mode.from_tensor(torch.randn(3, 32).bfloat16(), static_shapes=True)
    Fuse().run(built.program)
    assert built.ops == {"aten.linear": 1, "qcompile.dequantize": 1}


def test_every_rule_has_a_test_that_it_fires() -> None:
    assert {rule.name for rule in RULES} == {
        "cast", "linear", "grouped_linear", "grouped_linear_offsets", "conv", "conv_transposed", "embedding", "index",
    }  # fmt: skip


def test_verifier_finds_what_was_not_fused() -> None:
    built = _linear(torch.randn(3, 32))
    with pytest.raises(VerificationError, match=r"after nothing: a dequantization was not fused at .*linear"):
        verify(built.program, "nothing", fused=True)
