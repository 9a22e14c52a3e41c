"""What users call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar, overload

import torch
from torch import nn
from torch.export import ExportedProgram

from qcompile.eager.quantize import quantize_module
from qcompile.kernels.dtypes import QType, qint8
from qcompile.progress import progress_bar

M = TypeVar("M", bound=nn.Module)


@overload
def quantize(
    model: ExportedProgram, weights: QType | str | None = ..., activations: QType | str | None = ..., **options: Any
) -> ExportedProgram: ...
@overload
def quantize(
    model: M, weights: QType | str | None = ..., activations: QType | str | None = ..., **options: Any
) -> M: ...
def quantize(
    model: Any,
    weights: QType | str | None = qint8,
    activations: QType | str | None = None,
    *,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    group_size: int | None = None,
    optimizer: Any = None,
    **options: Any,
) -> Any:
    """Quantize the weights of an exported program, or a module in place.

    *An exported program*: every product of an activation with a constant weight is found in the graph, whatever the code
    that wrote it: linear, matmul, einsum, convolution, embedding, batched experts. The result is an ``ExportedProgram``
    again: it runs eagerly with ``.module()``, saves and loads with ``torch.export``, keeps dynamic shapes, mutated buffers
    and the names of parameters, and carries its own report (:func:`qcompile.report`); :func:`qcompile.compile` makes it
    fast. With ``activations`` the inputs of quantized linears are rounded, too: with one scale a token, or after
    :func:`calibrate` with a fixed one.

    *A module*, for what no tracer takes: it is changed in place and returned. Its layers (and parameters of two or three
    axes that its own code uses) read their weights through codes from now on; the float values stay, and can be trained,
    until :func:`qcompile.freeze`. With ``activations`` the inputs of layers are rounded, too: with one scale a token, or
    after :class:`qcompile.Calibration` with a fixed one. The schemes are those that the graph gets, and
    ``torch.compile(model, backend="qcompile")`` of the module reaches the same program.

    Args:
        model: what ``torch.export.export`` returned (it is not changed), or a module.
        weights: quantized dtype of the weights: ``qint2`` … ``qint8``, ``qfloat8`` and its variants, or a name. None, for a
            module: weights stay as they are.
        activations: ``qint8``, ``qfloat8`` and its variants, or a name.
        include: fnmatch patterns over parameter and module names; only these are quantized.
        exclude: patterns of those that stay float.
        group_size: elements along the reduction axis that share a scale; -1: all of them, one scale an output channel;
            None: 32 for integer dtypes, all for float8.
        optimizer: ``"max"`` (default), ``"mse"`` or ``"hqq"``: how the range that a scale covers is found; for a module also
            an object such as :class:`qcompile.HqqOptimizer`.
        options: further fields of :class:`qcompile.options.Options`: ``mode``, ``scale_dtype``, ``embeddings``,
            ``min_elements``.

    Raises:
        TypeError: ``model`` is neither an exported program nor a module.
        ValueError: an unknown option or dtype, a pattern that matches no weight, NaN or infinity in a weight, a module
            that is quantized already.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 64)).eval()
        >>> x = torch.randn(3, 64)
        >>> quantized = quantize(torch.export.export(model, (x,)), weights="qint8")
        >>> y = model(x)
        >>> bool((quantized.module()(x) - y).norm() < 0.02 * y.norm())
        True
        >>> model = quantize(model, weights="qint8")
        >>> bool((model(x) - y).norm() < 0.02 * y.norm())
        True
    """
    from qcompile.export import options_of, quantize_exported

    if isinstance(model, nn.Module):
        from qcompile.eager.request import request_of

        wanted = dict(include=include, exclude=exclude, group_size=group_size, **options)
        return quantize_module(model, request_of(weights, activations, optimizer, wanted))
    if not isinstance(model, ExportedProgram):
        raise TypeError(
            f"qcompile.quantize takes a torch.export.ExportedProgram or a torch.nn.Module, got {type(model).__name__}"
        )
    chosen = options_of(
        weights=weights, activations=activations, group_size=group_size, include=include, exclude=exclude,
        optimizer=optimizer, **options,
    )  # fmt: skip
    return quantize_exported(model, chosen, progress_bar())



@overload
def calibrate(
    model: M, samples: Iterable[Any], forward: Callable[[M, Any], Any] | None = ..., *, batches: int | None = ...,
    **options: Any,
) -> M: ...  # fmt: skip
@overload
def calibrate(
    model: ExportedProgram, samples: Iterable[Any], *, batches: int | None = ...,
    activations: QType | str | None = ..., **options: Any,
) -> ExportedProgram: ...  # fmt: skip
def calibrate(
    model: Any,
    samples: Iterable[Any],
    forward: Callable[[Any, Any], Any] | None = None,
    *,
    batches: int | None = None,
    activations: QType | str | None = None,
    **options: Any,
) -> Any:
    """Run a model over samples to find fixed scales for its activations, showing progress.

    *A module* that :func:`quantize` with ``activations`` returned gets its scales in place. *An exported program* that
    :func:`quantize` returned is not changed; in the one that is returned all that a quantized linear or convolution reads is
    rounded with one scale, found for each tensor.

    Args:
        model: what :func:`quantize` returned.
        samples: any iterable. A mapping is passed as keyword arguments, a tuple or list as positional ones, anything else
            as the only argument.
        forward: ``forward(model, sample)``, where that will not do (a loader's labels, say); for modules.
        batches: stop after that many.
        activations: the dtype, for an exported program that was quantized without; None: the one it was quantized with.
        options: of :class:`qcompile.Calibration` (of an exported program: ``method``, ``momentum``, ``percentile``).

    Returns:
        The model, or a calibrated copy of the program.

    Raises:
        ValueError: no samples, nothing in the model to calibrate, or no dtype for the activations.
        TypeError: ``model`` is neither an exported program nor a module.

    Example:
        >>> model, samples = torch.nn.Linear(128, 128).eval(), [torch.randn(4, 128) for _ in range(3)]
        >>> program = torch.export.export(model, (samples[0],))
        >>> program = calibrate(quantize(program, weights="qint8", activations="qint8"), samples)
        >>> from qcompile import report
        >>> report(program).rows[0].activations
        'qint8 static'
        >>> model = calibrate(quantize(model, weights="qint8", activations="qint8"), samples)
        >>> bool(model.input_scale < 0.1)
        True
    """
    if isinstance(model, nn.Module):
        from qcompile.eager.calibration import calibrate as calibrate_module

        if activations is not None:
            raise ValueError("activations= is for exported programs; a module gets it from qcompile.quantize")
        return calibrate_module(model, samples, forward, batches=batches, **options)
    if not isinstance(model, ExportedProgram):
        raise TypeError(
            f"qcompile.calibrate takes a torch.export.ExportedProgram or a torch.nn.Module, got {type(model).__name__}"
        )
    if forward is not None:
        raise ValueError("forward= is for modules; an exported program is called with the sample itself")
    from qcompile.calibrate_exported import calibrate_exported

    return calibrate_exported(model, samples, batches, activations, **options)


def compile(program: ExportedProgram, **options: Any) -> Callable[..., Any]:
    """A fast callable of a quantized program: operators fused, weights packed, the rest compiled by Inductor.

    Args:
        program: what :func:`quantize` returned (or a float program, which is compiled as it is).
        options: ``exact=True`` keeps activations float inside the kernels.

    Returns:
        A function with the signature of the model's forward; it runs without gradients.

    Raises:
        TypeError: not an exported program.
    """
    from qcompile.export import compile_exported

    if not isinstance(program, ExportedProgram):
        raise TypeError(f"qcompile.compile takes a torch.export.ExportedProgram, got {type(program).__name__}")
    return compile_exported(program, **options)


def trace(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """A quantized, compiled function: what ``torch.compile(function, backend="qcompile")`` gives, compiled in less time.

    The function is called once on fake tensors for each kind of arguments (shapes, strides, dtypes, and the values of what
    is no tensor), and what it computes is written down, where ``torch.compile`` follows its bytecode: a tenth of the time,
    for a language model. In exchange its Python runs at that one time only. What it decides there, by a module's settings
    say, is decided: make another one after changing them. Tensors are watched, though: it is compiled anew when a parameter,
    buffer or anything else that it reads is replaced, or given other ``.data``, and when a weight is written to of which it
    kept the float values (``keep_float``). What it reads must be kept in what it closes over, or in attributes, lists and
    dicts of that; arguments must not share memory with it.

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
        >>> model = torch.nn.Sequential(torch.nn.Linear(256, 512), torch.nn.SiLU(), torch.nn.Linear(512, 256)).eval()
        >>> x = torch.randn(3, 256)
        >>> want = model(x)
        >>> fast = trace(model, weights="qint8")
        >>> bool((fast(x) - want).norm() < 0.02 * want.norm())
        True
    """
    from qcompile.traced import Traced

    return Traced(function, options)


def aot_compile(program: ExportedProgram, path: str | Path, **options: Any) -> Path:
    """Compile a quantized program ahead of time, to an AOTInductor package that loads without tracing anything.

    In a fresh process, ``import qcompile`` and then :func:`aot_load`, which also loads the kernels.

    Args:
        program: what :func:`quantize` returned.
        path: the package to write, ending in ``.pt2``.
        options: as for :func:`compile`.

    Returns:
        The path of the package.
    """
    from qcompile.export import aot_compile_exported

    if not isinstance(program, ExportedProgram):
        raise TypeError(f"qcompile.aot_compile takes a torch.export.ExportedProgram, got {type(program).__name__}")
    return aot_compile_exported(program, path, **options)


def aot_load(path: str | Path) -> Callable[..., Any]:
    """Load a package that :func:`aot_compile` wrote, and the kernels that it calls.

    Raises:
        FileNotFoundError: there is no such file.
    """
    from qcompile.kernels.cpu.build import ensure_loaded

    if not Path(path).is_file():
        raise FileNotFoundError(f"no AOTInductor package at {str(path)!r}")
    ensure_loaded()
    return torch._inductor.aoti_load_package(str(path))
