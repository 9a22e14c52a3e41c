"""The text of ``qcompile::sequence``: what its steps may be, and how a program is written; see sequence.py."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

OP = "qcompile::sequence"

#: Operators of this namespace that may be steps.
LARGE = (
    "linear_chain",
    "attention",
    "linear_tiled",
    "linear_tiled_split",
    "conv_tiled",
    "conv_depthwise",
    "embedding_tiled",
)

#: How many axes a value may have.
MOST_AXES = 6

DTYPES = {
    str(t).removeprefix("torch."): t
    for t in (
        torch.float32, torch.float16, torch.bfloat16, torch.uint8, torch.int8, torch.int32, torch.int64, torch.bool,
        torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2,
    )
}  # fmt: skip


@dataclass(frozen=True)
class Small:
    """A step that is not an operator of ours: the kinds of its arguments, and what it means."""

    arguments: tuple[str, ...]
    meaning: Callable[..., Any]


def _layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    gain, shift = (None if t is None else t.float() for t in (weight, bias))
    return torch.nn.functional.layer_norm(x.float(), x.shape[-1:], gain, shift, eps).to(x.dtype)


def _rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    return torch.nn.functional.rms_norm(x.float(), x.shape[-1:], None if weight is None else weight.float(), eps).to(x.dtype)


def _index_copy(x: Tensor, dim: int, index: Tensor, source: Tensor) -> None:
    x.index_copy_(dim, index.reshape(-1).long(), source)


def _fitting(x: Tensor, y: Tensor | float) -> Tensor | float:
    """A number as ``x`` has them."""
    return y if isinstance(y, Tensor) or x.is_floating_point() else int(y)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


#: Steps by name; those that end in an underscore write to their first argument and give nothing. Sums may be of vectors of
#: int64, too.
SMALL = {
    "layer_norm": Small(("Tensor", "Tensor?", "Tensor?", "float"), _layer_norm),
    "rms_norm": Small(("Tensor", "Tensor?", "float"), _rms_norm),
    "mul": Small(("Tensor", "operand"), torch.mul),
    "add": Small(("Tensor", "operand"), lambda x, y: torch.add(x, _fitting(x, y))),
    "add_": Small(("Tensor", "operand"), lambda x, y: x.add_(_fitting(x, y))),
    "arange": Small(("int",), torch.arange),
    "sub": Small(("Tensor", "operand"), torch.sub),
    "neg": Small(("Tensor",), torch.neg),
    "cat": Small(("Tensor[]", "int"), torch.cat),
    "rotate": Small(("Tensor", "Tensor", "Tensor"), _rotate),
    "clone": Small(("Tensor",), torch.clone),
    "index_copy_": Small(("Tensor", "int", "Tensor", "Tensor"), _index_copy),
    "copy_": Small(("Tensor", "Tensor"), lambda x, y: x.copy_(y)),
}


@functools.cache
def _large(name: str) -> Small:
    target = getattr(torch.ops.qcompile, name).default
    return Small(tuple(str(a.real_type) for a in target._schema.arguments), target)


def step_named(name: str) -> Small:
    """What a step of this name takes and means.

    Raises:
        ValueError: there is none.
    """
    if name in LARGE:
        return _large(name)
    if name not in SMALL:
        raise ValueError(f"{OP}: there is no operator {name!r}; there are {', '.join((*LARGE, *SMALL))}")
    return SMALL[name]


@dataclass(frozen=True)
class Kind:
    """What a value is: its dtype, and how it lies in memory."""

    dtype: torch.dtype
    sizes: tuple[int, ...]
    strides: tuple[int, ...]

    @staticmethod
    def of(tensor: Tensor) -> Kind:
        """The kind of a tensor of known sizes."""
        return Kind(tensor.dtype, tuple(tensor.shape), tuple(tensor.stride()))

    def words(self) -> list[str]:
        """As a program says it."""
        name = str(self.dtype).removeprefix("torch.")
        return [name, str(len(self.sizes)), *map(str, self.sizes), *map(str, self.strides)]

    def empty(self, like: Tensor) -> Tensor:
        """A tensor of this kind on the device of another."""
        return like.new_empty_strided(self.sizes, self.strides, dtype=self.dtype)

    def restrided(self, tensor: Tensor) -> Tensor:
        """``tensor``, copied where it does not lie as this says."""
        same = all(n == 1 or a == b for n, a, b in zip(self.sizes, self.strides, tensor.stride(), strict=True))
        return tensor if same else self.empty(tensor).copy_(tensor)

    def span(self) -> int:
        """Elements from the first to the last."""
        return 0 if 0 in self.sizes else 1 + sum((n - 1) * s for n, s in zip(self.sizes, self.strides, strict=True))


#: Of the latest programs that were written or read, the kinds of their results.
known_kinds: dict[str, tuple[Kind, ...]] = {}
_MOST_KNOWN = 256
_lock = threading.Lock()


def know(program: str, kinds: tuple[Kind, ...]) -> None:
    """Keep the kinds of a program's results, so that nobody has to read it for them."""
    with _lock:
        known_kinds[program] = kinds
        if len(known_kinds) > _MOST_KNOWN:
            del known_kinds[next(iter(known_kinds))]


@dataclass
class Writer:
    """Writes a program step by step; values are named by their numbers.

    Attributes:
        written: how many of the inputs, the first ones, are written to.
        kinds: of the inputs; those of further values are added.
    """

    written: int
    kinds: list[Kind]
    steps: list[list[str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._inputs = len(self.kinds)

    def step(self, name: str, arguments: Sequence[Any], kinds: Sequence[Kind]) -> list[int]:
        """Add a step; returns the numbers of what it gives."""
        known = step_named(name).arguments
        words = [name, str(len(kinds)), *(w for k in kinds for w in k.words())]
        for kind, argument in zip(known, arguments, strict=True):
            words += _written(kind, argument)
        return self._add(words, kinds)

    def view(self, base: int, offset: int, kind: Kind) -> int:
        """Add a view; returns its number."""
        return self._add(["view", str(base), str(offset), *kind.words()], [kind])[0]

    def held(self, box: int, place: int, kind: Kind) -> int:
        """Add what the box of an input holds at a place; returns its number."""
        return self._add(["held", str(box), str(place), *kind.words()], [kind])[0]

    def _add(self, words: list[str], kinds: Sequence[Kind]) -> list[int]:
        first = len(self.kinds)
        self.kinds += kinds
        self.steps.append(words)
        return list(range(first, len(self.kinds)))

    def text(self, results: Sequence[tuple[int, Kind]]) -> str:
        """The program, giving these values."""
        words = ["1", str(self.written), str(self._inputs)]
        words += [w for k in self.kinds[: self._inputs] for w in k.words()]
        words += [str(len(self.steps)), *(w for s in self.steps for w in s), str(len(results))]
        words += [w for number, kind in results for w in (str(number), *kind.words())]
        text = " ".join(words)
        know(text, tuple(kind for _, kind in results))
        return text


def _written(kind: str, value: Any) -> list[str]:
    match kind:
        case "Tensor" | "int":
            return [str(int(value))]
        case "Tensor?" | "Optional[Tensor]":
            return ["-1" if value is None else str(value)]
        case "operand":
            return ["-1", repr(float(value))] if isinstance(value, float) else [str(value)]
        case "float":
            return [repr(float(value))]
        case "bool":
            return [str(int(value))]
        case "str":
            return [value]
        case "Tensor[]" | "List[Tensor]" | "List[int]":
            return [str(len(value)), *map(str, value)]
        case "List[float]":
            return [str(len(value)), *(repr(float(v)) for v in value)]
        case "ScalarType" | "Optional[ScalarType]":
            return ["-" if value is None else str(value).removeprefix("torch.")]
        case _:
            raise ValueError(f"{OP}: arguments of type {kind} cannot be written")
