"""qcompile::conv_tiled and conv_depthwise on every instruction set of the machine, and their references, against float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from conv_cases import DENSE, DEPTHWISE, SCHEMES, Case, packed
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import data, opcheck
from torch import Tensor

from qcompile.kernels import QTensor, Scheme
from qcompile.kernels.dispatch import Kernel, kernels
from qcompile.kernels.layouts.conv import choose_order, columns, packed_columns

QUANTIZED, EXACT = 2.3e-2, 1e-5


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_any_shape(isa: str, scheme: Scheme) -> None:
    for case in DENSE:
        conv = packed(case, scheme)
        for batch in (0, 1, 3):
            x, bias = data(batch, case.channels, *case.size, seed=batch), torch.randn(case.out)
            expected = conv.expected(x, bias)
            for exact, bound in ((False, QUANTIZED), (True, EXACT)):
                y = conv.call(x, bias, exact=exact)
                assert y.shape == expected.shape
                if batch:
                    assert conv.error(y, expected, x) <= bound, (case, exact)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_depthwise_shapes(isa: str, scheme: Scheme) -> None:
    for case in DEPTHWISE:
        conv = packed(case, scheme, depthwise=True)
        for batch in (0, 2):
            x, bias = data(batch, case.channels, *case.size), torch.randn(case.out)
            y, expected = conv.call(x, bias), conv.expected(x, bias)
            assert y.shape == expected.shape
            if batch:
                assert conv.error(y, expected, x) <= EXACT, case


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_references(scheme: Scheme) -> None:
    for depthwise, cases in ((False, DENSE), (True, DEPTHWISE)):
        for case in cases:
            conv = packed(case, scheme, depthwise=depthwise, reference=True)
            x, bias = data(2, case.channels, *case.size), torch.randn(case.out)
            assert conv.error(conv.call(x, bias), conv.expected(x, bias), x) <= EXACT, case


@pytest.mark.parametrize("depthwise", [False, True])
def test_results_lie_channels_last_whatever_the_strides_of_x(isa: str, depthwise: bool) -> None:
    case = Case(40, (9, 7), 40, (3, 3), before=(1, 1), groups=40 if depthwise else 1)
    for scheme in (SCHEMES[0], SCHEMES[3]):
        conv = packed(case, scheme, depthwise=depthwise)
        x = data(2, 40, 9, 7)
        first = conv.call(x)
        assert first.is_contiguous(memory_format=torch.channels_last)
        wide = torch.cat([x, x], dim=1)[:, :40]
        for same in (x.contiguous(memory_format=torch.channels_last), wide, x.transpose(2, 3).contiguous().transpose(2, 3)):
            assert torch.equal(conv.call(same), first)
        add = data(2, 40, 9, 7, seed=1)
        last = add.contiguous(memory_format=torch.channels_last)
        assert torch.equal(conv.call(x, add=add), conv.call(x, add=last))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("depthwise", [False, True])
def test_dtypes_and_epilogues(isa: str, depthwise: bool, dtype: torch.dtype) -> None:
    bound = {torch.float32: EXACT, torch.float16: 1e-3, torch.bfloat16: 6e-3}[dtype]
    acts: dict[str, Callable[[Tensor], Tensor]] = {
        "none": lambda v: v,
        "relu": torch.relu,
        "relu6": torch.nn.functional.relu6,
        "silu": torch.nn.functional.silu,
        "hardswish": torch.nn.functional.hardswish,
        "hardsigmoid": torch.nn.functional.hardsigmoid,
    }
    for channels in (24, 35):
        case = Case(channels, (6, 5), channels, (3, 3), before=(1, 1), groups=channels if depthwise else 1)
        for scheme in SCHEMES[:2]:
            conv = packed(case, scheme, depthwise=depthwise)
            x = (data(2, channels, 6, 5) / 30).to(dtype)
            for bias in (None, torch.randn(channels), torch.randn(channels).to(dtype)):
                pre = conv.expected(x, bias)
                add = torch.randn(pre.shape).to(dtype)
                for name, act in acts.items():
                    for after in ("none", "relu"):
                        y = conv.call(x, bias, activation=name, exact=True)
                        assert conv.error(y, act(pre), x) <= bound
                        y = conv.call(x, bias, activation=name, add=add, after=after, exact=True)
                        limit = bound if dtype == torch.float32 else bound + 2e-3
                        assert conv.error(y, acts[after](act(pre) + add.double()), x) <= limit


@pytest.mark.parametrize("depthwise", [False, True])
def test_the_same_result_on_any_number_of_threads(isa: str, depthwise: bool) -> None:
    for size in (5, 30):
        case = Case(64, (size, size), 64, (3, 3), before=(1, 1), groups=64 if depthwise else 1)
        conv, x = packed(case, SCHEMES[0], depthwise=depthwise), data(1, 64, size, size)
        one = conv.call(x)
        for threads in (2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(conv.call(x), one)
        torch.set_num_threads(1)


def test_what_is_not_finite_shows_where_the_kernel_sees_it(isa: str) -> None:
    case = Case(32, (8, 8), 16, (3, 3), before=(1, 1))
    for scheme in SCHEMES[:2]:
        conv, x = packed(case, scheme), torch.randn(1, 32, 8, 8)
        x[0, 5, 2, 2] = float("inf")
        bad = ~torch.isfinite(conv.call(x)).all(dim=1)[0]
        seen = torch.zeros(8, 8, dtype=torch.bool)
        seen[1:4, 1:4] = True
        assert torch.equal(bad, seen)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_packing_can_be_undone(draw: st.DataObject) -> None:
    number = lambda low, high: draw.draw(st.integers(low, high))  # noqa: E731
    depthwise = draw.draw(st.booleans())
    groups = number(1, 3)
    kernel = [number(1, 3) for _ in range(number(1, 2))]
    shape = [number(1, 40), 1, *kernel] if depthwise else [groups * number(8, 20), number(1, 70), *kernel]
    groups = shape[0] if depthwise else groups
    scheme = draw.draw(st.sampled_from(SCHEMES))
    (found,) = [k for k in kernels("conv", "cpu") if k.name == ("cpu-depthwise" if depthwise else "cpu-conv")]
    value = QTensor.quantize(torch.randn(shape).flatten(1), scheme)
    made = found.pack(value, [*shape, groups], False)
    assert found.unpack is not None
    back = found.unpack(made, scheme, value.shape, [*shape, groups], False)
    for one, other in ((back.data, value.data), (back.scale, value.scale), (back.zero, value.zero)):
        assert (one is None) == (other is None)
        assert one is None or other is None or (torch.equal(one, other) and one.dtype == other.dtype)


@given(st.integers(1, 200), st.integers(1, 9), st.sampled_from([0, 32, 48, 64, 288, 576]))
@settings(max_examples=100, deadline=None)
def test_every_column_has_a_place_of_its_own(channels: int, positions: int, group: int) -> None:
    shape = [16, channels, positions]
    order = choose_order(shape, group)
    places = columns(shape, order, group)
    assert len(set(places.tolist())) == channels * positions
    assert int(places.max()) < packed_columns(shape, order)


@pytest.mark.parametrize("depthwise", [False, True])
def test_opcheck_and_gradients(depthwise: bool) -> None:
    case = Case(24, (5, 6), 24, (3, 3), (2, 1), (1, 0), (0, 1), groups=24 if depthwise else 1)
    conv = packed(case, SCHEMES[0], depthwise=depthwise)
    seen: list[Sequence[Any]] = []
    spy = Kernel(**{**conv.kernel.__dict__, "target": lambda *a: seen.append(a) or conv.kernel.target(*a)})
    made = spy.pack(conv.value, [*case.shape, case.groups], False)
    stride, padding, dilation = case.window
    logical = {
        "x": data(2, 24, 5, 6).requires_grad_(), "bias": torch.randn(24, requires_grad=True), "weight_shape": case.shape,
        "stride": stride, "padding": padding[:2], "dilation": dilation, "groups": case.groups, "activation": "silu",
        "add": None, "after": "none", "pad": (0, 1), "exact": True,
    }  # fmt: skip
    arguments = spy.arguments(made.tensors, made.sizes, logical)
    opcheck(conv.kernel.target, arguments)
    y = conv.kernel.target(*arguments)
    x, bias = (logical[k] for k in ("x", "bias"))
    edged = torch.constant_pad_nd(x.double(), (0, 1))
    again = torch.convolution(
        edged, conv.weight, bias.double(), stride, padding[:2], dilation, False, [0, 0], case.groups
    )  # fmt: skip
    weights = torch.randn(y.shape)
    got = torch.autograd.grad((y * weights).sum(), [x, bias])
    want = torch.autograd.grad((torch.nn.functional.silu(again) * weights).sum(), [x, bias])
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b.to(a.dtype), rtol=1e-4, atol=1e-4)


def test_wrong_arguments_are_said() -> None:
    conv = packed(Case(32, (5, 5), 16, (3, 3)), SCHEMES[0])
    x = torch.randn(1, 32, 5, 5)
    for bad, options in (
        (torch.randn(1, 31, 5, 5), {}),
        (torch.randn(32, 5, 5), {}),
        (x[..., :2], {}),
        (x.long(), {}),
        (x, {"activation": "swish"}),
        (x, {"add": torch.randn(1, 16, 3, 2)}),
        (x, {"bias": torch.randn(15)}),
        (x, {"stride": [0, 1]}),
    ):
        for call in (conv.call, packed(conv.case, SCHEMES[0], reference=True).call):
            with pytest.raises((ValueError, RuntimeError), match="conv_tiled"):
                call(bad, **options)
