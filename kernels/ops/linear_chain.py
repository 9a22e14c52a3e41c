"""``qcompile::linear_chain``: linears on packed weights that feed one another, over few rows.

Values are numbered: the inputs first, then what each stage gives. A stage is these numbers, -1 for what it does not have::

    source   the value that it reads          norm     constant: weight of a root mean square norm before it
    codes, scale, zero, bias                  constants of the packed weight
    bits, group_size, activation, glu         as in linear_tiled; the activation as an index of ACTIVATIONS
    add      the value that is added          parts    how many outputs, and then the rows of each

``y = act(rms_norm(x) @ W.T + bias) [+ add]``. One call and one parallel region stand for all of them, which is what a token
costs where linears are small.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qcompile.kernels.ops._library import define
from qcompile.kernels.ops._tiled import ACTIVATIONS
from qcompile.kernels.ops.linear_tiled import linear_tiled
from qcompile.kernels.ops.linear_tiled_split import linear_tiled_split

#: How many rows and stages the CPU kernel takes.
MOST_ROWS, MOST_STAGES = 8, 8

_OP = "qcompile::linear_chain"
_SCHEMA = "linear_chain(Tensor[] inputs, Tensor[] constants, int[] stages, float[] eps, int[] results) -> Tensor[]"


@dataclass(frozen=True)
class Stage:
    """One linear of a chain; the fields are those of the module's docstring."""

    source: int
    norm: int
    codes: int
    scale: int
    zero: int
    bias: int
    bits: int
    group_size: int
    activation: str
    glu: bool
    add: int
    parts: tuple[int, ...]

    def numbers(self) -> list[int]:
        """As the operator takes it."""
        head = (self.source, self.norm, self.codes, self.scale, self.zero, self.bias, self.bits, self.group_size)
        return [*head, list(ACTIVATIONS).index(self.activation), int(self.glu), self.add, len(self.parts), *self.parts]


def read_stages(numbers: Sequence[int], count: int) -> Iterator[Stage]:
    """The stages that ``numbers`` describe.

    Raises:
        ValueError: there are not ``count`` of them.
    """
    at = 0
    for _ in range(count):
        head, rest = numbers[at : at + 12], at + 12
        if len(head) < 12 or head[11] < 1 or rest + head[11] > len(numbers) or not 0 <= head[8] < len(ACTIVATIONS):
            raise ValueError(f"{_OP}: {list(numbers)} does not describe {count} stages")
        parts = tuple(numbers[rest : rest + head[11]])
        source, norm, codes, scale, zero, bias, bits, group_size, activation, glu, add, _ = head
        name = list(ACTIVATIONS)[activation]
        yield Stage(source, norm, codes, scale, zero, bias, bits, group_size, name, bool(glu), add, parts)
        at = rest + head[11]
    if at != len(numbers):
        raise ValueError(f"{_OP}: {list(numbers)} describes more than {count} stages")


def _check(inputs: Sequence[Tensor], count: int) -> None:
    if not inputs:
        raise ValueError(f"{_OP}: there must be an input")
    if not 1 <= count <= MOST_STAGES:
        raise ValueError(f"{_OP}: there must be 1..{MOST_STAGES} stages, got {count}")
    rows = inputs[0].shape[:-1].numel()
    if rows > MOST_ROWS:
        raise ValueError(f"{_OP}: at most {MOST_ROWS} rows, got {rows}")


def linear_chain(
    inputs: Sequence[Tensor],
    constants: Sequence[Tensor],
    stages: Sequence[int],
    eps: Sequence[float],
    results: Sequence[int],
) -> list[Tensor]:
    """The reference, in plain torch and float32, each value in the dtype of the inputs; raises ValueError on a mismatch."""
    _check(inputs, len(eps))
    values = list(inputs)

    def held(index: int) -> Tensor | None:
        return None if index == -1 else constants[index]

    for stage, small in zip(read_stages(stages, len(eps)), eps, strict=True):
        x, norm = values[stage.source], held(stage.norm)
        if norm is not None:
            x = torch.nn.functional.rms_norm(x.float(), x.shape[-1:], norm.float(), small)
        weight = (constants[stage.codes], constants[stage.scale], held(stage.zero), held(stage.bias))
        sizes = (stage.bits, stage.group_size)
        if len(stage.parts) > 1:
            made = linear_tiled_split(x, *weight, *sizes, stage.parts)
        else:
            add = None if stage.add == -1 else values[stage.add].to(x.dtype)
            made = [linear_tiled(x, *weight, *sizes, stage.parts[0], stage.activation, None, add, stage.glu)]
        values += [y.to(inputs[0].dtype) for y in made]
    return [values[i] for i in results]


def _fake(
    inputs: Sequence[Tensor],
    constants: Sequence[Tensor],
    stages: Sequence[int],
    eps: Sequence[float],
    results: Sequence[int],
) -> list[Tensor]:
    _check(inputs, len(eps))
    widths = [t.shape[-1] for t in inputs]
    for stage in read_stages(stages, len(eps)):
        widths += stage.parts
    return [inputs[0].new_empty([*inputs[0].shape[:-1], widths[i]]) for i in results]


# No autograd formula: the pass that makes chains leaves programs with gradients alone.
define(_SCHEMA, linear_chain, _fake)
