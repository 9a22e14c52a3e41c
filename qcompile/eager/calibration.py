"""Calibration: running samples to find the scales of activations."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from qcompile.eager.mixin import QModuleMixin, calibration_stack
from qcompile.eager.observers import METHODS, Method, Observer
from qcompile.progress import track

__all__ = ["Calibration", "calibrate"]

log = logging.getLogger("qcompile.eager")


class Calibration:
    """Inside the block, quantized modules that run learn the scales of their inputs and outputs::

        with qcompile.Calibration():
            for batch in samples:
                model(batch)

    Weights are read through their codes meanwhile, activations are left as they come. On leaving the block each module that
    ran gets its scales, anew each time; one that did not run keeps what it had. The scale of an input is that of the tensor
    that the module was given; where that is just the output of another quantized module, both have seen the same numbers
    and have the same scale, and rounding it twice changes nothing.

    Args:
        momentum: of ``method="ema"``: how much of the running range stays when a batch comes, in [0, 1); 0: the last batch.
        streamline: leave the output of a module float unless another quantized module read that very tensor.
        debug: print a table of ranges and scales at the end.
        method: how the range is found, see :class:`~qcompile.eager.observers.Observer`.
        percentile: of ``method="percentile"``, in percent.

    Raises:
        ValueError: a value that is not allowed; at the end of the block, if no module with quantized activations ran.
        RuntimeError: entered from within itself.
    """

    def __init__(
        self, momentum: float = 0.9, streamline: bool = True, debug: bool = False, *, method: Method = "ema",
        percentile: float = 99.99,
    ) -> None:  # fmt: skip
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {momentum!r}")
        if method not in METHODS:
            raise ValueError(f"unknown calibration method {method!r}; allowed: {', '.join(METHODS)}")
        if not 0 < percentile <= 100:
            raise ValueError(f"percentile must be in (0, 100], got {percentile!r}")
        self.momentum, self.streamline, self.debug = momentum, streamline, debug
        self.method, self.percentile = method, percentile
        self._seen: dict[QModuleMixin, _Seen] = {}
        self._produced = WeakIdKeyDictionary()

    def __enter__(self) -> Calibration:
        if self in calibration_stack():
            raise RuntimeError("this calibration is running already; make another one")
        calibration_stack().append(self)
        self._seen, self._produced = {}, WeakIdKeyDictionary()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        calibration_stack().remove(self)
        if kind is not None:
            return
        if not any(s.ran for s in self._seen.values()):
            raise ValueError(
                "no module with quantized activations ran; run the model that qcompile.quantize(model, activations=...) "
                "returned inside the block (eagerly: a compiled one cannot be calibrated)"
            )
        for module, seen in self._seen.items():
            self._settle(module, seen)
        if self.debug:
            print(self._table())

    def observe(self, module: QModuleMixin, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Run a module, looking at what goes in and what comes out."""
        seen = self._seen.setdefault(module, _Seen(self.observer(), self.observer()))
        x = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)
        if module.q.reads and x is not None and x.is_floating_point():
            seen.input.see(x)
            source = self._produced.get(x)
            if source is not None:
                self._seen[source].read = True
        out = module._with_codes(args, dict(kwargs))
        seen.ran = True
        if module.q.gives:
            for leaf in tree_leaves(out):
                if isinstance(leaf, Tensor) and leaf.is_floating_point():
                    seen.output.see(leaf)
                    self._produced[leaf] = module
        return out

    def observer(self) -> Observer:
        """A new observer of one tensor, as this calibration wants it."""
        return Observer(self.method, self.momentum, self.percentile)

    def _settle(self, module: QModuleMixin, seen: _Seen) -> None:
        qtype = module.q.activations
        if qtype is None or not seen.ran:
            return
        for observer, buffer, name in (
            (seen.input if module.q.reads else None, module.input_scale, "static_input"),
            (
                seen.output if module.q.gives and (seen.read or not self.streamline) else None,
                module.output_scale,
                "static_output",
            ),
        ):
            scale = None if observer is None else observer.scale(qtype)
            setattr(module.q, name, scale is not None)
            with torch.no_grad():
                buffer.fill_(1.0 if scale is None else scale)

    def _table(self) -> str:
        rows = [("module", "input range", "input scale", "output range", "output scale", "read by")]
        for module, seen in self._seen.items():
            q = module.q
            rows.append((
                f"{type(module).__name__}({nn.Module.extra_repr(module) or _sizes(module)})",
                f"{seen.input.largest:.4g}" if seen.input.batches else "-",
                f"{float(module.input_scale):.4g}" if q.static_input else ("dynamic" if q.reads else "-"),
                f"{seen.output.largest:.4g}" if seen.output.batches else "-",
                f"{float(module.output_scale):.4g}" if q.static_output else "float",
                "a quantized module" if seen.read else "others",
            ))  # fmt: skip
        widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
        return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(r, widths, strict=True)).rstrip() for r in rows)


class _Seen:
    """What was seen of one module."""

    def __init__(self, input: Observer, output: Observer) -> None:
        self.input, self.output = input, output
        self.ran = self.read = False


def _sizes(module: nn.Module) -> str:
    return ", ".join(
        f"{n}={getattr(module, n)}" for n in ("in_features", "out_features", "normalized_shape") if hasattr(module, n)
    )


def calibrate(
    model: nn.Module,
    samples: Iterable[Any],
    forward: Callable[[nn.Module, Any], Any] | None = None,
    *,
    batches: int | None = None,
    **options: Any,
) -> nn.Module:
    """:func:`qcompile.calibrate` of a module."""
    run = forward or _call
    modes, count = [(m, m.training) for m in model.modules()], 0
    total = math.inf if batches is None else batches
    chosen = samples if batches is None else (s for _, s in zip(range(int(total)), samples, strict=False))
    model.eval()
    try:
        with Calibration(**options), torch.no_grad():
            for sample in track(chosen, "calibrating"):
                run(model, sample)
                count += 1
            if count == 0:
                raise ValueError("there are no samples to calibrate with")
    finally:
        for module, mode in modes:
            module.training = mode
    return model


def _call(model: nn.Module, sample: Any) -> Any:
    if isinstance(sample, Mapping):
        return model(**sample)
    if isinstance(sample, tuple | list):
        return model(*sample)
    return model(sample)
