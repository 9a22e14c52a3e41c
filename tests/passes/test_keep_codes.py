"""Convolutions hand on int8 codes where all that reads a result rounds it with one scale, and floats where not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import error, program_of, tensors
from torch import Tensor, nn

from qcompile.options import Options
from qcompile.passes.keep_codes import KeepCodes
from qcompile.passes.pack import Pack
from qcompile.passes.pipeline import run
from qcompile.passes.program import Program, normalized

qc = torch.ops.qcompile

#: One value in thousands lies between two codes and is rounded to the other one; what it takes part in moves by a step.
STEP = 2e-2


class Rounded(nn.Module):
    """Convolutions a, b and c (depthwise), of rounded activations, in the order that ``forward`` says."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 1)
        self.c = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.register_buffer("s", torch.tensor(0.021))
        self.register_buffer("t", torch.tensor(0.013))
        self.forward_ = forward

    def round(self, x: Tensor, scale: Tensor | None = None, qtype: str = "qint8") -> Tensor:
        return qc.fake_quantize(x, self.s if scale is None else scale, qtype)

    def forward(self, x: Tensor) -> Any:
        return self.forward_(self, x)


def _packed(forward: Callable[..., Any], inference: bool = True) -> tuple[Program, Callable[[], list[Tensor]], list[Tensor]]:
    """The packed program, how to run it, and the results of the logical one."""
    torch.manual_seed(0)
    x = torch.randn(2, 16, 9, 7)
    program = program_of(Rounded(forward).eval().requires_grad_(False), x)
    run(Options.parse({"min_elements": 0}).quantization(), program, check=True)

    def results() -> list[Tensor]:
        held = [program.constant(n) for n in program.graph.find_nodes(op="placeholder")]
        return tensors(program.module(*(x if c is None else c.tensor for c in held)))

    want = results()
    program.inference = inference
    run([Pack(), KeepCodes()], program, check=True)
    return program, results, want


def _handed_on(program: Program) -> int:
    """Results that are codes, each read as codes of the same scale."""
    count = 0
    for node in program.calls(qc.conv_tiled.default, qc.conv_depthwise.default):
        args = normalized(node)
        if args["out_scale"] is None:
            assert node.meta["val"].dtype == torch.float32
            continue
        count += 1
        assert node.meta["val"].dtype == torch.int8
        for reader in node.users:
            taken = normalized(reader)
            assert taken["x"] is node and taken["x_scale"] is args["out_scale"] and taken["dtype"] == torch.float32
    return count


CODES: dict[str, tuple[Callable[..., Any], int]] = {
    "a chain": (lambda m, x: m.b(m.round(m.c(m.round(m.a(m.round(x)))))), 2),
    "two readers": (lambda m, x: (lambda y: m.b(y) + m.c(y))(m.round(m.a(m.round(x)))), 1),
    "activations": (lambda m, x: m.b(m.round(F.relu6(m.c(m.round(F.silu(m.a(m.round(x)))))))), 0),
}
FLOATS: dict[str, Callable[..., Any]] = {
    "a residual": lambda m, x: (lambda y: m.b(m.round(y)) + y)(m.a(m.round(x))),
    "two scales": lambda m, x: (lambda y: m.b(m.round(y)) + m.c(m.round(y, m.t)))(m.a(m.round(x))),
    "a result": lambda m, x: (lambda y: (m.b(m.round(y)), y))(m.a(m.round(x))),
    "floats read": lambda m, x: m.b(m.round(m.a(x))),
    "another dtype": lambda m, x: m.b(m.round(m.a(m.round(x)), None, "qint4")),
    "written to": lambda m, x: (lambda y: (m.b(m.round(y)), y.add_(1)))(m.a(m.round(x)))[0],
    "by token": lambda m, x: m.b(qc.fake_quantize_dynamic(m.a(m.round(x)), "qint8")),
}


@pytest.mark.parametrize("name", CODES)
def test_codes_are_handed_on(name: str) -> None:
    forward, count = CODES[name]
    program, results, want = _packed(forward)
    assert _handed_on(program) == count
    assert not program.calls(qc.fake_quantize.default) or name == "activations"  # here nothing fuses them
    assert error(results(), want) < STEP


@pytest.mark.parametrize("name", FLOATS)
def test_floats_stay_where_codes_are_not_enough(name: str) -> None:
    program, results, want = _packed(FLOATS[name])
    assert _handed_on(program) == 0
    assert error(results(), want) < 3e-2


def test_gradients_want_floats() -> None:
    program, results, want = _packed(CODES["a chain"][0], inference=False)
    assert _handed_on(program) == 0 and len(program.calls(qc.fake_quantize.default)) == 3
    assert error(results(), want) < 3e-2
