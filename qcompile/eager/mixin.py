"""What makes a module a quantized one, whatever its class: it reads its weights through codes.

A quantized module is the same object as before, of a subclass of its class. Its parameters keep their names and their float
values until :func:`qcompile.freeze`; within its forward ``self.weight`` is what the codes give back.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from qcompile.eager.arrangement import Arrangement
from qcompile.eager.weight import CHILD, PARTS, QWeight
from qcompile.kernels.dtypes import QType
from qcompile.kernels.measured import measured
from qcompile.kernels.qparams import CLIPS
from qcompile.kernels.qtensor import QTensor
from qcompile.kernels.scheme import Scheme

if TYPE_CHECKING:
    from qcompile.eager.optimizers import Optimizer

__all__ = ["Plan", "QModuleMixin", "State"]

_running = threading.local()

#: The buffers of a module whose activations are quantized.
SCALES = ("input_scale", "output_scale")


@dataclass(frozen=True)
class Plan:
    """How one parameter is quantized.

    Attributes:
        scheme: of its matrix.
        arrangement: how the matrix is made.
        optimizer: how scale and zero point are found: a name, or an object with ``qparams(matrix, scheme)``.
    """

    scheme: Scheme
    arrangement: Arrangement
    optimizer: str | Optimizer = "max"
    #: The scheme as text, written once: a tracer cannot follow how it is made.
    text: str = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "text", str(self.scheme))

    def quantize(self, parameter: Tensor) -> QTensor:
        """The parameter's matrix in codes.

        Raises:
            ValueError: NaN or infinity in the parameter.
        """
        return QTensor.quantize(self.arrangement.matrix(parameter.detach()), self.scheme, self.optimizer)  # type: ignore[arg-type]

    def measured(self, parameter: Tensor) -> tuple[QTensor, float]:
        """The parameter's matrix in codes, and their relative error.

        Raises:
            ValueError: NaN or infinity in the parameter.
        """
        return measured(self.arrangement.matrix(parameter.detach()), self.scheme, self.optimizer)  # type: ignore[arg-type]

    def fake_quantize(self, parameter: Tensor) -> Tensor:
        """The parameter as its codes give it back, with straight-through gradients."""
        matrix = self.arrangement.matrix(parameter)
        if isinstance(self.optimizer, str) and self.optimizer in CLIPS:
            rounded = torch.ops.qcompile.fake_quantize_weight(matrix, self.text, self.optimizer)
        else:
            rounded = StraightThrough.apply(matrix, self.quantize(parameter).dequantize(parameter.dtype))
        return self.arrangement.parameter(rounded)


class StraightThrough(torch.autograd.Function):
    """The second argument, with the gradient going to the first."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rounded: Tensor) -> Tensor:
        return rounded.view_as(rounded)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad, None


@dataclass
class State:
    """What a quantized module knows.

    Attributes:
        plans: of its weights, by parameter name.
        activations: the dtype of its input and output, or None.
        reads, gives: whether its input, and its output, are activations that are quantized.
        static_input, static_output: whether calibration gave them a scale; an input without one is quantized token by token,
            an output without one is left alone.
    """

    plans: dict[str, Plan] = field(default_factory=dict)
    activations: QType | None = None
    reads: bool = False
    gives: bool = False
    static_input: bool = False
    static_output: bool = False


class QModuleMixin(nn.Module):
    """The quantized half of a quantized module's class, to be put before the module's own class.

    A class of your own, for modules that need more than reading their weights through codes::

        @qcompile.register_qmodule(MyLayer)
        class QMyLayer(qcompile.QModuleMixin, MyLayer):
            def qforward(self, x):
                return my_product(x, self.weight)

    A class that derives from a quantized one (from ``QLinear``, say) goes on with ``super().qforward``.

    Attributes:
        q: plans and activation dtype, see :class:`State`.
        input_scale, output_scale: float32 scalars, where activations are quantized; 1 until they are calibrated.
    """

    q: State
    input_scale: Tensor
    output_scale: Tensor

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        own = cls.__dict__.get("forward")
        if getattr(own, "reads_codes", False):
            return
        if own is not None:
            # A forward written for this class is what runs between quantizing the input and the output.
            cls.qforward = own  # type: ignore[method-assign]
        inherited = any(issubclass(c, QModuleMixin) and "forward" in c.__dict__ for c in cls.__mro__)
        if "qforward" in cls.__dict__ or not inherited:
            # Not inherited from here, so that super().forward in such a class is the module's own.
            cls.forward = QModuleMixin.run_quantized

    def run_quantized(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward, on quantized weights; input and output quantized where activations are."""
        q = self.q
        if q.activations is None:
            return self._with_codes(args, kwargs)
        calibration = None if torch.compiler.is_compiling() else active_calibration()
        if calibration is not None:
            return calibration.observe(self, args, kwargs)
        if q.reads:
            args, kwargs = self._quantize_first(args, kwargs)
        out = self._with_codes(args, kwargs)
        if q.gives and q.static_output:
            out = tree_map_only(Tensor, self.quantize_output, out)
        return out

    def qforward(self, *args: Any, **kwargs: Any) -> Any:
        """What runs on quantized weights: the forward of the module's own class, unless a subclass says otherwise."""
        return super().forward(*args, **kwargs)

    def quantize_input(self, x: Tensor) -> Tensor:
        """``x`` rounded to the activation dtype: with the calibrated scale, else with one scale a token."""
        if self.q.activations is None or not x.is_floating_point():
            return x
        if self.q.static_input:
            return self._rounded(x, "input_scale", self.q.activations)
        return torch.ops.qcompile.fake_quantize_dynamic(x, self.q.activations.name)

    def quantize_output(self, x: Tensor) -> Tensor:
        """``x`` rounded to the activation dtype with the calibrated scale; as it is where there is none."""
        if self.q.activations is None or not self.q.static_output or not x.is_floating_point():
            return x
        return self._rounded(x, "output_scale", self.q.activations)

    def _rounded(self, x: Tensor, name: str, qtype: QType) -> Tensor:
        scale = getattr(self, name)
        if scale.requires_grad:
            from qcompile.eager.learned import learned

            scale = learned(scale, x, qtype.qmax)
        return torch.ops.qcompile.fake_quantize(x, scale, qtype.name)

    @property
    def qweight(self) -> Tensor:
        """The quantized value of ``weight``, frozen or not."""
        with _reading_codes():
            return self._weight("weight")

    @property
    def frozen(self) -> bool:
        """Whether all its weights are held as codes."""
        return all(isinstance(self._modules.get(CHILD + name), QWeight) for name in self.q.plans)

    def freeze(self) -> None:
        """Hold the codes of each weight in the place of its float values; see :func:`qcompile.freeze`."""
        from qcompile.eager.freezing import freeze

        freeze(self)

    def disable_output_quantization(self) -> None:
        """Leave the output as it comes out."""
        self.q.static_output = False

    def _weight(self, name: str) -> Any:
        held = self._modules.get(CHILD + name)
        if isinstance(held, QWeight):
            return held.value()
        if name not in self._parameters:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        parameter = self._parameters[name]
        plan = self.q.plans.get(name) if "q" in self.__dict__ else None
        if parameter is None or plan is None or not reads_codes():
            return parameter
        return plan.fake_quantize(parameter)

    def _with_codes(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        if torch.compiler.is_compiling():
            return self.qforward(*args, **kwargs)
        with _reading_codes():
            return self.qforward(*args, **kwargs)

    def _quantize_first(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The first tensor among the arguments, positional ones first, is the layer's input."""
        for i, value in enumerate(args):
            if isinstance(value, Tensor):
                return (*args[:i], self.quantize_input(value), *args[i + 1 :]), kwargs
        for key, value in kwargs.items():
            if isinstance(value, Tensor):
                return args, {**kwargs, key: self.quantize_input(value)}
        return args, kwargs

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QModuleMixin:
        """Casts leave the scales of activations float32."""
        held = {**self._buffers, **self._parameters}
        before = {name: scale.data for name in SCALES if (scale := held.get(name)) is not None}
        super()._apply(fn, recurse)
        for name, scale in before.items():
            after = getattr(self, name)
            if after.dtype != scale.dtype:
                after.data = scale.to(after.device)
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool, missing_keys: list[str],
        unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        """A frozen state dict freezes what it is loaded into."""
        rest = dict(state_dict)
        for name, plan in self.q.plans.items():
            if f"{prefix}{name}.{PARTS[0]}" in rest and isinstance(self._parameters.get(name), Tensor):
                hold_skeleton(self, name, plan)
            held = self._modules.get(CHILD + name)
            if isinstance(held, QWeight):
                held.take(rest, f"{prefix}{name}.", strict, missing_keys, unexpected_keys, error_msgs)
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)

    def extra_repr(self) -> str:
        """The module's own, and what is quantized."""
        q = self.q
        parts = [super().extra_repr()]
        parts += [
            f"{name}: {plan.scheme}"
            for name, plan in q.plans.items()
            if not isinstance(self._modules.get(CHILD + name), QWeight)
        ]
        if q.activations is not None and (q.reads or q.gives):
            kind = "static" if q.static_input or q.static_output else "dynamic"
            parts.append(f"activations: {q.activations} {kind}")
        return ", ".join(p for p in parts if p)


def hold_skeleton(module: nn.Module, name: str, plan: Plan) -> QWeight:
    """Put a frozen weight without values in the place of a float parameter; they come with the state dict."""
    parameter = module._parameters.pop(name)
    if parameter is None:
        raise ValueError(f"parameter {name!r} is None and cannot be quantized")
    empty = QTensor.empty(plan.scheme, plan.arrangement.matrix_shape, "meta")
    held = QWeight(empty, plan.arrangement, parameter.dtype)
    module._modules[CHILD + name] = held
    return held


def weight_property(name: str) -> property:
    """Reads a parameter through its codes."""
    return property(lambda self: self._weight(name), doc=f"``{name}``, as its codes give it back where codes are read.")


def reads_codes() -> bool:
    """Whether a quantized module's forward is running, in which weights are read through their codes."""
    return torch.compiler.is_compiling() or getattr(_running, "depth", 0) > 0


@contextmanager
def _reading_codes() -> Iterator[None]:
    _running.depth = getattr(_running, "depth", 0) + 1
    try:
        yield
    finally:
        _running.depth -= 1


_calibrations = threading.local()


def active_calibration() -> Any:
    """The innermost calibration of this thread, or None."""
    stack = getattr(_calibrations, "stack", None)
    return stack[-1] if stack else None


def calibration_stack() -> list[Any]:
    """The calibrations of this thread, the innermost last."""
    if not hasattr(_calibrations, "stack"):
        _calibrations.stack = []
    return _calibrations.stack
