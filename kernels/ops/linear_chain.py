"""``qcompile::linear_chain``: linears on packed weights, and norms, that feed one another.

Values are numbered: the inputs first, then what each stage gives. A stage is these numbers, -1 for what it does not have::

    source   the value that it reads          norm, norm_bias   constants: weight and bias of a norm before it
    centered 1: a layer norm; 0: a root mean square norm
    codes, scale, zero, bias                  constants of the packed weight; codes -1: the stage is the norm alone
    bits, group_size, activation, glu         as in linear_tiled; the activation as an index of ACTIVATIONS
    add      the value that is added          parts    how many outputs, and then the rows of each

``y = act(norm(x) @ W.T + bias) [+ add]``. One call and one parallel region stand for all of them, which is what a token
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

_HEAD = 14  # numbers of a stage before its parts

_OP = "qcompile::linear_chain"
_SCHEMA = "linear_chain(Tensor[] inputs, Tensor[] constants, int[] stages, float[] eps, int[] results) -> Tensor[]"


@dataclass(frozen=True)
class Stage:
    """One linear of a chain; the fields are those of the module's docstring."""

    source: int
    norm: int
    norm_bias: int
    centered: bool
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
        head = (self.source, self.norm, self.norm_bias, int(self.centered), self.codes, self.scale, self.zero, self.bias)
        kind = (self.bits, self.group_size, list(ACTIVATIONS).index(self.activation), int(self.glu))
        return [*head, *kind, self.add, len(self.parts), *self.parts]


def read_stages(numbers: Sequence[int], count: int) -> Iterator[Stage]:
    """The stages that ``numbers`` describe.

    Raises:
        ValueError: there are not ``count`` of them.
    """
    at = 0
    for _ in range(count):
        head, rest = numbers[at : at + _HEAD], at + _HEAD
        if len(head) < _HEAD or head[-1] < 1 or rest + head[-1] > len(numbers) or not 0 <= head[10] < len(ACTIVATIONS):
            raise ValueError(f"{_OP}: {list(numbers)} does not describe {count} stages")
        source, norm, norm_bias, centered, codes, scale, zero, bias, bits, group_size, activation, glu, add, parts = head
        yield Stage(
            source, norm, norm_bias, bool(centered), codes, scale, zero, bias, bits, group_size,
            list(ACTIVATIONS)[activation], bool(glu), add, tuple(numbers[rest : rest + parts]),
        )  # fmt: skip
        at = rest + parts
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
            x = _norm(x.float(), norm, held(stage.norm_bias), stage.centered, small)
        if stage.codes == -1:
            values.append(x.to(inputs[0].dtype))
            continue
        weight = (constants[stage.codes], constants[stage.scale], held(stage.zero), held(stage.bias))
        sizes = (stage.bits, stage.group_size)
        if len(stage.parts) > 1:
            made = linear_tiled_split(x, *weight, *sizes, stage.parts)
        else:
            add = None if stage.add == -1 else values[stage.add].to(x.dtype)
            made = [linear_tiled(x, *weight, *sizes, stage.parts[0], stage.activation, None, add, stage.glu)]
        values += [y.to(inputs[0].dtype) for y in made]
    return [values[i] for i in results]


def _norm(x: Tensor, weight: Tensor, bias: Tensor | None, centered: bool, eps: float) -> Tensor:
    if centered:
        return torch.nn.functional.layer_norm(x, x.shape[-1:], weight.float(), None if bias is None else bias.float(), eps)
    normed = torch.nn.functional.rms_norm(x, x.shape[-1:], weight.float(), eps)
    return normed if bias is None else normed + bias.float()


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
