"""Half-quadratic optimization of scale and zero point (Badri & Shaji 2023, "Half-Quadratic Quantization of Large Machine
Learning Models").

The error of a run ``w`` is measured in an l_p norm with p < 1, which does not let a few outliers rule the many small
values. That norm has no gradient worth following, so an auxiliary error ``e`` takes it over and the problem is split::

    min  |e|_p^p + beta / 2 |e - (w - decode(encode(w; s, z)))|^2    over  e, s, z

    e    <-  shrink(w - decode(..), beta)     the generalized soft threshold: what of the error is given up as outlier
    s, z <-  least squares of  w - e  on the codes
    beta <-  kappa * beta

As published the scale stays what min-max made it and the zero point is a mean. Here the least squares step solves for both,
the start is the range with the least squared error, errors are in units of the step, so that one ``beta`` fits weights of
any size, and each run keeps the best pair it has met and stops by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from qcompile.kernels.runs import squared_error, steps, stored, values
from qcompile.kernels.scheme import Scheme


@dataclass(frozen=True)
class HalfQuadratic:
    """The settings of the half-quadratic solver, and the solver.

    Attributes:
        lp_norm: p of the norm of the error, above 0 and at most 1.
        beta: weight of the quadratic term at the start; errors below about ``beta ** (-1 / (2 - p))`` steps count as noise.
        kappa: what ``beta`` is multiplied by after each iteration, at least 1.
        iterations: the most there are.
        patience: a run stops after so many iterations in a row that did not lower its squared error.

    Raises:
        ValueError: a setting outside its range.
    """

    lp_norm: float = 0.7
    beta: float = 10.0
    kappa: float = 1.01
    iterations: int = 20
    patience: int = 3

    def __post_init__(self) -> None:
        _number("lp_norm", self.lp_norm, 0 < self.lp_norm <= 1, "above 0 and at most 1")
        _number("beta", self.beta, 0 < self.beta < float("inf"), "above 0")
        _number("kappa", self.kappa, 1 <= self.kappa < float("inf"), "at least 1")
        for name in ("iterations", "patience"):
            given = getattr(self, name)
            if isinstance(given, bool) or not isinstance(given, int) or given < 1:
                raise ValueError(
                    f"{name} of the half-quadratic optimizer must be a whole number of at least 1, got {given!r}"
                )

    @staticmethod
    def check(scheme: Scheme) -> None:
        """Raise a ValueError for a scheme that the solver is not for: one of floating point codes."""
        if scheme.qtype.is_float:
            raise ValueError(f"the half-quadratic optimizer is for integer dtypes, got {scheme.qtype}; take 'mse' or 'max'")

    def refine(
        self, runs: Tensor, mask: Tensor | None, scale: Tensor, zero: Tensor | None, scheme: Scheme
    ) -> tuple[Tensor, Tensor | None]:
        """A better scale and zero point than those given, or the same; no run's squared error grows.

        Args:
            runs: float32 ``[..., length]``, one run for each scale.
            mask: the same shape, 0 where a run is padding; None: no padding.
            scale: ``[...]``, float32, rounded to the scheme's dtype already.
            zero: like the scale: code units (uint8) for an affine scheme, value units for a shift scheme, else None.
            scheme: an integer scheme.

        Raises:
            ValueError: the codes of the scheme are floating point numbers, whose steps are not even.
        """
        self.check(scheme)
        shape, zero_dtype = scale.shape, None if zero is None else zero.dtype
        work = _Work(
            torch.arange(scale.numel(), device=scale.device),
            runs.reshape(scale.numel(), -1),
            None if mask is None else mask.expand_as(runs).reshape(scale.numel(), -1),
            scale.reshape(-1),
            None if zero is None else zero.reshape(-1).float(),
        )
        best_scale = work.scale.clone()
        best_zero = None if work.zero is None else work.zero.clone()
        best = squared_error(work.runs, work.mask, work.scale, work.zero, scheme)
        missed, beta = torch.zeros_like(best), self.beta
        for _ in range(self.iterations):
            error = work.fit(self._target(work, beta, scheme), scheme)
            better = error < best
            best = torch.where(better, error, best)
            found = work.index[better]
            best_scale[found] = work.scale[better]
            if best_zero is not None and work.zero is not None:
                best_zero[found] = work.zero[better]
            missed = torch.where(better, torch.zeros_like(missed), missed + 1)
            going = missed < self.patience
            if not bool(going.any()):
                break
            if not bool(going.all()):
                work.keep(going)
                best, missed = best[going], missed[going]
            beta *= self.kappa
        final_zero = None if best_zero is None or zero_dtype is None else best_zero.reshape(shape).to(zero_dtype)
        return best_scale.reshape(shape), final_zero

    def _target(self, work: _Work, beta: float, scheme: Scheme) -> Tensor:
        """The runs less the errors that are given up as outliers."""
        factor = work.scale.unsqueeze(-1)
        error = (work.runs - values(work.runs, work.scale, work.zero, scheme)).div_(factor)
        return work.runs - shrink(error, beta, self.lp_norm).mul_(factor)


def shrink(x: Tensor, beta: float, lp_norm: float) -> Tensor:
    """The generalized soft threshold, ``sign(x) * max(|x| - |x| ** (p - 1) / beta, 0)``: the proximal step of l_p."""
    size = x.abs()
    # At zero the power is infinite and the result zero; a floor far below the threshold keeps it finite.
    less = size.clamp(min=1e-6).pow_(lp_norm - 1).div_(beta)
    return (size - less).clamp_(min=0).mul_(x.sign())


@dataclass
class _Work:
    """The runs that are still getting better."""

    index: Tensor
    runs: Tensor
    mask: Tensor | None
    scale: Tensor
    zero: Tensor | None

    def fit(self, target: Tensor, scheme: Scheme) -> Tensor:
        """Take the scale and zero point that fit the codes to ``target`` best; returns each run's squared error."""
        codes = steps(self.runs, self.scale, self.zero, scheme)
        if self.zero is None:
            self.scale = self._slope(codes, target, scheme)
            return squared_error(self.runs, self.mask, self.scale, None, scheme)
        count = codes.shape[-1] if self.mask is None else self.mask.sum(dim=-1)
        code_mean, target_mean = self._sum(codes) / count, self._sum(target) / count
        away = codes - code_mean.unsqueeze(-1)
        slope = _positive(self._sum(away * target), self._sum(away.square()), self.scale)
        if scheme.mode == "shift":
            self.scale = stored(slope, scheme)
            self.zero = (target_mean - self.scale * code_mean).to(scheme.scale_dtype).float()
            return squared_error(self.runs, self.mask, self.scale, self.zero, scheme)
        # The zero point is a code: whichever of the two next to the real-valued one serves better, with its own scale.
        exact, old = self.zero + code_mean - target_mean / slope, self.zero
        below, above = (
            self._at(round_, exact, codes + old.unsqueeze(-1), target, scheme) for round_ in (torch.floor, torch.ceil)
        )
        higher = above[0] < below[0]
        error, self.scale, self.zero = (torch.where(higher, a, b) for a, b in zip(above, below, strict=True))
        return error

    def _at(
        self, rounding: Callable[[Tensor], Tensor], exact: Tensor, codes: Tensor, target: Tensor, scheme: Scheme
    ) -> tuple[Tensor, Tensor, Tensor]:
        zero = rounding(exact).clamp_(0, scheme.qtype.levels - 1)
        scale = self._slope(codes - zero.unsqueeze(-1), target, scheme)
        return squared_error(self.runs, self.mask, scale, zero, scheme), scale, zero

    def _slope(self, codes: Tensor, target: Tensor, scheme: Scheme) -> Tensor:
        return stored(_positive(self._sum(codes * target), self._sum(codes.square()), self.scale), scheme)

    def _sum(self, x: Tensor) -> Tensor:
        return (x if self.mask is None else x * self.mask).sum(dim=-1)

    def keep(self, going: Tensor) -> None:
        """Let go of the runs that are done."""
        self.index, self.runs, self.scale = self.index[going], self.runs[going], self.scale[going]
        self.mask = None if self.mask is None else self.mask[going]
        self.zero = None if self.zero is None else self.zero[going]


def _positive(above: Tensor, below: Tensor, otherwise: Tensor) -> Tensor:
    """The quotient where it is a positive finite number, else ``otherwise``: a scale is never zero or negative."""
    quotient = above / below.clamp(min=torch.finfo(torch.float32).tiny)
    return torch.where((below > 0) & (quotient > 0) & torch.isfinite(quotient), quotient, otherwise)


def _number(name: str, given: float, fits: bool, allowed: str) -> None:
    if not fits:
        raise ValueError(f"{name} of the half-quadratic optimizer must be {allowed}, got {given!r}")
