"""What is known of a module before it runs: which parameters are weights of products, and how they are arranged."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from qcompile.eager.arrangement import Arrangement

__all__ = ["Layer", "describe"]

#: Layers of other libraries that compute ``x @ W``, by qualified name; nothing is imported for their sake.
COLUMNS = ("transformers.pytorch_utils.Conv1D",)


@dataclass(frozen=True)
class Layer:
    """What quantization does to one module.

    Attributes:
        weights: the parameters that are weights, by their own names.
        looked_up: they are tables.
        unsure: parameters that only the module's own code uses, by their own names: products as far as shapes tell.
        reads: whether its input is quantized where activations are.
        gives: whether its output may be.
        reason: why the weights stay float, or None.
    """

    weights: dict[str, Arrangement] = field(default_factory=dict)
    looked_up: bool = False
    unsure: dict[str, Arrangement] = field(default_factory=dict)
    reads: bool = False
    gives: bool = False
    reason: str | None = None


def describe(module: nn.Module) -> Layer | None:
    """The layer that a module is, by its own parameters; None where it has nothing to quantize."""
    if isinstance(module, nn.Linear):
        return Layer({"weight": _rows(module.weight)}, reads=True, gives=True)
    if isinstance(module, _ConvNd):
        kind = "conv_transposed" if isinstance(module, _ConvTransposeNd) else "conv"
        shape = tuple(module.weight.shape)
        return Layer({"weight": Arrangement(shape, kind, module.groups)}, reads=True, gives=True)  # type: ignore[arg-type]
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        reason = None if module.max_norm is None else "max_norm rescales the table in place at every lookup"
        return Layer({"weight": _rows(module.weight)}, looked_up=True, reason=reason)
    if _qualified(module) & set(COLUMNS):
        shape = tuple(module.weight.shape)  # type: ignore[arg-type]
        return Layer({"weight": Arrangement(shape, "columns")}, reads=True, gives=True)
    if isinstance(module, nn.MultiheadAttention):
        names = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
        return Layer({n: _rows(p) for n, p in _matrices(module).items() if n in names})
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        return Layer({n: _rows(p) for n, p in _matrices(module).items()})
    if is_norm(module):
        return Layer(gives=True)
    found = {n: _rows(p) for n, p in _matrices(module).items() if _may_be_product(p)}
    return Layer(unsure=found) if found else None


def is_norm(module: nn.Module) -> bool:
    """Layer norms and those like them: named so, with no parameters but vectors, and no modules inside."""
    vectors = all(p is None or p.dim() == 1 for p in module._parameters.values())
    return type(module).__name__.endswith("Norm") and vectors and not module._modules and bool(module._parameters)


def _matrices(module: nn.Module) -> dict[str, Tensor]:
    return {n: p for n, p in module._parameters.items() if p is not None and p.dim() >= 2 and p.is_floating_point()}


def _may_be_product(p: Tensor) -> bool:
    """Vectors that are broadcast have an axis of one; a product's operands are matrices, or stacks of them."""
    return p.dim() in (2, 3) and min(p.shape) > 1


def _rows(p: Tensor) -> Arrangement:
    return Arrangement(tuple(p.shape))


def _qualified(module: nn.Module) -> set[str]:
    return {f"{c.__module__}.{c.__qualname__}" for c in type(module).__mro__}
