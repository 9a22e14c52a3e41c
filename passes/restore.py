"""From a packed weight back to the logical one: packing can be undone."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from dataclasses import replace
from typing import Any

from qcompile.kernels.dispatch import Packed, kernels
from qcompile.kernels.qtensor import QTensor

Memo = MutableMapping[tuple[object, ...], Any]


def restore(memo: Memo, wanted: Callable[[tuple[object, ...]], bool]) -> dict[tuple[object, ...], Any]:
    """Bring back quantized values of which only the packed form is left, and put them into ``memo``.

    A program that was compiled earlier may have stacked a weight with its siblings, and kept nothing else; another one,
    through which gradients flow, say, wants it by itself. The float values may be gone by then, but codes, scale and zero
    point are all in the packed form.

    Args:
        memo: what programs remember (:attr:`~qcompile.passes.program.Program.memo`).
        wanted: which of its keys matter.

    Returns:
        What was put in; a memo that holds its values weakly needs somebody to hold them.
    """
    found: dict[tuple[object, ...], Any] = {}
    packed = [key for key in memo if key[0] == "packed"]
    for key in [k for k in memo if k[0] == "weight" and wanted(k)]:
        quantized, error = memo[key]
        if not quantized.data.is_meta:
            continue
        # As insert() of quantize_weights names the codes.
        name = ("q", key[1], quantized.scheme, key[3], "data")
        for source in packed:
            value = _unpacked(source, memo[source], name, quantized)
            if value is not None:
                found[key] = memo[key] = (value, error)
                break
    return found


def _unpacked(key: tuple[object, ...], packed: Packed, name: tuple[object, ...], like: QTensor) -> QTensor | None:
    """The value named ``name`` out of a packed weight, which may be a stack; None if it is not in there."""
    _, origin, pack, parts, glu = key
    stacked = isinstance(origin, tuple) and origin[0] == "stack"
    members = origin[1:] if stacked else (origin,)  # type: ignore[index]
    unpack = next((k.unpack for k in kernels() if k.pack is pack), None)
    if name not in members or unpack is None or packed.tensors[0] is None or packed.tensors[0].is_meta:
        return None
    rows = packed.sizes["rows"]
    sizes = list(parts) if parts else [rows // len(members)] * len(members)  # type: ignore[call-overload]
    whole = unpack(packed, like.scheme, (rows, *like.shape[1:]), parts, glu)  # type: ignore[arg-type]
    if not stacked:
        return whole
    at = members.index(name)
    chosen = slice(sum(sizes[:at]), sum(sizes[: at + 1]))
    zero = None if whole.zero is None else whole.zero[chosen].clone()
    return replace(whole, data=whole.data[chosen].clone(), scale=whole.scale[chosen].clone(), zero=zero, shape=like.shape)
