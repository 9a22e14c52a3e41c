"""The eager way: modules that are quantized in place, for what no tracer takes, on the same operators as the graphs."""

from __future__ import annotations

from qcompile.eager.calibration import Calibration, calibrate
from qcompile.eager.freezing import freeze
from qcompile.eager.meta import meta_parameters
from qcompile.eager.mixin import QModuleMixin
from qcompile.eager.modules import QConv1d, QConv2d, QConv3d, QEmbedding, QLayerNorm, QLinear, register_qmodule
from qcompile.eager.qmap import quantization_map, requantize

__all__ = [
    "Calibration", "QConv1d", "QConv2d", "QConv3d", "QEmbedding", "QLayerNorm", "QLinear", "QModuleMixin", "calibrate",
    "freeze", "meta_parameters", "quantization_map", "register_qmodule", "requantize",
]  # fmt: skip
