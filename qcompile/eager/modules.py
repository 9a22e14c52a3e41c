"""The quantized classes: one for each class of module, made where they are needed, or registered."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from qcompile.eager.convolution import convolution_of
from qcompile.eager.mixin import QModuleMixin, State, active_calibration, weight_property
from qcompile.eager.tensor import WeightTensor
from qcompile.eager.weight import QWeight

__all__ = [
    "QConv1d",
    "QConv2d",
    "QConv3d",
    "QEmbedding",
    "QLayerNorm",
    "QLinear",
    "become",
    "quantized_class",
    "register_qmodule",
]

T = TypeVar("T", bound=type[QModuleMixin])

_classes: dict[type[nn.Module], type[QModuleMixin]] = {}
_lock = threading.Lock()


def register_qmodule(module_class: type[nn.Module]) -> Callable[[T], T]:
    """A decorator: the class that modules of exactly ``module_class`` become when they are quantized.

    Raises:
        TypeError: not a class of modules, or the decorated class is not ``class Q(QModuleMixin, module_class)``.
    """
    if not (isinstance(module_class, type) and issubclass(module_class, nn.Module)):
        raise TypeError(f"register_qmodule takes a class of torch.nn.Module, got {module_class!r}")

    def register(cls: T) -> T:
        if not (issubclass(cls, QModuleMixin) and issubclass(cls, module_class)):
            raise TypeError(
                f"{cls.__name__} must derive from QModuleMixin and {module_class.__name__}: "
                f"class {cls.__name__}(QModuleMixin, {module_class.__name__})"
            )
        _classes[module_class] = cls
        return cls

    return register


def quantized_class(cls: type[nn.Module], names: Iterable[str]) -> type[QModuleMixin]:
    """The class that a module of class ``cls`` becomes, with ``names`` among the parameters read through codes."""
    with _lock:
        made = _classes.get(cls)
        if made is None:
            bases = (QModuleMixin, *((_RecurrentWeights,) if issubclass(cls, nn.RNNBase) else ()), cls)
            made = type(f"Q{cls.__name__}", bases, {"__reduce_ex__": _reduce, "__module__": cls.__module__, "_plain": cls})
            _classes[cls] = made
        for name in names:
            if not isinstance(made.__dict__.get(name), property):
                setattr(made, name, weight_property(name))
        return made


def become(module: nn.Module, state: State) -> QModuleMixin:
    """Turn a module into a quantized one, in place."""
    cls = quantized_class(type(module), state.plans)
    module.__dict__["q"] = state
    module.__class__ = cls
    if state.activations is not None:
        device = next((t.device for t in (*module.parameters(), *module.buffers())), None)
        for name in ("input_scale", "output_scale"):
            if not hasattr(module, name):
                module.register_buffer(name, torch.ones((), dtype=torch.float32, device=device))
    return module  # type: ignore[return-value]


def _reduce(self: Any, protocol: Any) -> Any:
    """Classes made at run time are not found by name: pickle and copy make them again from the class that they extend."""
    own = getattr(self, "__getstate__", None)
    state = self.__dict__ if own is None else own()
    return _new, (type(self)._plain, tuple(self.q.plans)), state


def _new(cls: type[nn.Module], names: tuple[str, ...]) -> nn.Module:
    made = quantized_class(cls, names)
    return made.__new__(made)


class _RecurrentWeights:
    """Recurrent layers hand all their weights to one operator, which takes floats."""

    @property
    def _flat_weights(self: Any) -> list[Tensor | None]:
        weights = [getattr(self, name) if hasattr(self, name) else None for name in self._flat_weights_names]
        return [w.dequantize() if isinstance(w, WeightTensor) else w for w in weights]

    @_flat_weights.setter
    def _flat_weights(self: Any, weights: list[Tensor | None]) -> None:
        """The layer's own list is of no use: what it would hold is looked up each time."""


@register_qmodule(nn.Linear)
class QLinear(QModuleMixin, nn.Linear):
    """``x @ W.T + b``; frozen, it goes straight to the kernel."""

    weight = weight_property("weight")

    def forward(self, input: Tensor) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]``."""
        # Every attribute that a module looks up costs as much as a tenth of a small product: what can be is prepared.
        if torch.compiler.is_compiling():
            # Before anything is prepared: what a traced call leaves behind in a module is a side effect, and a guard.
            return self.run_quantized(input)
        held = self._modules.get("q_weight")
        fast: Any = held.fast if held is not None else None
        q = self.q
        static = False
        if q.activations is not None:
            static = q.static_input and not q.static_output and q.activations.name == "qint8"
            static = static and active_calibration() is None
        if fast is None or (q.activations is not None and not static):
            return self.run_quantized(input)
        bias: Tensor | None = self._parameters["bias"]
        if torch._C._is_any_autocast_enabled():
            input, bias = _autocast(input), None if bias is None else _autocast(bias)
        codes, scale, zero, bits, group_size, rows, columns = fast
        if input.shape[-1] != columns:  # the layout alone does not tell: its last group may be short
            raise _misfit(input, columns)
        if torch.is_grad_enabled() and (input.requires_grad or (bias is not None and bias.requires_grad)):
            if static:
                input = self.quantize_input(input)
            return _linear(input, codes, scale, zero, bias, bits, group_size, rows)
        if static:
            input_scale = self._buffers["input_scale"]
            return _linear_forward(
                input, codes, scale, zero, bias, bits, group_size, rows, "none", None, None, False, False, input_scale
            )
        return _plain_forward(input, codes, scale, zero, bias, bits, group_size, rows)

    forward.reads_codes = True  # type: ignore[attr-defined]

    def qforward(self, input: Tensor) -> Tensor:
        """The product alone."""
        held = self._modules.get("q_weight")
        if not isinstance(held, QWeight) or held.kernel_name != "cpu-tiled":
            return nn.functional.linear(input, self.weight, self.bias)
        bias: Tensor | None = self.bias
        if torch.is_autocast_enabled(input.device.type):
            input, bias = _autocast(input), None if bias is None else _autocast(bias)
        sizes = held.packed().sizes
        if input.shape[-1] != self.in_features:
            raise _misfit(input, self.in_features)
        # The weight's tensors by attribute: that is how a tracer finds out that they are buffers, and what they are called.
        return _linear(
            input, held._codes, held._scale, held._zero, bias, sizes["bits"], sizes["group_size"], self.out_features
        )


def _misfit(x: Tensor, columns: int) -> ValueError:
    return ValueError(f"the layer takes [..., {columns}], got an input of shape {list(x.shape)}")


def _autocast(x: Tensor) -> Tensor:
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


_linear = torch.ops.qcompile.linear_tiled.default
_linear_forward = torch.ops.qcompile.linear_tiled_forward.default._op
_plain_forward = torch.ops.qcompile.linear_tiled_forward.plain._op


class _Convolution(QModuleMixin):
    """A kernel of codes: the CPU's convolutions take it as it is where that pays, else it is decoded."""

    weight = weight_property("weight")

    def forward(self: Any, input: Tensor) -> Tensor:
        """A batch ``[N, in_channels, ...]``, or one image, to as many ``[out_channels, ...]``."""
        if torch.compiler.is_compiling():
            return self.run_quantized(input)
        held = self._modules.get("q_weight")
        if held is None or self.q.activations is not None or torch._C._is_any_autocast_enabled():
            return self.run_quantized(input)
        bias, own = self._parameters["bias"], convolution_of(held, self)
        y = own(input, bias)
        return self._conv_forward(input, own.weight(), bias) if y is None else y

    forward.reads_codes = True  # type: ignore[attr-defined]

    def qforward(self: Any, input: Tensor) -> Tensor:
        """The convolution alone."""
        held = self._modules.get("q_weight")
        return self._conv_forward(input, self.weight if held is None else held.dequantize(), self.bias)


@register_qmodule(nn.Conv1d)
class QConv1d(_Convolution, nn.Conv1d):
    """A convolution whose kernel is held as codes."""


@register_qmodule(nn.Conv2d)
class QConv2d(_Convolution, nn.Conv2d):
    """A convolution whose kernel is held as codes."""


@register_qmodule(nn.Conv3d)
class QConv3d(_Convolution, nn.Conv3d):
    """A convolution whose kernel is held as codes."""


@register_qmodule(nn.Embedding)
class QEmbedding(QModuleMixin, nn.Embedding):  # type: ignore[misc]  # its `freeze` is a name in a signature only
    """A lookup in a table of codes."""

    weight = weight_property("weight")


@register_qmodule(nn.LayerNorm)
class QLayerNorm(QModuleMixin, nn.LayerNorm):
    """A norm whose output is quantized where activations are."""
