"""Optimizers: how the scale and the zero point of a weight are found. Named as Hugging Face Quanto's users know them.

Each is called in either of two ways. ``optimizer.qparams(weight, scheme)`` serves any scheme and is what quantizing uses.
``optimizer(base, qtype, axis, group_size)`` is Quanto's call, for one's own experiments.

One's own optimizer overrides ``optimize`` of :class:`SymmetricOptimizer` or :class:`AffineOptimizer`, which sees the weight
as a matrix of runs, or ``qparams`` of :class:`Optimizer`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from qcompile.eager.grouping import check_axis, grouped, scheme_of
from qcompile.kernels import dtypes
from qcompile.kernels.dtypes import QType
from qcompile.kernels.hqq import HalfQuadratic
from qcompile.kernels.qparams import Clip, choose
from qcompile.kernels.runs import cut
from qcompile.kernels.scheme import Mode, Scheme

__all__ = [
    "AbsmaxOptimizer", "AffineOptimizer", "HqqOptimizer", "MaxOptimizer", "MseOptimizer", "Optimizer", "SymmetricOptimizer",
    "optimizer_named",
]  # fmt: skip


class Optimizer(ABC):
    """Finds the scale (and the zero point) of a weight."""

    @abstractmethod
    def qparams(self, weight: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor | None]:
        """Scale and zero point of a weight.

        Args:
            weight: float, any shape that fits the scheme's granularity, reduction axis last.
            scheme: what they are for.

        Returns:
            ``(scale, zero)`` of shape ``scheme.scale_shape(weight.shape)``. The scale has dtype ``scheme.scale_dtype``; the
            zero point is None (symmetric), uint8 in code units (affine), or like the scale in value units (shift), where it
            is the value of code 0: the *negative* of Quanto's float shift.

        Raises:
            ValueError: NaN or infinity in the weight, or a scheme that the optimizer is not for.
        """

    def preferred_mode(self, dtype: QType) -> Mode | None:
        """The mode in which the optimizer does best for a dtype, for a caller that is free to choose; None: any."""
        return None

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"{type(self).__name__}({settings})"


class SymmetricOptimizer(Optimizer):
    """Finds a scale alone, for codes on both sides of zero. Override :meth:`optimize`."""

    def __call__(self, base: Tensor, qtype: QType | str, axis: int | None = None) -> Tensor:
        """The scale, for the whole tensor (``axis=None``) or one for each index of the first or the last axis.

        Raises:
            ValueError: another axis, or a scale of a wrong shape from :meth:`optimize`.
            TypeError: not a floating point tensor.
        """
        dtype = dtypes.qtype(qtype)
        check_axis(axis, base, (None, 0, -1))
        # One channel is the whole tensor.
        axis = None if axis is not None and base.shape[axis] == 1 else axis
        return _checked(self.optimize(base, dtype, axis), base, axis, "scale").to(base.dtype)

    def preferred_mode(self, dtype: QType) -> Mode | None:
        """Symmetric: there is no zero point."""
        return "symmetric"

    def optimize(self, base: Tensor, qtype: QType, axis: int | None = None) -> Tensor:
        """The scale of ``base``: a scalar, or of its shape with every axis but ``axis`` of size 1."""
        raise NotImplementedError(f"{type(self).__name__} must override optimize(base, qtype, axis)")

    def qparams(self, weight: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor | None]:
        """See :meth:`Optimizer.qparams`; for symmetric schemes."""
        if scheme.mode != "symmetric":
            raise ValueError(
                f"{type(self).__name__} finds no zero point, and scheme {scheme} needs one; take an AffineOptimizer, or "
                f"mode 'symmetric'"
            )
        matrix = _matrix(weight, scheme)
        scale = _checked(self.optimize(matrix, scheme.qtype, 0), matrix, 0, "scale")
        return _fitted(scale, weight, scheme, "scale"), None


class AffineOptimizer(Optimizer):
    """Finds a scale and a shift, for codes from 0 up. Override :meth:`optimize`."""

    def __call__(
        self, base: Tensor, qtype: QType | str, axis: int, group_size: int | None = None, zeropoint: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Scale and shift, so that a value is ``scale * code - shift``.

        Args:
            base: float weight.
            axis: 0 or -1, the axis whose indices are apart from each other.
            group_size: elements that share a scale; None: all of an index. It must divide them.
            zeropoint: the shift as a code, uint8: the value is ``scale * (code - shift)`` and zero is exact.

        Returns:
            ``(scale, shift)``, one a run: shape ``[n, 1]`` for groups of axis 0, ``[1, n]`` for groups of axis -1, else the
            shape of ``base`` with every axis but ``axis`` of size 1.

        Raises:
            ValueError: another axis, a group size that does not divide, or a float8 dtype.
            TypeError: not a floating point tensor.
        """
        dtype = dtypes.qtype(qtype)
        check_axis(axis, base, (0, -1))
        _integer(dtype, self)
        runs = base if group_size is None else grouped(base, axis, group_size)
        at = None if runs.shape[axis] == 1 else axis
        scale, shift = _pair(self.optimize(runs, dtype, axis), self)
        scale, shift = (_checked(t, runs, at, n).to(base.dtype) for t, n in ((scale, "scale"), (shift, "shift")))
        if zeropoint:
            shift = (shift / scale).round().clamp(0, dtype.levels - 1).to(torch.uint8)
        return scale, shift

    def optimize(self, base: Tensor, qtype: QType, axis: int) -> tuple[Tensor, Tensor]:
        """Scale and float shift of ``base``, each of its shape with every axis but ``axis`` of size 1."""
        raise NotImplementedError(f"{type(self).__name__} must override optimize(base, qtype, axis)")

    def qparams(self, weight: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor | None]:
        """See :meth:`Optimizer.qparams`; for affine and shift schemes."""
        if scheme.mode == "symmetric":
            raise ValueError(
                f"{type(self).__name__} finds a zero point, and scheme {scheme} has none; take a SymmetricOptimizer, or "
                f"mode 'affine' or 'shift'"
            )
        matrix = _matrix(weight, scheme)
        found = _pair(self.optimize(matrix, scheme.qtype, 0), self)
        scale, shift = (_checked(t, matrix, 0, n) for t, n in zip(found, ("scale", "shift"), strict=True))
        if scheme.mode == "affine":
            # A run of one value has no range, but it has a distance from zero, whose ends are codes.
            scale = torch.where(scale == 0, shift.abs() / (scheme.qtype.levels - 1), scale)
        scale = _fitted(scale, weight, scheme, "scale")
        shift = shift.reshape(scale.shape).float()
        if scheme.mode == "affine":
            return scale, (shift / scale.float()).round().clamp(0, scheme.qtype.levels - 1).to(torch.uint8)
        return scale, _fitted(-shift, weight, scheme, "shift")


class AbsmaxOptimizer(SymmetricOptimizer):
    """The scale that covers the largest absolute value."""

    def optimize(self, base: Tensor, qtype: QType, axis: int | None = None) -> Tensor:
        return _chosen("max", base, qtype, axis, "symmetric")[0]

    def qparams(self, weight: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor | None]:
        if scheme.mode != "symmetric":
            return super().qparams(weight, scheme)
        return choose(weight, scheme, "max")


class _Chosen(AffineOptimizer):
    """An optimizer that the kernels have, for every mode."""

    def _how(self) -> Clip | HalfQuadratic:
        return "max"

    def optimize(self, base: Tensor, qtype: QType, axis: int) -> tuple[Tensor, Tensor]:
        scale, zero = _chosen(self._how(), base, qtype, axis, "shift")
        if zero is None:
            raise ValueError(f"{qtype} has no shift")
        return scale, -zero

    def qparams(self, weight: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor | None]:
        # Straight to the kernels: every granularity and mode, and an affine zero point found as such, not rounded after.
        return choose(weight, scheme, self._how())


class MaxOptimizer(_Chosen):
    """The range from the lowest to the highest value; in a symmetric scheme the largest absolute value."""


class MseOptimizer(_Chosen):
    """The range with the least squared error, found by a search, and the scale that then fits the codes best."""

    def _how(self) -> Clip | HalfQuadratic:
        return "mse"


class HqqOptimizer(MaxOptimizer):
    """Half-quadratic quantization: scale and zero point by alternating an l_p proximal step and least squares.

    For integer dtypes in any mode. It lowers a weight's error most where the zero point is a float (``mode="shift"``); of
    whole models the integer one, which keeps zero exact, did as well or better at 4 and 3 bits.

    Args:
        lp_norm: p of the norm of the error, above 0 and at most 1.
        beta: weight of the quadratic term at the start, for errors in units of the step.
        kappa: what ``beta`` is multiplied by after each iteration, at least 1.
        iters: the most iterations.

    Raises:
        ValueError: a setting outside its range.
    """

    def __init__(self, lp_norm: float = 0.7, beta: float = 10.0, kappa: float = 1.01, iters: int = 20) -> None:
        self.lp_norm, self.beta, self.kappa, self.iters = lp_norm, beta, kappa, iters
        self._how()  # checks them

    def _how(self) -> Clip | HalfQuadratic:
        return HalfQuadratic(self.lp_norm, self.beta, self.kappa, self.iters)


_NAMED: dict[str, type[Optimizer]] = {
    "max": MaxOptimizer, "absmax": AbsmaxOptimizer, "mse": MseOptimizer, "hqq": HqqOptimizer,
}  # fmt: skip


def optimizer_named(optimizer: str | Optimizer) -> Optimizer:
    """The optimizer of a name, or the object itself.

    Raises:
        ValueError: an unknown name; the message lists the known ones.
        TypeError: neither a name nor an object with ``qparams``, such as the class of an optimizer.
    """
    allowed = f"{', '.join(map(repr, _NAMED))} or an Optimizer object"
    if isinstance(optimizer, str):
        if optimizer not in _NAMED:
            raise ValueError(f"unknown optimizer {optimizer!r}; allowed: {allowed}")
        return _NAMED[optimizer]()
    if isinstance(optimizer, type):
        raise TypeError(f"optimizer must be {allowed}, got the class {optimizer.__name__}; write {optimizer.__name__}()")
    if not callable(getattr(optimizer, "qparams", None)):
        raise TypeError(f"optimizer must be {allowed}, got {optimizer!r} of type {type(optimizer).__name__}")
    return optimizer


def _chosen(
    how: Clip | HalfQuadratic, base: Tensor, dtype: QType, axis: int | None, mode: Mode
) -> tuple[Tensor, Tensor | None]:
    """What the kernels choose, in float32 and in the shape that ``optimize`` gives."""
    scale, zero = choose(base, scheme_of(dtype, axis, mode), how)
    if axis is None:
        return scale, zero
    shape = [1] * base.dim()
    shape[axis] = base.shape[axis]
    return scale.reshape(shape), None if zero is None else zero.reshape(shape)


def _matrix(weight: Tensor, scheme: Scheme) -> Tensor:
    """The weight as ``[runs, length]`` in float32, one run for each scale; a short run repeats its last element."""
    if not weight.is_floating_point():
        raise TypeError(f"only floating point tensors can be quantized, got {weight.dtype}")
    runs = cut(weight, scheme)[1]
    if not runs.shape[-1]:
        raise ValueError(f"a weight of shape {list(weight.shape)} has nothing to choose a scale from")
    return runs.reshape(-1, runs.shape[-1])


def _fitted(found: Tensor, weight: Tensor, scheme: Scheme, what: str) -> Tensor:
    fitted = found.reshape(scheme.scale_shape(weight.shape)).to(scheme.scale_dtype)
    if not bool(torch.isfinite(fitted).all()):
        raise ValueError(f"the optimizer found a {what} that does not fit in {scheme.scale_dtype}")
    return torch.where(fitted == 0, torch.ones_like(fitted), fitted) if what == "scale" else fitted


def _checked(found: object, base: Tensor, axis: int | None, what: str) -> Tensor:
    """What ``optimize`` returned, if it has one element for each index of ``axis``."""
    count = 1 if axis is None else base.shape[axis]
    if not isinstance(found, Tensor) or not found.is_floating_point():
        raise TypeError(f"optimize must return a floating point tensor as {what}, got {found!r}")
    if found.numel() != count:
        raise ValueError(f"optimize must return a {what} of {count} elements, got shape {list(found.shape)}")
    return found


def _pair(found: object, optimizer: Optimizer) -> tuple[Tensor, Tensor]:
    if not isinstance(found, tuple) or len(found) != 2:
        raise TypeError(f"{type(optimizer).__name__}.optimize must return (scale, shift), got {type(found).__name__}")
    return found


def _integer(dtype: QType, optimizer: Optimizer) -> None:
    if dtype.is_float:
        raise ValueError(f"{type(optimizer).__name__} is for integer dtypes, got {dtype}; float8 takes a SymmetricOptimizer")

