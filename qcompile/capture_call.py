"""From a function to a :class:`~qcompile.passes.program.Program`, by calling it once on fake tensors.

What the function is given becomes inputs. A real tensor that its code comes upon (a parameter, a cache) is *lifted*: from
then on it is an input, too, and a fake tensor stands for it. Python's own work is done once, and is not in the program.
"""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.compiler import _compile_session_context
from torch.fx.experimental.proxy_tensor import _ProxyTensor, get_proxy_mode, make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from qcompile.captured import Captured, assemble, fake_of_weight
from qcompile.passes.held import INPUT
from qcompile.passes.program import Constant
from qcompile.reach import Kept, Reach
from qcompile.repeats import Repeats
from qcompile.retrace import CaptureError
from qcompile.weight_cache import WeightCache

__all__ = ["Called", "from_call"]


@dataclass(frozen=True)
class Called:
    """What a call was captured to.

    Attributes:
        captured: the program. Its inputs are the tensors among the arguments, then those that were lifted.
        kept: where the lifted tensors are kept, by position.
        outputs: the leaves of what the function returns; None where a tensor of the program goes.
        spec: the tree that they are the leaves of.
    """

    captured: Captured
    kept: dict[int, Kept]
    outputs: tuple[Any, ...]
    spec: pytree.TreeSpec


def from_call(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], cache: WeightCache) -> Called:
    """Call a function on fake tensors in the place of its arguments, and write down what it computes.

    Objects that the function holds are as they were before, afterwards, whatever happens.

    Raises:
        CaptureError: the function reads values to decide what to do, holds something else after a call than before, or reads
            tensors that are kept where nobody can see whether they are still the same ones.
    """
    try:
        reach = Reach(function)
        try:
            return _traced(function, args, kwargs, cache, reach, pre_dispatch=True)
        except _TransformError:
            return _traced(function, args, kwargs, cache, reach, pre_dispatch=False)
    except CaptureError as error:
        raise CaptureError(f"qcompile cannot write down a call of it: {error}") from error
    except Exception as error:
        raise CaptureError(f"qcompile cannot call it on fake tensors: {type(error).__name__}: {error}") from error


class _TransformError(Exception):
    """What torch.vmap and torch.func do happens between the two dispatchers, where only the later trace sees it."""


def _traced(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], cache: WeightCache, reach: Reach, *,
    pre_dispatch: bool,
) -> Called:  # fmt: skip
    leaves, spec = pytree.tree_flatten((args, kwargs))
    given = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    mode = FakeTensorMode(shape_env=ShapeEnv())
    fakes = [mode.from_tensor(t, static_shapes=True) for t in given]
    lifting = _Lifting(mode, cache, reach.name_of, pre_dispatch)
    returned: list[Any] = []

    def call(*inputs: Tensor) -> tuple[Any, ...]:
        fake = iter(inputs)
        called_args, called_kwargs = pytree.tree_unflatten(
            [next(fake) if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec
        )
        lifting.begin()
        with lifting:
            result = function(*called_args, **called_kwargs)
        returned[:] = pytree.tree_flatten(result)
        return tuple(lifting.lifted(leaf) for leaf in returned[0] if isinstance(leaf, Tensor))

    try:
        with mode, torch.no_grad(), _compile_session_context(), _told_by_modules(reach.paths):
            module = make_fx(call, tracing_mode="real", pre_dispatch=pre_dispatch, _allow_non_fake_inputs=True)(*fakes)
        changed = reach.changed(lifting.stands_for)
    finally:
        reach.restore()
    if changed:
        shown = ", ".join(changed[:5]) + (", …" if len(changed) > 5 else "")
        raise CaptureError(f"it leaves something else in {shown}, which a program of its tensors would not do")
    _drop_fakes(module)
    return _called(module, given, fakes, lifting, reach, returned, cache)


def _drop_fakes(module: fx.GraphModule) -> None:
    """Take out fake tensors that were made for the sake of a shape, with what is computed from them for nothing."""
    fakes = {name for name, held in module.named_buffers() if isinstance(held, FakeTensor)}
    if not fakes:
        return
    module.graph.eliminate_dead_code()
    lost = sorted({str(node.target) for node in module.graph.find_nodes(op="get_attr")} & fakes)
    if lost:
        raise CaptureError(f"it lost track of {', '.join(lost)}; please report this")
    for name in fakes:
        delattr(module, name)


def _called(
    module: fx.GraphModule, given: list[Tensor], fakes: Sequence[Tensor], lifting: _Lifting, reach: Reach,
    returned: list[Any], cache: WeightCache,
) -> Called:  # fmt: skip
    placeholders = module.graph.find_nodes(op="placeholder")
    for node, fake in zip(placeholders, fakes, strict=False):
        node.meta.setdefault("val", fake)
    inputs: list[Any] = list(given)
    kept: dict[int, Kept] = {}
    constants: dict[int, Constant] = {}
    for node, tensor, skeleton in lifting.found:
        traced = placeholders[len(given) + node]
        if not traced.users:  # only its shape was read, or its dtype
            module.graph.erase_node(traced)
            continue
        places = reach.kept.get(id(tensor))
        if places is None:
            raise CaptureError(
                f"it reads a tensor of shape {list(tensor.shape)} that is kept where nobody looks, as a global is"
            )
        i = len(inputs)
        inputs.append(tensor)
        kept[i] = next((p for p in places if p.in_module), places[0])
        if kept[i].in_module or isinstance(tensor, nn.Parameter):
            names = list(dict.fromkeys(p.name for p in places if p.in_module)) or [kept[i].name]
            constants[i] = Constant(
                names[0], skeleton, tuple(names[1:]), isinstance(tensor, nn.Parameter), index=i,
                identity=cache.identity(tensor),
            )  # fmt: skip
    for i, placeholder in enumerate(module.graph.find_nodes(op="placeholder")):
        placeholder.meta[INPUT] = i
    with torch.no_grad():
        captured = assemble(module, inputs, constants, lifting.mode, cache, steady=kept.keys())
    leaves, spec = returned
    return Called(captured, kept, tuple(None if isinstance(leaf, Tensor) else leaf for leaf in leaves), spec)


class _Lifting(TorchFunctionMode):
    """Puts fake tensors in the place of the real ones that code comes upon, and traces calls like an earlier one once."""

    def __init__(self, mode: FakeTensorMode, cache: WeightCache, name: Callable[[Tensor], str], pre_dispatch: bool) -> None:
        self.mode = mode
        #: The number of the placeholder, the tensor, and what stands for it in the program.
        self.found: list[tuple[int, Tensor, Tensor]] = []
        self._cache, self._name, self._pre_dispatch = cache, name, pre_dispatch
        self._fakes: dict[int, Tensor] = {}
        self._repeats = Repeats(mode)
        self._last: fx.Node | None = None

    def begin(self) -> None:
        """Tracing has begun: all inputs but those that will be lifted are in the graph."""
        self._last = next(iter(reversed(_tracer().graph.nodes)), None)

    def stands_for(self, fake: object, tensor: object) -> bool:
        """Whether a fake tensor is that of a tensor."""
        return isinstance(tensor, Tensor) and self._fakes.get(id(tensor)) is fake

    def lifted(self, tensor: Tensor) -> Tensor:
        """The fake that stands for a tensor."""
        if isinstance(tensor, FakeTensor) or torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            return tensor
        known = self._fakes.get(id(tensor))
        if known is not None:
            return known
        if type(tensor) not in (Tensor, nn.Parameter):
            raise TypeError(f"a {type(tensor).__name__} of shape {list(tensor.shape)} is no plain tensor")
        tracer = _tracer()
        with torch._C.DisableTorchFunction():
            fake: Any = self.mode.from_tensor(tensor, static_shapes=True)
            skeleton, fake = fake_of_weight(tensor, self._cache, self.mode, fake)
        graph = tracer.graph
        with graph.inserting_after(self._last) if self._last is not None else graph.inserting_before():
            self._last = node = graph.create_node("placeholder", re.sub(r"\W", "_", self._name(tensor)))
        node.target = node.name  # which the graph keeps different from all others
        node.meta["val"] = fake
        tracer.tensor_tracker[fake] = _ProxyTensor(tracer.proxy(node), None)
        self.found.append((len(self.found), tensor, skeleton))
        self._fakes[id(tensor)] = fake
        return fake

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        transformed = torch._C._functorch.peek_interpreter_stack() is not None
        if transformed and self._pre_dispatch:
            raise _TransformError
        args, kwargs = self._replaced(args), self._replaced(kwargs or {})
        if transformed or torch._C._is_any_autocast_enabled():  # the same call may be another one
            return func(*args, **kwargs)
        return self._repeats(_plainly, func, args, kwargs)

    def _replaced(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self.lifted(value)
        if type(value) in (tuple, list):
            return type(value)(map(self._replaced, value))
        if type(value) is dict:
            return {k: self._replaced(v) for k, v in value.items()}
        return value


def _plainly(target: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return target(*args, **kwargs)


def _tracer() -> Any:
    proxies = get_proxy_mode()
    if proxies is None:
        raise RuntimeError("a tensor was met outside of tracing")
    return proxies.tracer


@contextlib.contextmanager
def _told_by_modules(paths: dict[int, str]) -> Iterator[None]:
    """While it lasts, nodes of this thread know which modules they were traced in."""
    thread = threading.get_ident()
    stack: list[tuple[str, str]] = []

    def told() -> None:
        fx.traceback.get_current_meta()["nn_module_stack"] = {
            f"{i}:{path}": (path, kind) for i, (path, kind) in enumerate(stack)
        }

    def enter(module: nn.Module, _: Any) -> None:
        if threading.get_ident() == thread:
            kind = type(module)
            stack.append((paths.get(id(module), ""), f"{kind.__module__}.{kind.__qualname__}"))
            told()

    def leave(module: nn.Module, _args: Any, _result: Any) -> None:
        if threading.get_ident() == thread and stack:
            stack.pop()
            told()

    hooks = nn.modules.module
    with fx.traceback.preserve_node_meta():
        handles = (
            hooks.register_module_forward_pre_hook(enter),
            hooks.register_module_forward_hook(leave, always_call=True),
        )
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
