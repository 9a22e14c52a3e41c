"""What a user may ask for, checked once, in one place, for all ways in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, cast

import torch

from qcompile.kernels.dtypes import QType, qint8, qtype
from qcompile.kernels.qparams import CLIPS, Clip
from qcompile.kernels.scheme import MODES, SCALE_DTYPES, Mode
from qcompile.passes.base import Pass
from qcompile.passes.canonicalize import Canonicalize
from qcompile.passes.pack import Pack
from qcompile.passes.pipeline import lowering, quantization
from qcompile.passes.select import MIN_ELEMENTS, PER_CHANNEL, Select


@dataclass(frozen=True)
class Options:
    """Options of :func:`qcompile.quantize` and of ``torch.compile(model, backend="qcompile", options={...})``.

    Attributes:
        weights: quantized dtype of the weights, an object or a name.
        activations: quantized dtype of the activations that quantized linears read, with one scale a token; None: they stay
            as they are.
        group_size: elements of the reduction axis that share a scale; -1: all, one scale an output channel; None: 32 for
            integer dtypes, all for float8.
        mode: ``"symmetric"``, ``"affine"`` or ``"shift"``; None: symmetric at 8 bits, affine below.
        scale_dtype: dtype of scales, a torch dtype or a name; None: float32 for one a channel, float16 for groups.
        embeddings: dtype of lookup tables, and of linears that share one; None: ``weights``, but at least 8 bits.
        include, exclude: fnmatch patterns over parameter and module names, one or several.
        optimizer: how the range of a scale is found: ``"max"`` (all values), ``"mse"`` (least squared error), ``"hqq"``
            (half-quadratic: the zero point is fitted too; integer dtypes only).
        min_elements: weights with fewer elements are left alone (of convolutions: with a 32nd of that; of linears that are
            known to get one row, on a CPU: with 5 times that, as float products of one row are as fast up to there).
        exact: kernels keep float activations; by default they may round them to 8 bits in blocks of 32 on the fly.
        keep_float: keep the float originals of quantized weights in memory (``torch.compile`` only).
    """

    weights: QType = qint8
    activations: QType | None = None
    group_size: int | None = None
    mode: Mode | None = None
    scale_dtype: torch.dtype | None = None
    embeddings: QType | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    optimizer: Clip = "max"
    min_elements: int = MIN_ELEMENTS
    exact: bool = False
    keep_float: bool = False

    @staticmethod
    def parse(given: Mapping[str, Any] | None) -> Options:
        """Options from a user's dictionary.

        Raises:
            ValueError: an unknown option, or a value that is not allowed; the message lists what is.
            TypeError: a value of the wrong type.
        """
        values = dict(given or {})
        known = [f.name for f in fields(Options)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(f"unknown option {', '.join(map(repr, unknown))}; known options: {', '.join(known)}")
        values["weights"] = qtype(values["weights"]) if values.get("weights") is not None else qint8
        for name in ("embeddings", "activations"):
            if values.get(name) is not None:
                values[name] = qtype(values[name])
        for name in ("include", "exclude"):
            values[name] = _patterns(name, values.get(name))
        for name, allowed in (("mode", (None, *MODES)), ("optimizer", CLIPS)):
            if name in values and values[name] not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {values[name]!r}")
        if values.get("group_size") != PER_CHANNEL:
            _integer(values, "group_size", 1, optional=True)
        _integer(values, "min_elements", 0)
        for name in ("exact", "keep_float"):
            if not isinstance(values.get(name, False), bool):
                raise TypeError(f"{name} must be True or False, got {values[name]!r}")
        if values.get("scale_dtype") is not None:
            values["scale_dtype"] = _scale_dtype(values["scale_dtype"])
        options = Options(**values)
        if options.activations is not None and options.activations.bits != 8:
            raise ValueError(f"activations must be qint8 or a float8, got {options.activations}")
        if options.weights.is_float and options.mode not in (None, "symmetric"):
            raise ValueError(f"{options.weights} weights are symmetric, got mode {options.mode!r}")
        if options.optimizer == "hqq" and (options.weights.is_float or (options.embeddings and options.embeddings.is_float)):
            raise ValueError("optimizer 'hqq' is for integer dtypes; with float8 weights or embeddings take 'mse' or 'max'")
        return options

    @property
    def select(self) -> Select:
        """The pass that gives each weight its scheme."""
        return Select(
            self.weights, self.group_size, self.mode, self.scale_dtype, self.embeddings, self.include, self.exclude,
            self.min_elements,
        )  # fmt: skip

    def quantization(self) -> list[Pass]:
        """The passes from a float program to a quantized one."""
        return quantization(self.select, self.optimizer, self.activations)

    def finding(self) -> tuple[list[Pass], list[Pass]]:
        """The same in two parts: after the first one the sites are known, and with them what patterns may match."""
        passes = self.quantization()
        end = 1 + next(i for i, one in enumerate(passes) if isinstance(one, Canonicalize))
        return passes[:end], passes[end:]

    def lowering(self) -> list[Pass]:
        """The passes from a quantized program to a packed one."""
        return [Pack(exact=self.exact) if isinstance(p, Pack) else p for p in lowering()]


def _patterns(name: str, given: str | Sequence[str] | None) -> tuple[str, ...]:
    if given is None:
        return ()
    patterns = (given,) if isinstance(given, str) else tuple(given)
    for pattern in patterns:
        if not isinstance(pattern, str) or not pattern:
            raise TypeError(f"{name} takes a pattern or a list of patterns, got {pattern!r}")
    return patterns


def _integer(values: dict[str, Any], name: str, least: int, optional: bool = False) -> None:
    given = values.get(name)
    if given is None and (optional or name not in values):
        return
    if isinstance(given, bool) or not isinstance(given, int):
        raise TypeError(f"{name} must be an integer, got {given!r}")
    if given < least:
        raise ValueError(f"{name} must be at least {least}, got {given}")


def _scale_dtype(given: object) -> torch.dtype:
    dtype = SCALE_DTYPES.get(given) if isinstance(given, str) else given
    if dtype not in SCALE_DTYPES.values():
        raise ValueError(f"scale_dtype must be one of {', '.join(SCALE_DTYPES)}, got {given!r}")
    return cast(torch.dtype, dtype)
