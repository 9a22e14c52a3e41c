"""Building a model without memory for its parameters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

__all__ = ["meta_parameters"]


@contextmanager
def meta_parameters() -> Iterator[None]:
    """Inside the block new modules get their parameters on the meta device, and their buffers as ever.

    ``torch.device("meta")`` takes the buffers, too; those that are not persistent (rotary frequencies, position numbers)
    are then lost, for they are in no state dict.

    Example:
        >>> with meta_parameters():
        ...     layer = nn.BatchNorm1d(8)
        >>> layer.weight.device.type, layer.running_mean.device.type
        ('meta', 'cpu')
    """
    register = nn.Module.register_parameter

    def on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            param = type(param)(param.detach().to("meta"), requires_grad=param.requires_grad)
        register(self, name, param)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
