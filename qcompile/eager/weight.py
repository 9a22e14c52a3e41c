"""A frozen weight: codes instead of floats, as a module, so that everything that modules can do works on it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qcompile.eager.arrangement import Arrangement
from qcompile.kernels.dispatch import Kernel, Packed, choose
from qcompile.kernels.qtensor import QTensor
from qcompile.kernels.scheme import PerGroup, Scheme

if TYPE_CHECKING:
    from qcompile.eager.convolution import Convolution

__all__ = ["CHILD", "PARTS", "QWeight", "value_from"]

#: The stored tensors of the logical form, as they are named in a state dict.
PARTS = ("_data", "_scale", "_zero")

#: What the name of a parameter gets in front to be that of its codes' module.
CHILD = "q_"


class QWeight(nn.Module):
    """The weight of a frozen module, held once: packed for the kernel of its device where there is one, else logical.

    It belongs to the module that had the parameter, as ``q_weight`` for ``weight``. ``state_dict`` gives the logical form on
    every device (``weight._data``, ``weight._scale``, ``weight._zero``, see :class:`~qcompile.kernels.qtensor.QTensor`), so
    that a file does not depend on a kernel's layout; loading packs again. It is moved, copied, pickled and shared like any
    module. A cast (``.to(torch.bfloat16)``) changes the dtype that it is computed in, not what is stored.

    Args:
        value: codes, scale and zero point of the weight arranged as a matrix.
        arrangement: how the parameter is made from that matrix.
        dtype: the parameter's dtype.
    """

    _data: Tensor
    _codes: Tensor
    _scale: Tensor
    _zero: Tensor | None
    _tensor: Tensor | None
    _fast: tuple[Any, ...] | None
    #: What :mod:`qcompile.eager.convolution` made of it, by windows.
    convolutions: dict[Any, Convolution]

    def __init__(self, value: QTensor, arrangement: Arrangement, dtype: torch.dtype) -> None:
        super().__init__()
        if value.shape != arrangement.matrix_shape:
            raise ValueError(f"a weight of shape {list(value.shape)} is not arranged as {arrangement}")
        self.scheme, self.arrangement, self.dtype = value.scheme, arrangement, dtype
        self.text = str(value.scheme)
        #: Relative error against the float weight, where that was known.
        self.error: float | None = None
        self._hold(value)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the parameter."""
        return self.arrangement.shape

    @property
    def device(self) -> torch.device:
        """Where the stored tensors are."""
        return next(b for b in self._buffers.values() if b is not None).device

    @property
    def is_packed(self) -> bool:
        """Whether it is in a kernel's layout."""
        return self.sizes is not None

    @property
    def kernel_name(self) -> str | None:
        """The name of the kernel that it is packed for, or None."""
        return self._kernel_name

    @property
    def nbytes(self) -> int:
        """Bytes that the stored tensors take as they are held."""
        return sum(b.numel() * b.element_size() for b in self._buffers.values() if b is not None)

    def logical(self) -> QTensor:
        """Codes, scale and zero point: what is held, or unpacked from it."""
        if self.sizes is None:
            data, scale, zero = (self._buffers.get(name) for name in PARTS)
            return QTensor(data, scale, zero, self.scheme, self.arrangement.matrix_shape)  # type: ignore[arg-type]
        kernel, packed = self.kernel(), self.packed()
        if kernel is None or kernel.unpack is None:
            raise RuntimeError(f"kernel {self._kernel_name!r}, which a weight was packed for, is not registered any more")
        flat = kernel.unpack(packed, self.scheme, _flat(self.arrangement.matrix_shape), None, False)
        return _reshaped(flat, self.arrangement.matrix_shape)

    def kernel(self, operator: str = "linear") -> Kernel | None:
        """The kernel for an operator on the layout that the weight is held in, or None."""
        if self.sizes is None:
            return None
        kernel, _ = choose(operator, self.device.type, self.scheme, _flat(self.arrangement.matrix_shape), self.dtype)
        return kernel if kernel is not None and kernel.name == self._kernel_name else None

    def packed(self) -> Packed:
        """The tensors in the kernel's layout; only where :attr:`is_packed`."""
        if self.sizes is None:
            raise RuntimeError("the weight is held in its logical form")
        return Packed(tuple(self._buffers[name] for name in ("_codes", "_scale", "_zero")), self.sizes)

    def matrix(self) -> Tensor:
        """The float value arranged as a matrix; in a traced program a call of one operator."""
        shape = list(self.arrangement.matrix_shape)
        if self.sizes is None:
            # By attribute: that is how a tracer finds out that these are buffers, and what they are called.
            return torch.ops.qcompile.dequantize(self._data, self._scale, self._zero, self.text, shape, self.dtype)
        if self._decode is not None:
            flat = self._decode((self._codes, self._scale, self._zero), self.sizes, self.dtype)
            return flat if len(shape) == 2 else flat.reshape(shape)
        rows, columns = _flat(shape)
        flat = torch.ops.qcompile.dequantize_tiled(
            self._codes, self._scale, self._zero, self.sizes["bits"], self.sizes["group_size"], rows, columns, self.dtype
        )
        return flat if len(shape) == 2 else flat.reshape(shape)

    def dequantize(self) -> Tensor:
        """The float value in the parameter's shape."""
        return self.arrangement.parameter(self.matrix())

    @property
    def fast(self) -> tuple[Any, ...] | None:
        """The tensors and sizes that ``qcompile::linear_tiled`` takes, looked up once; None where it does not apply."""
        if self._fast is None and self._kernel_name == "cpu-tiled" and self.sizes is not None:
            tensors = (self._buffers[name] for name in ("_codes", "_scale", "_zero"))
            columns = self.arrangement.matrix_shape[-1]
            self._fast = (*tensors, self.sizes["bits"], self.sizes["group_size"], self.sizes["rows"], columns)
        return self._fast

    def value(self) -> Tensor:
        """What ``module.weight`` is: a tensor that quantized operators know, in a traced program the float value."""
        if torch.compiler.is_compiling():
            return self.dequantize()
        if self._tensor is None:
            from qcompile.eager.tensor import WeightTensor

            with torch.inference_mode(False):  # it is kept, for uses that autograd records
                self._tensor = WeightTensor.of(self)
        return self._tensor

    def _forget(self) -> None:
        """What was prepared from tensors that are not held any more."""
        self._tensor, self._fast, self.convolutions = None, None, {}

    def extra_repr(self) -> str:
        where = f"packed for {self._kernel_name}" if self.is_packed else "logical"
        return f"{list(self.shape)}, {self.scheme}, {where}"

    def _hold(self, value: QTensor) -> None:
        self._forget()
        self.sizes: dict[str, int] | None = None
        self._kernel_name: str | None = None
        self._decode: Callable[[Sequence[Any], Mapping[str, int], torch.dtype], Tensor] | None = None
        kernel, self.refused = _kernel_for(value, self.dtype)
        self._buffers.clear()
        if kernel is None:
            for name, part in zip(PARTS, (value.data, value.scale, value.zero), strict=True):
                self.register_buffer(name, part)
            return
        if kernel.prepare is not None:
            kernel.prepare()
        packed = kernel.pack(_reshaped(value, _flat(value.shape)), None, False)
        self.sizes, self._kernel_name, self._decode = dict(packed.sizes), kernel.name, kernel.decode
        for name, part in zip(("_codes", "_scale", "_zero"), packed.tensors, strict=True):
            self.register_buffer(name, part)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QWeight:
        """``fn`` moves bytes; what it does to floats (a cast) is done to the dtype that the weight stands for."""
        probe = fn(torch.empty(0, dtype=self.dtype, device=self.device))
        self.dtype = probe.dtype if probe.dtype.is_floating_point else self.dtype
        self._forget()
        if probe.device.type == self.device.type:
            for name, buffer in self._buffers.items():
                if buffer is not None:
                    self._buffers[name] = _apply_to_bytes(fn, buffer)
            return self
        value = self.logical()
        self._hold(_each(lambda t: _apply_to_bytes(fn, t), value))
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """The logical form, under the name of the parameter."""
        value = self.logical()
        for name, part in zip(PARTS, (value.data, value.scale, value.zero), strict=True):
            if part is not None:
                destination[parameter_prefix(prefix) + name] = part

    def _load_from_state_dict(self, *args: Any) -> None:
        """Nothing: the module that the weight belongs to looks for it under the name of the parameter (:meth:`take`)."""

    def take(
        self, state_dict: dict[str, Tensor], prefix: str, strict: bool, missing: list[str], unexpected: list[str],
        errors: list[str],
    ) -> None:  # fmt: skip
        """Take the tensors under ``prefix`` out of a state dict and hold them, as ``load_state_dict`` does."""
        given = {k: state_dict.pop(k) for k in list(state_dict) if k.startswith(prefix)}
        try:
            value = value_from(given, prefix, self.scheme, self.arrangement.matrix_shape, missing)
        except ValueError as error:
            errors.append(str(error))
            return
        if value is not None:
            device = self.device if self.device.type != "meta" else value.device
            self._hold(_each(lambda t: t.to(device), value))
        known = {prefix + name for name in (PARTS if self.scheme.mode != "symmetric" else PARTS[:2])}
        unexpected.extend(k for k in given if strict and k not in known)

    def __getstate__(self) -> dict[str, Any]:
        # Plain pickle (not torch.save) loses float8 dtypes on the way back: they travel as bytes.
        buffers = {n: b.view(torch.uint8) if b is not None and _is_float8(b) else b for n, b in self._buffers.items()}
        return {**self.__dict__, "_tensor": None, "_fast": None, "convolutions": {}, "_buffers": buffers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for name in ("_data", "_codes"):
            codes = self._buffers.get(name)
            if codes is not None and self.scheme.qtype.is_float:
                self._buffers[name] = codes.view(self.scheme.data_dtype)

    def __deepcopy__(self, memo: dict[int, Any]) -> QWeight:
        copy = self.__class__.__new__(self.__class__)
        memo[id(self)] = copy
        copy.__dict__.update(self.__getstate__())
        for name in ("_parameters", "_modules"):
            copy.__dict__[name] = dict(self.__dict__[name])
        copy.__dict__["_buffers"] = {k: None if b is None else b.clone() for k, b in self._buffers.items()}
        copy.__dict__["sizes"] = None if self.sizes is None else dict(self.sizes)
        return copy


def parameter_prefix(prefix: str) -> str:
    """``layer.q_weight.`` -> ``layer.weight.``"""
    path, _, name = prefix.rstrip(".").rpartition(".")
    return f"{path}.{name.removeprefix(CHILD)}." if path else f"{name.removeprefix(CHILD)}."


def value_from(
    state_dict: Mapping[str, Any], prefix: str, scheme: Scheme, shape: tuple[int, ...], missing: list[str] | None = None
) -> QTensor | None:
    """The quantized value that a state dict holds under ``prefix``, checked; None where tensors are ``missing``.

    Raises:
        ValueError: tensors that do not fit the scheme and the shape.
    """
    names = PARTS if scheme.mode != "symmetric" else PARTS[:2]
    lost = [prefix + name for name in names if prefix + name not in state_dict]
    if lost:
        if missing is None:
            raise ValueError(f"missing: {', '.join(lost)}")
        missing.extend(lost)
        return None
    data, scale, *zero = (state_dict[prefix + name] for name in names)
    try:
        return QTensor(data, scale, zero[0] if zero else None, scheme, shape)
    except ValueError as error:
        raise ValueError(f"{prefix.rstrip('.')}: {error}") from error


def _each(fn: Callable[[Tensor], Tensor], value: QTensor) -> QTensor:
    """``fn`` on each of the stored tensors."""
    zero = None if value.zero is None else fn(value.zero)
    return QTensor(fn(value.data), fn(value.scale), zero, value.scheme, value.shape)


def _kernel_for(value: QTensor, dtype: torch.dtype) -> tuple[Kernel | None, str]:
    """The kernel to pack for, or None and why."""
    if value.device.type == "meta" or len(value.shape) < 2:
        return None, "it has no values yet" if len(value.shape) > 1 else "it is a vector"
    if len(value.shape) > 2 and not isinstance(value.scheme.granularity, PerGroup):
        return None, "the matrices of a stack are packed in groups only"
    kernel, why = choose("linear", value.device.type, value.scheme, _flat(value.shape), dtype)
    if kernel is not None and kernel.name != "cpu-tiled" and kernel.decode is None:
        return None, f"{kernel.name}: has no operator that decodes a weight"
    return kernel, why


def _is_float8(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.element_size() == 1


def _flat(shape: Any) -> tuple[int, int]:
    """A stack of matrices as one: all rows under each other."""
    return math.prod(shape[:-1]), shape[-1]


def _reshaped(value: QTensor, shape: tuple[int, ...]) -> QTensor:
    """Another shape of the rows; only of groups along the last axis, whose scales lie row by row."""
    if value.shape == shape:
        return value
    scale_shape = value.scheme.scale_shape(shape)
    zero = None if value.zero is None else value.zero.reshape(scale_shape)
    data = value.data.reshape(value.scheme.data_shape(shape))
    return QTensor(data, value.scale.reshape(scale_shape), zero, value.scheme, shape)


def _apply_to_bytes(fn: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """``fn`` on the tensor's bytes, which no cast touches."""
    whole = tensor.reshape(1) if tensor.dim() == 0 else tensor
    return fn(whole.contiguous().view(torch.uint8)).view(tensor.dtype).reshape(tensor.shape)
