"""The engine that applies rules."""

from __future__ import annotations

import pytest
import torch
from harness import operators, program_of
from torch import Tensor, nn

from qcompile.passes.program import Program
from qcompile.passes.rewrite import Rule, rewrite

aten = torch.ops.aten


class Toy(nn.Module):
    def __init__(self, forward: object) -> None:
        super().__init__()
        self.forward_ = forward

    def forward(self, *inputs: Tensor) -> object:
        return self.forward_(*inputs)  # type: ignore[operator]


X = torch.randn(3, 4)


def _program(forward: object, *inputs: Tensor) -> Program:
    return program_of(Toy(forward), *(inputs or (X,)))


RELU_TWICE = Rule("relu-twice", lambda x: aten.relu.default(aten.relu.default(x)), lambda x: aten.relu.default(x))
DOUBLE = Rule("double", lambda x: aten.add.Tensor(x, x), lambda x: aten.mul.Tensor(x, 2))


def test_applies_until_nothing_matches() -> None:
    program = _program(lambda x: x.relu().relu().relu().relu())
    assert rewrite(program, [RELU_TWICE]) == {"relu-twice": 3}
    assert operators(program.module) == {"aten.relu": 1}
    program.recompile()
    assert torch.equal(program.module(X)[0], X.relu())


def test_one_parameter_twice_must_be_one_node() -> None:
    same, other = _program(lambda x, y: x + x, X, X + 1), _program(lambda x, y: x + y, X, X + 1)
    assert rewrite(same, [DOUBLE]) == {"double": 1}
    assert rewrite(other, [DOUBLE]) == {"double": 0}


def test_defaults_are_the_same_given_or_not() -> None:
    rule = Rule("sum", lambda x, y: aten.add.Tensor(x, y, alpha=1), lambda x, y: aten.sub.Tensor(x, y))
    assert rewrite(_program(lambda x: x + x.relu()), [rule]) == {"sum": 1}
    assert rewrite(_program(lambda x: torch.add(x, x.relu(), alpha=2)), [rule]) == {"sum": 0}


def test_a_value_between_that_others_read_is_kept() -> None:
    program = _program(lambda x: (x.relu().relu(), x.relu()))
    assert rewrite(program, [RELU_TWICE]) == {"relu-twice": 1}
    program = _program(lambda x: (lambda y: (y.relu(), y + 1))(x.relu()))
    assert rewrite(program, [RELU_TWICE]) == {"relu-twice": 0}


def test_a_shared_operator_may_be_read_by_others() -> None:
    rule = Rule("relu-twice", RELU_TWICE.pattern, RELU_TWICE.replacement, shared=(aten.relu.default,))
    program = _program(lambda x: (lambda y: (y.relu(), y + 1))(x.relu()))
    assert rewrite(program, [rule]) == {"relu-twice": 1}
    program.recompile()
    first, second = program.module(X)
    assert torch.equal(first, X.relu())
    assert torch.equal(second, X.relu() + 1)


def test_condition() -> None:
    wide = Rule("double", DOUBLE.pattern, DOUBLE.replacement, where=lambda p, n, b: b["x"].meta["val"].shape[-1] > 4)
    assert rewrite(_program(lambda x: x + x), [wide]) == {"double": 0}
    assert rewrite(_program(lambda x: x + x, torch.randn(3, 5)), [wide]) == {"double": 1}


def test_lists_match_by_length() -> None:
    rule = Rule("cat", lambda x, y, d: aten.cat.default([x, y], d), lambda x, y: aten.add.Tensor(x, y))
    assert rewrite(_program(lambda x: torch.cat([x, x, x])), [rule]) == {"cat": 0}


def test_the_first_rule_wins() -> None:
    other = Rule("other", DOUBLE.pattern, lambda x: aten.neg.default(x))
    assert rewrite(_program(lambda x: x + x), [DOUBLE, other]) == {"double": 1, "other": 0}


def test_replacement_knows_where_it_came_from() -> None:
    program = _program(lambda x: x + x)
    (old,) = program.calls(aten.add.Tensor)
    rewrite(program, [DOUBLE])
    (new,) = program.calls(aten.mul.Tensor)
    assert new.meta["stack_trace"] == old.meta["stack_trace"]
    assert new.meta["val"].shape == (3, 4)


def test_unknown_name_in_the_replacement_raises() -> None:
    rule = Rule("bad", lambda x: aten.relu.default(x), lambda y: aten.relu.default(y))
    with pytest.raises(ValueError, match=r"rule bad: the replacement uses \['y'\], which the pattern does not bind"):
        rewrite(_program(lambda x: x.relu()), [rule])


def test_pattern_without_an_operator_raises() -> None:
    with pytest.raises(ValueError, match="a pattern must return the result of one operator call"):
        rewrite(_program(lambda x: x.relu()), [Rule("bad", lambda x: x, lambda x: x)])
