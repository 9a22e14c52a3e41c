"""A view of a frozen weight's float value, for which there is no view of its codes: to be read only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

__all__ = ["DecodedView", "check_not_written"]


class DecodedView(torch.Tensor):
    """What ``weight[0]`` or ``weight.view(-1)`` of a frozen weight is.

    Its memory was decoded for it alone. A plain tensor would take what is written to it, and it would be lost.
    """

    value: Tensor

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def of(value: Tensor) -> DecodedView:
        """A view that reads ``value``."""
        made = torch.Tensor._make_wrapper_subclass(
            DecodedView, value.shape, strides=value.stride(), storage_offset=value.storage_offset(), dtype=value.dtype,
            device=value.device, requires_grad=False,
        )  # fmt: skip
        made.value = value
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        check_not_written(func, args, kwargs, DecodedView)
        args, kwargs = tree_map_only(DecodedView, lambda v: v.value, (args, kwargs))
        return seen_through(func, func(*args, **kwargs))

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"DecodedView({self.value!r})"


def seen_through(func: Any, result: Any) -> Any:
    """The result of an operator on a decoded value: where it is a view, one that cannot be written to."""
    return tree_map_only(Tensor, DecodedView.of, result) if func.is_view else result


def check_not_written(func: Any, args: Sequence[Any], kwargs: dict[str, Any], kind: type[Tensor]) -> None:
    """Raise where an operator would write to a tensor of class ``kind``.

    Raises:
        TypeError: it would.
    """
    for i, argument in enumerate(func._schema.arguments):
        given = args[i] if i < len(args) else kwargs.get(argument.name)
        if argument.is_write and isinstance(given, kind):
            raise TypeError(
                f"{func} would write to a frozen weight, which holds codes; change the float weight before qcompile.freeze, "
                f"or load other codes with load_state_dict"
            )
