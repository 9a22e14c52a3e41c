"""``qcompile::sequence``: a run of the CPU's operators, the views between them and small glue, in one call.

A call of an operator from Python costs ten microseconds with all that goes with it, and a step over one token makes a
hundred. A sequence is a program, as text: words with spaces between. Values are numbered: the inputs first, those that are
written to before those that are only read, then what each step gives, in order::

    1                           the version
    written, inputs             how many inputs are written to, and how many there are; then a kind for each
    steps                       how many, and then for each
        name, results           how many values it gives; then a kind for each; then its arguments
        view, base, offset      another look at the memory of a value, from an element on; then a kind, of any dtype if
                                the value is bytes
        held, input, place      what a box holds at a place (:mod:`~qcompile.kernels.ops.hold`); then a kind
    results                     how many; then for each its number, and the kind that it is to have
    kind: dtype, axes, sizes, strides

Arguments stand in the order of the operator's schema (:data:`SMALL` for what is not ours): a tensor as the number of a
value, -1 for None (in an operand: -1, and the number that stands for it); a list as its length and its items. What a box
holds is written to where the box is among what is written to.

``sequence_writing`` is for programs that write to inputs (a cache); it is given tensors for its results, because torch does
not functionalize an operator that both writes and returns a list. Results are never views. In C++ a program is read and
checked once; what lies between steps is memory that a thread keeps, and results that nobody reads do not exist.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from qcompile.kernels.ops._library import define
from qcompile.kernels.ops._sequence import DTYPES, LARGE, MOST_AXES, OP, SMALL, Kind, Writer, know, known_kinds, step_named
from qcompile.kernels.ops.hold import in_box

__all__ = ["LARGE", "MOST_AXES", "SMALL", "Kind", "Writer", "sequence", "sequence_writing"]


class _Reader:
    """Reads a program front to back."""

    def __init__(self, text: str) -> None:
        self._words = iter(text.split())

    def word(self) -> str:
        word = next(self._words, None)
        if word is None:
            raise ValueError(f"{OP}: the program ends too early")
        return word

    def number(self) -> int:
        return int(self.word())

    def count(self) -> int:
        n = self.number()
        if not 0 <= n <= 1 << 20:
            raise ValueError(f"{OP}: {n} is no count")
        return n

    def kind(self) -> Kind:
        name = self.word()
        if name not in DTYPES:
            raise ValueError(f"{OP}: there is no dtype {name!r}")
        axes = self.count()
        sizes = tuple(self.count_of_size() for _ in range(axes))
        return Kind(DTYPES[name], sizes, tuple(self.count_of_size() for _ in range(axes)))

    def count_of_size(self) -> int:
        n = self.number()
        if n < 0:
            raise ValueError(f"{OP}: {n} is no size or stride")
        return n

    def argument(self, kind: str, values: Sequence[Tensor]) -> Any:
        match kind:
            case "Tensor":
                return _valued(values, self.number())
            case "Tensor?" | "Optional[Tensor]":
                i = self.number()
                return None if i == -1 else _valued(values, i)
            case "operand":
                i = self.number()
                return float(self.word()) if i == -1 else _valued(values, i)
            case "int":
                return self.number()
            case "float":
                return float(self.word())
            case "bool":
                return bool(self.count())
            case "str":
                return self.word()
            case "Tensor[]" | "List[Tensor]":
                return [_valued(values, self.number()) for _ in range(self.count())]
            case "List[int]":
                return [self.number() for _ in range(self.count())]
            case "List[float]":
                return [float(self.word()) for _ in range(self.count())]
            case "ScalarType" | "Optional[ScalarType]":
                word = self.word()
                return None if word == "-" else DTYPES[word]
            case _:
                raise ValueError(f"{OP}: arguments of type {kind} cannot be read")

    def rest(self) -> Iterator[str]:
        return self._words


def _valued(values: Sequence[Tensor], index: int) -> Tensor:
    if not 0 <= index < len(values):
        raise ValueError(f"{OP}: there is no value {index} at this step")
    return values[index]


def _shown(base: Tensor, offset: int, kind: Kind) -> Tensor:
    """Another look at the memory of a value."""
    width = kind.dtype.itemsize
    if kind.dtype != base.dtype and (base.dtype != torch.uint8 or offset % width != 0):
        raise ValueError(f"{OP}: a view of another dtype must be of bytes, and begin at a whole element of its own")
    if kind.span() == 0:  # shows nothing, wherever it says that it begins
        offset = min(offset, 0)
    end = offset + kind.span() * width // base.itemsize
    if not 0 <= offset <= end <= Kind.of(base).span():
        raise ValueError(f"{OP}: a view reaches beyond what it shows")
    if kind.dtype == base.dtype:
        return base.as_strided(kind.sizes, kind.strides, base.storage_offset() + offset)
    memory = base.as_strided((end - offset,), (1,), base.storage_offset() + offset)
    return memory.view(kind.dtype).as_strided(kind.sizes, kind.strides)


def _kept(box: Tensor, place: int, kind: Kind) -> Tensor:
    """What a box holds at a place."""
    tensor = _valued(in_box(box), place)
    if (tensor.dtype, tuple(tensor.shape)) != (kind.dtype, kind.sizes):
        raise ValueError(f"{OP}: what is held is {tensor.dtype} {list(tensor.shape)}, the program says {kind}")
    return tensor


def sequence(inputs: Sequence[Tensor], program: str) -> list[Tensor]:
    """The reference: step by step, each operator by its own reference or kernel.

    Raises:
        ValueError: a program that is not one, or tensors that are not what it says.
    """
    return [kind.empty(value).copy_(value) for value, kind in _walk(program, inputs, 0)]


def sequence_writing(written: Sequence[Tensor], inputs: Sequence[Tensor], program: str) -> None:
    """The same for programs that write to inputs.

    Args:
        written: the inputs that are written to, and then the tensors that the results are put into.
        inputs: those that are read.
        program: the program.
    """
    count = len(written) - len(_kinds(program))
    for into, (value, _) in zip(written[count:], _walk(program, [*written[:count], *inputs], count), strict=True):
        into.copy_(value)


def _walk(text: str, given: Sequence[Tensor] | None, written: int = 0) -> Iterator[tuple[Any, Kind]]:
    """Run a program, or without inputs only read it; gives the results with their kinds."""
    read = _Reader(text)
    if read.word() != "1":
        raise ValueError(f"{OP}: a program of another version")
    writes, count = read.count(), read.count()
    kinds = [read.kind() for _ in range(count)]
    if given is not None and (written != writes or len(given) != count):
        raise ValueError(f"{OP}: the program takes {writes} tensors that it writes to and {count - writes} that it reads")
    device = torch.device("meta") if given is None else None
    values = [torch.empty_strided(k.sizes, k.strides, dtype=k.dtype, device=device) for k in kinds] if given is None else []
    for i, (tensor, kind) in enumerate(zip(given or (), kinds, strict=False)):
        if tensor.dtype != kind.dtype or tuple(tensor.shape) != kind.sizes:
            raise ValueError(f"{OP}: input {i} is {tensor.dtype} {list(tensor.shape)}, the program says {kind}")
        values.append(tensor if i < writes else kind.restrided(tensor))
    roots = list(range(count))
    for _ in range(read.count()):
        name = read.word()
        if name == "view":
            base, offset, kind = read.number(), read.number(), read.kind()
            values.append(_shown(_valued(values, base), offset, kind))
            roots.append(roots[base])
            continue
        if name == "held":
            box, place, kind = _valued(values[:count], read.number()), read.number(), read.kind()
            values.append(_kept(box, place, kind) if given is not None else torch.empty_strided(
                kind.sizes, kind.strides, dtype=kind.dtype, device=device
            ))
            roots.append(-1)
            continue
        known = step_named(name)
        said = [read.kind() for _ in range(read.count())]
        arguments = [read.argument(kind, values) for kind in known.arguments]
        if given is None:
            made: Any = [torch.empty_strided(k.sizes, k.strides, dtype=k.dtype, device=device) for k in said]
        else:
            made = known.meaning(*arguments)
            made = () if name.endswith("_") else made if isinstance(made, (list, tuple)) else (made,)
        if name == "clone":
            made = [made[0].contiguous().view(said[0].sizes)]
        if [(t.dtype, tuple(t.shape)) for t in made] != [(k.dtype, k.sizes) for k in said]:
            raise ValueError(f"{OP}: {name} gave {[list(t.shape) for t in made]}, the program says {said}")
        roots += range(len(values), len(values) + len(said))
        values += [k.restrided(t) for k, t in zip(said, made, strict=True)]
    for _ in range(read.count()):
        number, kind = read.number(), read.kind()
        value = _valued(values, number)
        if number < count or roots[number] != number or (value.dtype, tuple(value.shape)) != (kind.dtype, kind.sizes):
            raise ValueError(f"{OP}: result {number} is an input, a view, or not what the program says of it")
        if kind.span() != value.numel():
            raise ValueError(f"{OP}: result {number} must be dense, got {kind}")
        yield value, kind
    if next(read.rest(), None) is not None:
        raise ValueError(f"{OP}: the program goes on after its end")


def _kinds(program: str) -> tuple[Kind, ...]:
    """The kinds of a program's results."""
    kinds = known_kinds.get(program)
    if kinds is None:
        kinds = _read_kinds(program)
        know(program, kinds)
    return kinds


def _read_kinds(program: str) -> tuple[Kind, ...]:
    return tuple(kind for _, kind in _walk(program, None))


def _fake(inputs: Sequence[Tensor], program: str) -> list[Tensor]:
    return [kind.empty(inputs[0]) for kind in _kinds(program)]


def _fake_writing(written: Sequence[Tensor], inputs: Sequence[Tensor], program: str) -> None:
    if len(written) < len(_kinds(program)):
        raise ValueError(f"{OP}: there must be a tensor for each result, got {len(written)}")


# No autograd formula: the pass that makes sequences leaves programs with gradients alone.
define("sequence(Tensor[] inputs, str program) -> Tensor[]", sequence, _fake)
define("sequence_writing(Tensor(a!)[] written, Tensor[] inputs, str program) -> ()", sequence_writing, _fake_writing)
