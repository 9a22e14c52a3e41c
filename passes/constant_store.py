"""Constants that sequences read lie together in one piece of memory.

Each tensor that goes from Python to an operator costs about a microsecond: it is unpacked, put into lists, counted, checked.
A step over one token reads hundreds of packed weights, and for each the same at every call. Put behind one another they are
one tensor of bytes, and the program says where in it each begins. The memory may also have large pages then, which reading
gigabytes a second through small ones is slower without.

Packed weights move there. Biases, scales and weights of norms are copied: they are little, and may be the user's. A module's
stay where they are: the user may write to them between two calls in ways that no version counts (``p.data.mul_()``); a
sequence finds them by a number (:mod:`qcompile.passes.held`). Those of an exported program are its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, fx

from qcompile.kernels.memory import ask_for_large_pages
from qcompile.passes.program import Constant, Program

_ALIGNED = 256  # bytes: what kernels stream begins with a cache line, and nothing else is in it
_LITTLE = 64 << 10  # bytes: more is not held twice


class Stored(NamedTuple):
    """Where a constant lies: the placeholder of a tensor of bytes, and the first of these that are its own."""

    store: fx.Node
    offset: int


def store_constants(program: Program, nodes: Iterable[fx.Node]) -> dict[fx.Node, Stored]:
    """Find or make the memory that constants share, as constants of the program; those that are left alone are not named.

    Only constants that were made for this program move: another program may be running on what it shares with this one.
    Those that an earlier program moved are found where they are. Of what is left, little vectors of floats are copied.
    """
    held = {n: c for n in nodes if (c := program.constant(n)) is not None and _is_plain(c)}
    found = _moved(program, held)
    copied = {n: c for n, c in held.items() if n not in found and _is_little(c)}
    return found | _copied(program, copied)


def _moved(program: Program, held: Mapping[fx.Node, Constant]) -> dict[fx.Node, Stored]:
    given = {id(t) for original in program.originals.values() for t in original.packed.tensors}
    made = {n: c for n, c in held.items() if c.index is None and type(c.tensor) is Tensor and id(c.tensor) not in given}
    loose = {id(c.tensor): c.tensor for c in made.values() if c.fresh and not _is_part(c.tensor)}
    if len(loose) > 1:
        # Each frees its own memory as soon as it has been copied.
        for tensor, place in zip(loose.values(), places(list(loose.values())), strict=True):
            with torch.inference_mode(tensor.is_inference()), torch.no_grad():
                tensor.data = place.copy_(tensor)
    shared: dict[int, dict[fx.Node, Tensor]] = {}
    for node, constant in made.items():
        if _is_part(constant.tensor):
            shared.setdefault(constant.tensor.untyped_storage().data_ptr(), {})[node] = constant.tensor
    found: dict[fx.Node, Stored] = {}
    for parts in shared.values():
        if len(parts) > 1:
            found |= _stored(program, "packed", parts, tuple(parts.values()))
    return found


def _copied(program: Program, held: Mapping[fx.Node, Constant]) -> dict[fx.Node, Stored]:
    if len(held) < 2:
        return {}
    copies = list(places([c.tensor for c in held.values()]))
    with torch.no_grad():
        for constant, place in zip(held.values(), copies, strict=True):
            place.copy_(constant.tensor)
    # A later program finds what passes made of a weight as long as this one keeps it.
    kept = tuple(c.tensor for c in held.values() if c.index is None)
    return _stored(program, "little", dict(zip(held, copies, strict=True)), kept)


def _stored(program: Program, name: str, parts: Mapping[fx.Node, Tensor], kept: tuple[Tensor, ...]) -> dict[fx.Node, Stored]:
    """Add the memory that parts share; `kept`: tensors that live as long as it is used."""
    whole = torch.empty(0, dtype=torch.uint8).set_(next(iter(parts.values())).untyped_storage())
    store = program.add_constant(name, whole)
    program.constants[store.name].parts = kept
    return {node: Stored(store, part.data_ptr() - whole.data_ptr()) for node, part in parts.items()}


def _is_plain(constant: Constant) -> bool:
    """Whether a constant is a value that nothing will change."""
    t = constant.tensor
    steady = constant.fixed and not (constant.mutated or constant.receives_grad)
    known = type(t) in (Tensor, torch.nn.Parameter) and t.layout == torch.strided
    return steady and known and t.device.type == "cpu" and t.numel() > 0 and t.is_contiguous()


def _is_little(constant: Constant) -> bool:
    """Whether a copy costs nothing: biases, scales, weights of norms."""
    return constant.tensor.is_floating_point() and constant.tensor.dim() < 2 and constant.tensor.nbytes <= _LITTLE


def _is_part(tensor: Tensor) -> bool:
    return tensor.untyped_storage().nbytes() > tensor.nbytes


def places(tensors: Sequence[Tensor]) -> Iterator[Tensor]:
    """Memory for tensors of these kinds (they may be on meta), in one piece, of which nothing is touched before its turn."""
    sizes = [-(-t.nbytes // _ALIGNED) * _ALIGNED for t in tensors]
    memory = torch.empty(sum(sizes), dtype=torch.uint8)
    ask_for_large_pages(memory)
    for t, place in zip(tensors, memory.split(sizes), strict=True):
        place[t.nbytes :].zero_()  # nothing is left to chance: compiled programs are found again by what they hold
        yield place[: t.nbytes].view(t.dtype).view(t.shape)
