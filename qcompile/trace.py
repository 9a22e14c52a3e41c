"""``qcompile.trace``: a function compiled by calling it once on fake tensors, without Dynamo."""

from __future__ import annotations

import logging
import operator
import threading
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._guards import TracingContext, tracing
from torch.utils import _pytree as pytree

from qcompile.ahead import ask_ahead
from qcompile.capture_call import Called, from_call
from qcompile.compiling import cache, hand_on, label_of, quantized, release
from qcompile.garbage import collection_paused
from qcompile.inductor import cache_stamp, prepare
from qcompile.options import Options
from qcompile.retrace import CaptureError
from qcompile.weight_cache import is_released

__all__ = ["Traced", "trace"]

log = logging.getLogger("qcompile.trace")


def trace(function: Callable[..., Any], **options: Any) -> Traced:
    """A quantized, compiled function: what ``torch.compile(function, backend="qcompile")`` gives, compiled in less time.

    The function is called once on fake tensors for each kind of arguments (shapes, strides, dtypes, and the values of what
    is no tensor), and what it computes is written down, where ``torch.compile`` follows its bytecode: a tenth of the time,
    for a language model. In exchange its Python runs at that one time only. What it decides there, by a module's settings
    say, is decided: make another one after changing them. These are seen, though, and compile it anew: parameters, buffers
    and other tensors that are replaced, by others or in their ``.data``, and weights written to, as far as their float values
    were kept (see ``keep_float``). Tensors that it reads must be kept in what it closes over, or in attributes, lists and
    dicts of that; arguments must not share memory with them.

    A function that cannot be written down so (it looks at values to decide what to do, or counts its calls in an attribute)
    is given to ``torch.compile`` instead, with a warning that says why.

    It computes without gradients. Float weights are released as :func:`qcompile.backend.qcompile` documents it.

    Args:
        function: a function or module of tensors, numbers, texts, and lists, tuples and dicts of these.
        options: of the backend: ``weights``, ``group_size``, …; see :class:`qcompile.options.Options`.

    Raises:
        ValueError: an unknown option, a value that is not allowed, or (when it is called) a weight that cannot be quantized.
        TypeError: ``function`` cannot be called; or (when it is called) an argument that is neither tensor nor plain value.

    Example:
        >>> import torch, qcompile
        >>> model = torch.nn.Sequential(torch.nn.Linear(256, 512), torch.nn.SiLU(), torch.nn.Linear(512, 256)).eval()
        >>> x = torch.randn(3, 256)
        >>> want = model(x)
        >>> fast = qcompile.trace(model, weights="qint8")
        >>> bool((fast(x) - want).norm() < 0.02 * want.norm())
        True
    """
    return Traced(function, options)


class Traced:
    """What :func:`trace` returns: call it as the function."""

    def __init__(self, function: Callable[..., Any], options: dict[str, Any]) -> None:
        if not callable(function):
            raise TypeError(f"qcompile.trace takes a function or a module, got {type(function).__name__}")
        self.function = function
        self._given, self._options = options, Options.parse(options)
        self._programs: dict[Hashable, _Program] = {}
        self._lock = threading.RLock()
        #: The function under torch.compile, where it cannot be traced.
        self._followed: Callable[..., Any] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.function(*args, **kwargs)
        if self._followed is not None:
            with torch.no_grad():
                return self._followed(*args, **kwargs)
        if not kwargs and all(type(a) is Tensor for a in args):
            leaves, key = args, _key(args)
        else:
            flat, spec = pytree.tree_flatten((args, kwargs))
            leaves, key = tuple(flat), (spec, *_key(flat))
        program = self._programs.get(key)
        if program is None or not program.is_current():
            program = self._program(key, args, kwargs)
            if program is None:
                return self(*args, **kwargs)
        return program(leaves)

    def _program(self, key: Hashable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Program | None:
        with self._lock:
            program = self._programs.get(key)
            if self._followed is not None or (program is not None and program.is_current()):
                return program
            try:
                with torch.no_grad(), collection_paused():
                    program = self._programs[key] = _compiled(self.function, args, kwargs, self._options)
            except CaptureError as error:
                from qcompile.backend import qcompile

                log.warning("%s; torch.compile follows its code instead, which takes longer", error)
                self._followed = torch.compile(
                    self.function, backend=qcompile, dynamic=False, fullgraph=True, options=self._given
                )
                return None
            return program


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
            kinds.append((type(leaf), leaf))
        else:
            raise TypeError(
                f"qcompile.trace takes tensors, numbers, texts and None, in lists, tuples and dicts; got a {type(leaf).__name__}"
            )
    return tuple(kinds)


@dataclass(frozen=True)
class _Kept:
    """Tensors that a program was compiled for, and what says that they are still the same."""

    containers: tuple[Any, ...]
    keys: tuple[Any, ...]
    tensors: tuple[Tensor, ...]
    #: Those that are no input of the program, with the addresses of their values.
    made_of: tuple[Tensor, ...]
    addresses: list[int]
    #: Those among them that can be written to, with their version counters.
    written: tuple[Tensor, ...]
    versions: list[int]

    @classmethod
    def of(cls, called: Called, dropped: Sequence[int], holding: frozenset[int]) -> _Kept:
        """The state of now, when the program was just compiled."""
        kept = called.kept.values()
        made_of = tuple(called.captured.given[i] for i in dropped if i in called.captured.weights and i not in holding)
        written = tuple(t for t in made_of if not is_released(t) and not t.is_inference())
        return cls(
            tuple(k.container for k in kept), tuple(k.key for k in kept), tuple(k.tensor for k in kept),
            made_of, [t.data_ptr() for t in made_of], written, [t._version for t in written],
        )  # fmt: skip

    def is_current(self) -> bool:
        """Whether they are the same, with the same values as far as these are in the program. 20 us for 300 tensors."""
        try:
            same = all(map(operator.is_, map(operator.getitem, self.containers, self.keys), self.tensors))
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

    def __call__(self, leaves: Sequence[Any]) -> Any:
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        with torch.no_grad():
            results = self._compiled(*[tensors[i] for i in self._arguments], *self._lifted)
        if self._single:
            return results[0]
        results = iter(results)
        return pytree.tree_unflatten([next(results) if leaf is None else leaf for leaf in self._outputs], self._spec)


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
    given = [captured.given[i] for i in done.kept]
    with tracing(TracingContext(captured.program.fake_mode)):
        compiled: Any = compile_fx(done.module, given, config_patches=cache_stamp())
    if not options.keep_float:
        release(captured, done)
    done.module.graph = fx.Graph()  # which nobody reads any more
    return _Program(called[0], compiled, done.kept, _Kept.of(called[0], done.dropped, done.holding))
