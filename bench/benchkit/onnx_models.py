"""ONNX Runtime on whole models: exported by torch, rounded to int8 by ONNX Runtime's own tools, run with bound buffers."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["dynamic_int8", "export", "session", "static_int8"]


def export(model: nn.Module, inputs: Sequence[Tensor], file: Path, names: Sequence[str]) -> Path:
    """Write ``model`` with static shapes; ``names`` are those of its inputs."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        # The exporter on TorchScript: ONNX Runtime's optimizer knows the patterns that this one writes.
        torch.onnx.export(model, tuple(inputs), str(file), input_names=list(names), output_names=["out"], dynamo=False)
    return file


def optimized(file: Path, heads: int, hidden: int) -> Path:
    """The encoder with its attention, norms and activations fused by ONNX Runtime's optimizer for transformers."""
    from onnxruntime.transformers import optimizer

    target = file.with_suffix(".fused.onnx")
    made = optimizer.optimize_model(str(file), model_type="bert", num_heads=heads, hidden_size=hidden, opt_level=0)
    made.save_model_to_file(str(target))
    return target


def dynamic_int8(file: Path) -> Path:
    """Weights of products in int8 per tensor, activations rounded as they come: ``quantize_dynamic``'s defaults."""
    from onnx import TensorProto
    from onnxruntime.quantization import QuantType, quantize_dynamic

    target = file.with_suffix(".dynamic.onnx")
    # Of the results of fused nodes onnx cannot tell the type.
    options = {"DefaultTensorType": TensorProto.FLOAT}
    _quietly(lambda: quantize_dynamic(str(file), str(target), weight_type=QuantType.QInt8, extra_options=options))
    return target


def static_int8(file: Path, name: str, samples: Iterable[np.ndarray]) -> Path:
    """Weights per channel and activations per tensor in int8, calibrated on samples, in QDQ form."""
    from onnxruntime import quantization as q

    class Reader(q.CalibrationDataReader):
        def __init__(self) -> None:
            self.rest = iter([{name: sample} for sample in samples])

        def get_next(self) -> dict | None:
            return next(self.rest, None)

    ready, target = file.with_suffix(".ready.onnx"), file.with_suffix(".static.onnx")
    _quietly(lambda: q.shape_inference.quant_pre_process(str(file), str(ready)))
    _quietly(
        lambda: q.quantize_static(
            str(ready), str(target), Reader(), quant_format=q.QuantFormat.QDQ, per_channel=True,
            activation_type=q.QuantType.QUInt8, weight_type=q.QuantType.QInt8,
        )
    )  # fmt: skip
    return target


def session(file: Path, inputs: dict[str, Tensor], threads: int) -> Callable[[], Tensor]:
    """A function that runs a model once on these inputs and returns its first result, in the same memory each time."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    made = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    binding = made.io_binding()
    for name, value in inputs.items():
        binding.bind_cpu_input(name, value.numpy())
    out = made.run(None, {name: value.numpy() for name, value in inputs.items()})[0]
    kept = torch.from_numpy(np.empty_like(out))
    binding.bind_output(made.get_outputs()[0].name, "cpu", 0, out.dtype, out.shape, kept.data_ptr())

    def run() -> Tensor:
        made.run_with_iobinding(binding)
        return kept

    return run


def _quietly(call: Callable[[], object]) -> None:
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        call()
    finally:
        root.setLevel(level)
