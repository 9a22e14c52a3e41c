"""The verifier finds planted errors, the pipeline runs it where it is asked to, and reports what each pass did."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from harness import program_of
from torch import fx, nn

from qcompile.options import Options
from qcompile.passes.base import Pass
from qcompile.passes.pipeline import PASSES, Result, lowering, quantization, run
from qcompile.passes.program import Program
from qcompile.passes.select import Select
from qcompile.passes.verify import Signature, VerificationError, verify

aten, qc = torch.ops.aten, torch.ops.qcompile
X = torch.randn(3, 32)


def _quantized() -> Program:
    program = program_of(nn.Sequential(nn.Linear(32, 8), nn.ReLU()).requires_grad_(False), X)
    run(Options.parse({"min_elements": 0}).quantization(), program, check=True)
    return program


def _linear(program: Program) -> fx.Node:
    (node,) = program.calls(qc.linear.default)
    return node


def _wrong_shape(program: Program) -> None:
    node = _linear(program)
    node.args = (*node.args[:6], [9, 32], *node.args[7:])


def _wrong_scheme(program: Program) -> None:
    node = _linear(program)
    node.args = (*node.args[:5], "qint4/group=32/affine/float16", *node.args[6:])


def _scale_that_is_no_constant(program: Program) -> None:
    node = _linear(program)
    with program.graph.inserting_before(node):
        scale = program.call(aten.relu.default, node.args[2])
    node.args = (*node.args[:2], scale, *node.args[3:])


def _orphan(program: Program) -> None:
    program.constants["p_nothing"] = next(iter(program.constants.values()))


def _used_before_made(program: Program) -> None:
    _linear(program).append(program.calls(aten.relu.default)[0])
    program.graph.output_node().prev.append(_linear(program))


PLANTED: dict[str, tuple[Callable[[Program], None], str]] = {
    "shape": (_wrong_shape, r"after test: a value of shape \[9, 32\] .* at %linear"),
    "scheme": (_wrong_scheme, r"after test: a value of shape \[8, 32\] in scheme qint4"),
    "computed scale": (_scale_that_is_no_constant, "after test: the scale of a quantized weight is no constant"),
    "orphan": (_orphan, "after test: constant p_nothing has no placeholder"),
    "order": (_used_before_made, "after test: .*used before it has been defined"),
}


@pytest.mark.parametrize("error", PLANTED)
def test_planted_error(error: str) -> None:
    plant, message = PLANTED[error]
    program = _quantized()
    verify(program, "test", fused=True)
    plant(program)
    with pytest.raises(VerificationError, match=message):
        verify(program, "test", fused=True)


def test_another_result() -> None:
    program = _quantized()
    before = Signature.of(program)
    relu = program.calls(aten.relu.default)[0]
    with program.graph.inserting_after(relu):
        other = program.call(aten.to.dtype, relu, torch.bfloat16)
    program.graph.output_node().args = ((other,),)
    message = r"after test: result 0: torch.float32 \[3, 8\] became torch.bfloat16 \[3, 8\]"
    with pytest.raises(VerificationError, match=message):
        verify(program, "test", before)


def test_lost_result_and_lost_input() -> None:
    program = _quantized()
    before = Signature.of(program)
    program.graph.output_node().args = ((),)
    with pytest.raises(VerificationError, match="1 results became 0"):
        verify(program, "test", before)
    program.graph.eliminate_dead_code()
    program.graph.erase_node(next(n for n in program.graph.nodes if n.op == "placeholder" and n.name == "input"))
    with pytest.raises(VerificationError, match=r"inputs \('input',\) became \(\)"):
        verify(program, "test", before)


@dataclass(frozen=True)
class Vandalize(Pass):
    """Makes a program wrong: ``relu(x)`` becomes a sum over it."""

    axis: int = 0

    def run(self, program: Program) -> int:
        node = program.calls(aten.relu.default)[0]
        with program.graph.inserting_after(node):
            new = program.call(aten.sum.dim_IntList, node, [self.axis])
        node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
        return 1


def test_the_pass_at_fault_is_named() -> None:
    with pytest.raises(VerificationError, match=r"after vandalize\{axis=1\}: result 0: .*\[3, 8\] became .*\[3\]"):
        run([Vandalize(axis=1)], _quantized(), check=True)


def test_the_environment_turns_the_verifier_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QCOMPILE_VERIFY", raising=False)
    run([Vandalize()], _quantized())
    monkeypatch.setenv("QCOMPILE_VERIFY", "1")
    with pytest.raises(VerificationError, match="after vandalize: "):
        run([Vandalize()], _quantized())
    run([Vandalize()], _quantized(), check=False)


def test_results_say_what_each_pass_did() -> None:
    program = program_of(nn.Sequential(nn.Linear(32, 8), nn.ReLU(), nn.Linear(8, 8)).requires_grad_(False), X)
    passes = [*quantization(Select(min_elements=0)), *lowering()]
    results = run(passes, program, check=True)
    assert [r.name for r in results] == [str(p) for p in passes]
    assert all(r.seconds >= 0 for r in results)
    matches = {r.name.partition("{")[0]: r.matches for r in results}
    named = ("canonicalize", "select", "quantize-weights", "fuse", "fuse-siblings", "fuse-epilogues", "pack")
    assert [matches[n] for n in named] == [2, 2, 2, 2, 0, 1, 2]


class Listener:
    """Writes down what it hears."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, str]] = []

    def before(self, one: Pass, program: Program) -> None:
        self.heard.append(("before", one.text_name()))

    def after(self, one: Pass, program: Program, result: Result) -> None:
        self.heard.append((f"after {result.matches}", one.text_name()))

    def failed(self, one: Pass, program: Program, error: Exception) -> None:
        self.heard.append((f"failed {type(error).__name__}", one.text_name()))

    def done(self, program: Program) -> None:
        self.heard.append(("done", ""))


def test_observers_are_told_before_and_after() -> None:
    program = program_of(nn.Sequential(nn.Linear(32, 8)).requires_grad_(False), X)
    listener = Listener()
    run(quantization(Select(min_elements=0))[:4], program, listener)
    expected = [("inline-regions", 0), ("unpack", 0), ("canonicalize", 1), ("select", 1)]
    told = [(w, name) for name, n in expected for w in ("before", f"after {n}")]
    assert listener.heard == [*told, ("done", "")]


def test_observers_are_told_of_failures() -> None:
    listener = Listener()
    with pytest.raises(VerificationError):
        run([Vandalize()], _quantized(), listener, check=True)
    assert listener.heard == [("before", "vandalize"), ("failed VerificationError", "vandalize")]


def test_every_pass_in_the_lists_has_a_text_name() -> None:
    for one in (*quantization(Select()), *lowering()):
        assert PASSES[one.text_name()] is type(one)


def test_a_pass_prints_its_options() -> None:
    assert str(Select()) == "select"
    assert str(Select(min_elements=7)) == "select{min_elements=7}"
