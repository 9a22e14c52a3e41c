"""A quantizing compiler for PyTorch: any traceable model in, a smaller and faster one out.

Three ways in::

    torch.compile(model, backend="qcompile")                   # one line
    qcompile.quantize(exported_program, weights=qcompile.qint4)  # graph in, graph out
    qcompile.quantize(model, weights=qcompile.qint8)             # eager modules, in place
"""

from __future__ import annotations

from qcompile.api import aot_compile, aot_load, calibrate, compile, quantize, trace
from qcompile.eager import (
    AbsmaxOptimizer,
    AffineOptimizer,
    Calibration,
    HqqOptimizer,
    MaxOptimizer,
    MseOptimizer,
    Optimizer,
    QConv1d,
    QConv2d,
    QConv3d,
    QEmbedding,
    QLayerNorm,
    QLinear,
    QModuleMixin,
    SymmetricOptimizer,
    absmax_scale,
    freeze,
    learn_scales,
    meta_parameters,
    quantization_map,
    quantize_activation,
    quantize_weight,
    register_qmodule,
    requantize,
)
from qcompile.generation import Decoder, generate
from qcompile.kernels import (
    QTensor,
    QType,
    Scheme,
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
from qcompile.report import Report, report
from qcompile.serialization import load, save

__version__ = "0.1.0"

__all__ = [
    "AbsmaxOptimizer", "AffineOptimizer", "Calibration", "Decoder", "HqqOptimizer", "MaxOptimizer", "MseOptimizer",
    "Optimizer", "QConv1d", "QConv2d", "QConv3d", "QEmbedding", "QLayerNorm", "QLinear", "QModuleMixin", "QTensor",
    "QType", "Report", "Scheme", "SymmetricOptimizer", "absmax_scale", "aot_compile", "aot_load", "calibrate", "compile",
    "freeze", "generate", "learn_scales", "load", "meta_parameters", "qfloat8", "qfloat8_e4m3fn", "qfloat8_e4m3fnuz",
    "qfloat8_e5m2", "qint2", "qint3", "qint4", "qint5", "qint6", "qint8", "qtype", "qtypes", "quantization_map",
    "quantize", "quantize_activation", "quantize_weight", "register_qmodule", "report", "requantize", "save",
    "trace",
]  # fmt: skip
