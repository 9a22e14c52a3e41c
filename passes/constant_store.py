"""Constants that sequences read lie together in one piece of memory.

Each tensor that goes from Python to an operator costs about a microsecond: it is unpacked, put into lists, counted, checked.
A step over one token reads hundreds of packed weights, and for each the same at every call. Put behind one another they are
one tensor of bytes, and the program says where in it each begins. The memory may also have large pages then, which reading
gigabytes a second through small ones is slower without.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, fx

from qcompile.kernels.memory import ask_for_large_pages
from qcompile.passes.program import Constant, Program

_ALIGNED = 256  # bytes: what kernels stream begins with a cache line, and nothing else is in it


class Stored(NamedTuple):
    """Where a constant lies: the placeholder of a tensor of bytes, and the first of these that are its own."""

    store: fx.Node
    offset: int


def store_constants(program: Program, nodes: Iterable[fx.Node]) -> dict[fx.Node, Stored]:
    """Find or make the memory that constants share, as constants of the program; those that are left alone are not named.

    Only constants that were made for this program move: another program may be running on what it shares with this one.
    Those that an earlier program moved are found where they are.
    """
    given = {id(t) for original in program.originals.values() for t in original.packed.tensors}
    held = {n: c for n in nodes if (c := program.constant(n)) is not None and _is_plain(c) and id(c.tensor) not in given}
    loose = [c for c in held.values() if c.fresh and not _is_part(c.tensor)]
    if len(loose) > 1:
        _move([c.tensor for c in loose])
    shared: dict[int, dict[fx.Node, Constant]] = {}
    for node, constant in held.items():
        if _is_part(constant.tensor):
            shared.setdefault(constant.tensor.untyped_storage().data_ptr(), {})[node] = constant
    found: dict[fx.Node, Stored] = {}
    for parts in shared.values():
        if len(parts) < 2:
            continue
        tensors = tuple(c.tensor for c in parts.values())
        whole = torch.empty(0, dtype=torch.uint8).set_(tensors[0].untyped_storage())
        store = program.add_constant("packed", whole)
        program.constants[store.name].parts = tensors
        for node, constant in parts.items():
            found[node] = Stored(store, constant.tensor.data_ptr() - whole.data_ptr())
    return found


def _is_plain(constant: Constant) -> bool:
    """Whether a constant is a value that a pass made, which nothing will change."""
    t = constant.tensor
    made = constant.index is None and not (constant.mutated or constant.receives_grad)
    return made and type(t) is Tensor and t.device.type == "cpu" and t.numel() > 0 and t.is_contiguous()


def _is_part(tensor: Tensor) -> bool:
    return tensor.untyped_storage().nbytes() > tensor.nbytes


def _move(tensors: list[Tensor]) -> None:
    """Put tensors into memory that they share; each frees its own as soon as it has been copied."""
    tensors = list({id(t): t for t in tensors}.values())
    sizes = [-(-t.nbytes // _ALIGNED) * _ALIGNED for t in tensors]
    memory = torch.empty(sum(sizes), dtype=torch.uint8)
    ask_for_large_pages(memory)
    for tensor, place in zip(tensors, memory.split(sizes), strict=True):
        copy = place[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        with torch.inference_mode(tensor.is_inference()), torch.no_grad():
            tensor.data = copy.copy_(tensor)
