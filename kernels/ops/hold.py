"""``qcompile::hold``: tensors that compiled programs read and write without being given them at each call.

A tensor that goes from Python to a compiled program costs a few microseconds on the way: it is looked up, guarded, put into
lists, counted, unpacked, checked. A step over one token of a language model has two hundred of them, the same at every call:
caches, norms. A *box* is one small tensor that stands for them all. Whoever has the box gets the tensors themselves, not
copies, so what anybody writes to them is seen. What is written to them by a program that has the box, their version counters
do not count.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from qcompile.kernels.ops._library import define

__all__ = ["hold", "in_box", "let_go"]

_boxes: dict[int, tuple[Tensor, ...]] = {}
_numbers = itertools.count(1)
_lock = threading.Lock()


def hold(tensors: Sequence[Tensor]) -> Tensor:
    """Put tensors of the CPU into a box, int64 ``[1]``; they are held for as long as it lives, or until :func:`let_go`.

    Example:
        >>> from qcompile.kernels.ops.hold import hold, in_box
        >>> import torch
        >>> given = torch.zeros(2)
        >>> in_box(hold([given]))[0] is given
        True
    """
    with torch.inference_mode(False):
        box = torch.tensor([next(_numbers)])
    number = int(box)
    with _lock:
        _boxes[number] = tuple(tensors)
    torch.ops.qcompile.hold(box, list(tensors))
    weakref.finalize(box, _empty, number).atexit = False
    return box


def in_box(box: Tensor) -> tuple[Tensor, ...]:
    """What a box holds.

    Raises:
        ValueError: it holds nothing any more.
    """
    with _lock:
        found = _boxes.get(int(box))
    if found is None:
        raise ValueError("qcompile::hold: what this program held was let go; compile the model again")
    return found


def let_go(tensors: Iterable[Tensor]) -> None:
    """Empty all boxes that hold one of these tensors."""
    ids = {id(t) for t in tensors}
    with _lock:
        found = [number for number, held in _boxes.items() if any(id(t) in ids for t in held)]
    for number in found:
        _empty(number)


def _empty(number: int) -> None:
    with _lock:
        held = _boxes.pop(number, None)
    if held is not None:
        torch.ops.qcompile.hold(torch.tensor([number]), [])


def _nothing(box: Tensor, tensors: Sequence[Tensor]) -> None:
    """Only C++ has to be told."""


define("hold(Tensor box, Tensor[] tensors) -> ()", _nothing, _nothing)
