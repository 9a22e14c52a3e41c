"""``qcompile.trace``: a function compiled by calling it once on fake tensors, without Dynamo."""

from __future__ import annotations

import functools
import logging
import operator
import threading
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from qcompile.ahead import ask_ahead
from qcompile.capture_call import Called, from_call
from qcompile.compiling import cache, hand_on, quantized, release
from qcompile.garbage import collection_paused
from qcompile.inductor import cache_stamp, prepare
from qcompile.options import Options
from qcompile.passes.program import value
from qcompile.reach import Closed
from qcompile.retrace import CaptureError
from qcompile.weight_cache import is_released

__all__ = ["Traced"]

log = logging.getLogger("qcompile.traced")


class Traced(Closed):
    """What :func:`qcompile.trace` returns: call it as the function."""

    def __init__(self, function: Callable[..., Any], options: dict[str, Any]) -> None:
        if not callable(function):
            raise TypeError(f"qcompile.trace takes a function or a module, got {type(function).__name__}")
        self.function = function
        self._given, self._options = options, Options.parse(options)
        self._programs: dict[Hashable, _Program | _Followed] = {}
        self._lock = threading.RLock()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Not torch.compiler.is_compiling(): that is true as well where another thread compiles something.
        if torch.compiler.is_dynamo_compiling():
            return self.function(*args, **kwargs)
        if not kwargs and all(type(a) is Tensor for a in args):
            leaves, key = args, _key(args)
        else:
            flat, spec = pytree.tree_flatten((args, kwargs))
            if any(isinstance(leaf, FakeTensor) for leaf in flat):  # it is being exported, say
                return self.function(*args, **kwargs)
            leaves, key = tuple(flat), (spec, *_key(flat))
        program = self._programs.get(key)
        if program is None or not program.is_current():
            program = self._program(key, args, kwargs)
        with torch.no_grad():
            return program(leaves, args, kwargs)

    def _program(self, key: Hashable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Program | _Followed:
        with self._lock:
            program = self._programs.get(key)
            if program is not None and program.is_current():
                return program
            try:
                with torch.no_grad(), collection_paused():
                    program = _compiled(self.function, args, kwargs, self._options)
            except CaptureError as error:
                log.warning("%s; torch.compile follows its code instead, which takes longer", error)
                program = self._follower
            self._programs[key] = program
            return program

    @functools.cached_property
    def _follower(self) -> _Followed:
        from qcompile.backend import qcompile

        return _Followed(torch.compile(self.function, backend=qcompile, fullgraph=True, options=self._given))


def _key(leaves: Sequence[Any]) -> tuple[Hashable, ...]:
    """What arguments must have in common to go to one program."""
    kinds: list[Hashable] = [torch.get_autocast_dtype("cpu") if torch._C._is_any_autocast_enabled() else None]
    memory: dict[int, int] = {}
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            if type(leaf) not in (Tensor, torch.nn.Parameter) or leaf.layout != torch.strided:
                raise TypeError(f"qcompile.trace takes strided tensors, got a {type(leaf).__name__} of layout {leaf.layout}")
            shared = len(leaves) > 1 and memory.setdefault(leaf.untyped_storage().data_ptr(), len(memory))
            kinds.append((leaf.shape, leaf.stride(), leaf.dtype, leaf.device, shared))
        elif isinstance(leaf, (bool, int, float, str, type(None), torch.dtype, torch.device)):
            kinds.append((type(leaf), leaf.hex() if type(leaf) is float else leaf))  # -0.0 is not 0.0
        else:
            raise TypeError(
                f"qcompile.trace takes tensors, numbers, texts and None, in lists, tuples and dicts; "
                f"got a {type(leaf).__name__}"
            )
    return tuple(kinds)


@dataclass(frozen=True)
class _Kept:
    """Tensors that a program was compiled for, and what says that they are still the same."""

    #: All that lies between the function and these tensors, them too: ``containers[i][keys[i]] is held[i]``.
    containers: tuple[Any, ...]
    keys: tuple[Any, ...]
    held: tuple[Any, ...]
    #: Those that are no input of the program, with the addresses of their values.
    made_of: tuple[Tensor, ...]
    addresses: list[int]
    #: Those among them that can be written to, with their version counters.
    written: tuple[Tensor, ...]
    versions: list[int]

    @classmethod
    def of(cls, called: Called, dropped: Sequence[int], holding: frozenset[int]) -> _Kept:
        """The state of now, when the program was just compiled."""
        links = {(id(link.container), link.key): link for kept in called.kept.values() for link in kept.links}.values()
        made_of = tuple(called.captured.given[i] for i in dropped if i in called.captured.weights and i not in holding)
        written = tuple(t for t in made_of if not is_released(t) and not t.is_inference())
        return cls(
            tuple(k.container for k in links), tuple(k.key for k in links), tuple(k.held for k in links),
            made_of, [t.data_ptr() for t in made_of], written, [t._version for t in written],
        )  # fmt: skip

    def is_current(self) -> bool:
        """Whether they are the same, with the same values as far as these are in the program. 30 us for 300 tensors."""
        try:
            same = all(map(operator.is_, map(operator.getitem, self.containers, self.keys), self.held))
        except (KeyError, IndexError):
            return False
        return (
            same
            and list(map(Tensor.data_ptr, self.made_of)) == self.addresses
            and [t._version for t in self.written] == self.versions
        )


class _Program:
    """One compiled program, for one kind of arguments."""

    def __init__(self, called: Called, compiled: Callable[..., Any], wanted: Sequence[int], kept: _Kept) -> None:
        given = called.captured.given
        first = len(given) - len(called.kept)
        self._compiled, self._outputs, self._spec = compiled, called.outputs, called.spec
        self._arguments = tuple(i for i in wanted if i < first)
        self._lifted = tuple(given[i] for i in wanted if i >= first)
        self._single = called.outputs == (None,) and called.spec.is_leaf()
        self.is_current = kept.is_current

    def __call__(self, leaves: Sequence[Any], _args: Any, _kwargs: Any) -> Any:
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        results = self._compiled(*[tensors[i] for i in self._arguments], *self._lifted)
        if self._single:
            return results[0]
        results = iter(results)
        return pytree.tree_unflatten([next(results) if leaf is None else leaf for leaf in self._outputs], self._spec)


@dataclass(frozen=True)
class _Followed:
    """The function under ``torch.compile``, for kinds of arguments with which it cannot be traced."""

    function: Callable[..., Any]

    def __call__(self, leaves: Sequence[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                torch._dynamo.mark_static(leaf)
        return self.function(*args, **kwargs)

    def is_current(self) -> bool:
        """Dynamo has guards of its own."""
        return True


def _compiled(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], options: Options) -> _Program:
    from torch._inductor.compile_fx import compile_fx

    ask_ahead()
    prepare()
    called: list[Called] = []

    def capture() -> Any:
        called[:] = [from_call(function, args, kwargs, cache)]
        return called[0].captured

    captured = quantized(capture, getattr(function, "__name__", type(function).__name__), options)
    done = hand_on(captured)
    # Fake ones, whose sizes are numbers: of real ones Inductor would make sizes that may change from call to call.
    inputs = [value(node) for node in done.module.graph.find_nodes(op="placeholder")]
    with tracing(TracingContext(captured.program.fake_mode)):
        compiled: Any = compile_fx(done.module, inputs, config_patches=cache_stamp())
    if not options.keep_float:
        release(captured, done)
    done.module.graph = fx.Graph()  # which nobody reads any more
    return _Program(called[0], compiled, done.kept, _Kept.of(called[0], done.dropped, done.holding))
