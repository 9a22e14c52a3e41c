"""Tensors that a caller promises to pass at each call, so that compiled programs hold them instead of being given them."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from qcompile.kernels.ops.hold import let_go

__all__ = ["is_owned", "own"]

_owned: WeakIdKeyDictionary = WeakIdKeyDictionary()


def own(owner: object, tensors: Iterable[Tensor]) -> None:
    """Promise that these are what compiled programs get wherever they get them now, for as long as ``owner`` lives.

    A program that is compiled from now on holds them, guards that it would be given the same ones, and is compiled anew
    otherwise: right for a cache that belongs to what runs the model, wrong for one that is made for each call. They are let
    go with the owner.
    """
    tensors = list(tensors)
    for tensor in tensors:
        _owned[tensor] = True
    weakref.finalize(owner, _let_go, [weakref.ref(t) for t in tensors]).atexit = False


def is_owned(tensor: object) -> bool:
    """Whether somebody promised so."""
    return isinstance(tensor, Tensor) and tensor in _owned


def _let_go(references: Sequence[weakref.ref[Tensor]]) -> None:
    let_go(t for r in references if (t := r()) is not None)
