"""The eager way: modules that are quantized in place, for what no tracer takes, on the same operators as the graphs."""

from __future__ import annotations

from qcompile.eager.calibration import Calibration, calibrate
from qcompile.eager.freezing import freeze
from qcompile.eager.functional import absmax_scale, quantize_activation, quantize_weight
from qcompile.eager.learned import learn_scales
from qcompile.eager.meta import meta_parameters
from qcompile.eager.mixin import QModuleMixin
from qcompile.eager.modules import QConv1d, QConv2d, QConv3d, QEmbedding, QLayerNorm, QLinear, register_qmodule
from qcompile.eager.optimizers import (
    AbsmaxOptimizer,
    AffineOptimizer,
    HqqOptimizer,
    MaxOptimizer,
    MseOptimizer,
    Optimizer,
    SymmetricOptimizer,
)
from qcompile.eager.qmap import quantization_map, requantize

__all__ = [
    "AbsmaxOptimizer", "AffineOptimizer", "Calibration", "HqqOptimizer", "MaxOptimizer", "MseOptimizer", "Optimizer",
    "QConv1d", "QConv2d", "QConv3d", "QEmbedding", "QLayerNorm", "QLinear", "QModuleMixin", "SymmetricOptimizer",
    "absmax_scale", "calibrate", "freeze", "learn_scales", "meta_parameters", "quantization_map", "quantize_activation",
    "quantize_weight", "register_qmodule", "requantize",
]  # fmt: skip
