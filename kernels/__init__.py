"""Numerics: quantized dtypes, schemes, logical values, ops, packed layouts and device kernels.

The lowest of the three floors: nothing here imports :mod:`qcompile.passes` or the front ends. Importing it registers
the ``torch.ops.qcompile.*`` operators and does nothing else; no compiler runs before a kernel is asked for.
"""

from __future__ import annotations

import sys

if __name__ == "kernels":  # pragma: no cover - only when the checkout's root is on sys.path
    # With this checkout as working directory, `import kernels` would find this folder instead of the unrelated
    # distribution of the same name that other libraries look for. Hand over to the real one; where there is none, be
    # what a folder without __init__.py would be: an empty package without a file, which they take for "not installed"
    # (an ImportError they do not expect here, since the search for the name succeeded).
    import importlib.machinery
    import importlib.util
    from pathlib import Path

    _here = Path(__file__).resolve().parent.parent
    _paths = [p for p in sys.path if Path(p or ".").resolve() != _here]
    _spec = importlib.machinery.PathFinder.find_spec("kernels", _paths)
    if _spec is None or _spec.loader is None:
        del __file__
        __path__ = []
    else:
        _module = importlib.util.module_from_spec(_spec)
        sys.modules["kernels"] = _module
        _spec.loader.exec_module(_module)
else:
    from qcompile.kernels import ops
    from qcompile.kernels.cpu import conv_kernels as _conv_kernels  # noqa: F401  (fills the dispatch table)
    from qcompile.kernels.cpu import tiled_kernels as _tiled_kernels  # noqa: F401  (fills the dispatch table)
    from qcompile.kernels.cuda import cuda_kernels as _cuda_kernels  # noqa: F401
    from qcompile.kernels.dtypes import (
        QType,
        qfloat8,
        qfloat8_e4m3fn,
        qfloat8_e4m3fnuz,
        qfloat8_e5m2,
        qint2,
        qint3,
        qint4,
        qint5,
        qint6,
        qint8,
        qtype,
        qtypes,
    )
    from qcompile.kernels.metal import metal_kernels as _metal_kernels  # noqa: F401
    from qcompile.kernels.qtensor import QTensor
    from qcompile.kernels.scheme import PerBlock, PerChannel, PerGroup, PerTensor, Scheme
    from qcompile.kernels.triton import register as _triton_kernels  # noqa: F401  (as above)
    from qcompile.kernels.triton import register_codes as _code_kernels  # noqa: F401

    __all__ = [
        "PerBlock", "PerChannel", "PerGroup", "PerTensor", "QTensor", "QType", "Scheme", "ops", "qfloat8",
        "qfloat8_e4m3fn", "qfloat8_e4m3fnuz", "qfloat8_e5m2", "qint2", "qint3", "qint4", "qint5", "qint6", "qint8",
        "qtype", "qtypes",
    ]  # fmt: skip
