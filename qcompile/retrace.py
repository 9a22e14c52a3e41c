"""Dynamo's graph, traced once more to aten operators before autograd."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from qcompile.passes.held import INPUT
from qcompile.repeats import Repeats

__all__ = ["CaptureError", "retrace"]

_CHECKPOINTS = (torch.ops.higher_order.tag_activation_checkpoint, torch.ops.higher_order.wrap_activation_checkpoint)


class CaptureError(RuntimeError):
    """A captured graph could not be brought to aten operators; the message says at which operator."""


def retrace(gm: fx.GraphModule, fakes: Sequence[Any], mode: FakeTensorMode) -> fx.GraphModule:
    """The graph of aten operators that ``gm`` is on ``fakes``; its placeholders, in order, are those of ``gm``.

    Raises:
        CaptureError: something in the graph cannot be traced.
    """
    tracing = _Tracing(gm, mode)
    with mode, _real_tensors_allowed(mode), fx.traceback.preserve_node_meta():
        try:
            traced = make_fx(
                lambda *inputs: tracing.run(*inputs),
                tracing_mode="real",
                # What torch.vmap and torch.func do happens between the two dispatchers, where only the later trace sees it.
                pre_dispatch=not _has_transforms(gm),
                _allow_non_fake_inputs=True,
            )(*fakes)
        except Exception as error:
            at = tracing.where()
            raise CaptureError(
                f"qcompile cannot trace {at}: {error}; the eager way, qcompile.quantize(model), takes any module"
            ) from error
    lost = [name for name, held in traced.named_buffers() if isinstance(held, FakeTensor)]
    if lost:
        raise CaptureError(f"qcompile lost track of {', '.join(lost)} while it traced the graph; please report this")
    for i, (node, fake) in enumerate(zip(traced.graph.find_nodes(op="placeholder"), fakes, strict=True)):
        node.meta.setdefault("val", fake)
        node.meta[INPUT] = i
    return traced


class _Tracing(fx.Interpreter):
    """Runs the graph while it is traced.

    It remembers which node it is at, for the error message, and is inside the graph's own autocast regions: tracing before
    autograd writes down where a region begins and ends, but does not enter it.
    """

    def __init__(self, gm: fx.GraphModule, mode: FakeTensorMode) -> None:
        super().__init__(gm)
        self._at: fx.Node | None = None
        self._regions: dict[Any, torch.amp.autocast] = {}
        self._repeats = None if _has_transforms(gm) or _reshapes_in_place(gm) else Repeats(mode)

    def where(self) -> str:
        """The node that it is at, as text."""
        return "its first operator" if self._at is None else self._at.format_node() or self._at.name

    def run_node(self, n: fx.Node) -> Any:
        self._at = n
        result = super().run_node(n)
        if n.target is torch.amp.autocast_mode._enter_autocast:
            self._regions[n] = torch.amp.autocast(*n.args, **n.kwargs)  # type: ignore[arg-type]
            with torch._C.DisableTorchFunction():
                self._regions[n].__enter__()
        elif n.target is torch.amp.autocast_mode._exit_autocast:
            with torch._C.DisableTorchFunction():
                self._regions.pop(n.args[0]).__exit__(None, None, None)
        return result

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # A checkpoint computes what its body computes; here a backward pass keeps what it would have computed again.
        if target in _CHECKPOINTS:
            return args[0](*args[1:])
        return self._once(super().call_function, target, args, kwargs)

    def call_method(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self._once(super().call_method, target, args, kwargs)

    def _once(self, call: Callable[..., Any], target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # Inside a region the same call may be another one.
        if self._repeats is None or self._regions:
            return call(target, args, kwargs)
        return self._repeats(call, target, args, kwargs)


def _reshapes_in_place(gm: fx.GraphModule) -> bool:
    """Whether a graph may change the shape of a tensor in place: then a tensor's description does not stay its own."""
    for node in gm.graph.nodes:
        name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
        packet = getattr(torch.ops.aten, str(name), None) if str(name).endswith("_") and str(name).isidentifier() else None
        if packet is not None and any(torch.Tag.inplace_view in getattr(packet, o).tags for o in packet.overloads()):
            return True
    return False


def _has_transforms(gm: fx.GraphModule) -> bool:
    """Whether a graph holds calls of torch.vmap or torch.func."""
    return any(
        getattr(node.target, "__module__", None) == "torch._functorch.predispatch"
        for part in gm.modules()
        if isinstance(part, fx.GraphModule)
        for node in part.graph.nodes
    )


@contextlib.contextmanager
def _real_tensors_allowed(mode: FakeTensorMode) -> Iterator[None]:
    """Let the mode take the real tensors that a graph holds as attributes."""
    before = mode.allow_non_fake_inputs
    mode.allow_non_fake_inputs = True
    try:
        yield
    finally:
        mode.allow_non_fake_inputs = before
