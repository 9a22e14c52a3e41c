"""ONNX Runtime's quantized linear, ``MatMulNBits``: a model of several of them on one input, run as one call."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

__all__ = ["matmul_nbits"]


def matmul_nbits(
    weights: Sequence[tuple[Tensor, Tensor]], bits: int, group: int, accuracy: int, threads: int
) -> Callable[[Tensor], Callable[[], object]]:
    """A session with one node for each weight.

    Args:
        weights: codes uint8 ``[N, K]`` with zero point ``2 ** (bits - 1)``, and scales float32 ``[N, ceil(K / group)]``.
        bits, group: of the weights; ``group`` is a power of two of 16 or more.
        accuracy: ONNX Runtime's ``accuracy_level``: 4 rounds activations to int8, 0 keeps float32.
        threads: of the session.

    Returns:
        A function from ``x``, float32 ``[M, K]``, to a function that runs all nodes once and returns the last one's
        result. Inputs and outputs are bound once; all other nodes write to one buffer, as layers of a model would.
    """
    import onnxruntime
    from onnx import TensorProto, helper

    n, k = weights[0][0].shape
    nodes, tensors = [], []
    for i, (codes, scale) in enumerate(weights):
        data = np.pad(codes.numpy(), ((0, 0), (0, -k % group)))
        if bits == 4:
            data = data[:, ::2] | data[:, 1::2] << 4
        data = np.ascontiguousarray(data).reshape(n, -(-k // group), group * bits // 8)
        tensors.append(helper.make_tensor(f"b{i}", TensorProto.UINT8, data.shape, data.tobytes(), raw=True))
        flat = scale.numpy().astype(np.float32).reshape(-1)
        tensors.append(helper.make_tensor(f"s{i}", TensorProto.FLOAT, flat.shape, flat.tobytes(), raw=True))
        nodes.append(
            helper.make_node(
                "MatMulNBits", ["x", f"b{i}", f"s{i}"], [f"y{i}"], domain="com.microsoft",
                K=k, N=n, bits=bits, block_size=group, accuracy_level=accuracy,
            )
        )  # fmt: skip
    outputs = [helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, ["M", n]) for i in range(len(weights))]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["M", k])]
    graph = helper.make_graph(nodes, "layers", inputs, outputs, tensors)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def bind(x: Tensor) -> Callable[[], object]:
        binding = session.io_binding()
        binding.bind_cpu_input("x", x.numpy())
        out, scratch = torch.empty(2, x.shape[0], n)
        for i in range(len(weights)):
            into = out if i == len(weights) - 1 else scratch
            binding.bind_output(f"y{i}", "cpu", 0, np.float32, tuple(into.shape), into.data_ptr())

        def run(kept: Tensor = scratch) -> Tensor:  # bound by its address only
            session.run_with_iobinding(binding)
            return out

        return run

    return bind
