"""What was decided for one matmul-like operator: quantized with kernel K, or left alone because R."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass
class Decision:
    """One row of the report.

    Attributes:
        op: the kind of operator: ``linear``, ``conv``, ``embedding``, ``grouped_linear``, ``matmul``, ``rnn``.
        node: the node's name in the graph.
        weight: the user's name of the weight, empty for a matmul of two activations.
        module: path of the module that the operator came from, where the trace says.
        shape: of the weight as a matrix (or stack of matrices), rows first.
        scheme: text of the scheme, or None where left alone.
        kernel: what computes it, or None where left alone.
        reason: why it was left alone, or None.
        float_bytes: bytes of the float weight.
        bytes: bytes of codes, scale and zero point (of the float weight where left alone).
        error: relative error of the weight, ``|dequantized - float| / |float|`` in the Frobenius norm.
        activations: how the activations that it reads were rounded before: ``"qint8 static"``, ``"qint8 dynamic"``, or None.
        shared: the weight is counted in an earlier row.
    """

    op: str
    node: str
    weight: str = ""
    module: str = ""
    shape: tuple[int, ...] = ()
    scheme: str | None = None
    kernel: str | None = None
    reason: str | None = None
    float_bytes: int = 0
    bytes: int = 0
    error: float | None = None
    activations: str | None = None
    shared: bool = False

    @property
    def quantized(self) -> bool:
        """Whether the operator works on codes."""
        return self.scheme is not None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**asdict(self), "shape": list(self.shape)}

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Decision:
        """The inverse of :meth:`to_dict`; the values may come from a file, so nothing in them is trusted.

        Raises:
            ValueError: a key that is not a field, or a value of another type than the field's.
        """
        known = {f.name for f in fields(Decision)}
        if not isinstance(values, dict) or not set(values) <= known or not {"op", "node"} <= set(values):
            raise ValueError(f"not a report row: {values!r}; its keys must be among {sorted(known)}")
        for name, value in values.items():
            kinds = _TYPES[name]
            if type(value) not in kinds or (name == "shape" and any(type(size) is not int for size in value)):
                allowed = " or ".join(k.__name__ for k in kinds)
                raise ValueError(f"not a report row: {name} must be {allowed}, found {str(value)[:80]!r}")
        return Decision(**{**values, "shape": tuple(values.get("shape", ()))})


_TEXTS, _NUMBERS = ("op", "node", "weight", "module"), ("float_bytes", "bytes")

#: The types that each field may have in JSON.
_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(_TEXTS, (str,)),
    **dict.fromkeys(_NUMBERS, (int,)),
    **dict.fromkeys(("scheme", "kernel", "reason", "activations"), (str, type(None))),
    "shape": (list, tuple),
    "error": (float, int, type(None)),
    "shared": (bool,),
}
