"""What Inductor is told, once, before the first program is handed to it.

Operators that have a kernel go through as they are. Those without one are written out in plain torch, so that Inductor
generates the code: slower than a kernel, correct on every device, and no Python in the compiled program.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_custom_graph_passes
from torch.utils._pytree import tree_leaves, tree_map_only

from qcompile.kernels.ops import fake_quantize
from qcompile.kernels.ops.conv import conv
from qcompile.kernels.ops.dequantize import dequantize
from qcompile.kernels.ops.embedding import embedding
from qcompile.kernels.ops.grouped import grouped_linear
from qcompile.kernels.ops.linear import linear
from qcompile.kernels.ops.linear_split import linear_split
from qcompile.kernels.triton import decompose

qc = torch.ops.qcompile


#: Checks that Inductor writes for each input and each result of an operator: 0.3 us each, several hundred in a step over one
#: token. The sizes of inputs are guarded before; what our operators give is checked against their fakes in the tests.
LEAN = {"size_asserts": False, "alignment_asserts": False}


@functools.cache
def prepare() -> None:
    """Register the decompositions of operators without a kernel, and the lowerings of those that are templates."""
    from torch._inductor.decomposition import register_decomposition

    for target, reference in (
        (qc.dequantize.default, dequantize),
        (qc.linear.default, linear),
        (qc.linear_split.default, linear_split),
        (qc.conv.default, conv),
        (qc.embedding.default, embedding),
        (qc.grouped_linear.default, grouped_linear),
        (qc.fake_quantize.default, fake_quantize.decomposed),
        (qc.fake_quantize_dynamic.default, fake_quantize.decomposed_dynamic),
        (qc.linear_planes.default, decompose.linear_planes),
        (qc.linear_planes_forward.default, decompose.linear_planes),
        (qc.linear_planes_split.default, decompose.linear_planes_split),
        (qc.linear_planes_split_forward.default, decompose.linear_planes_split),
        (qc.linear_quantized.default, decompose.linear_quantized),
        (qc.linear_quantized_split.default, decompose.linear_quantized_split),
        (qc.norm_quantize.default, decompose.norm_quantize),
    ):
        register_decomposition([target])(reference)
    importlib.import_module("qcompile.kernels.triton.lowering")
    _hold_inputs(qc.sequence.default, qc.sequence_writing.default)


def _hold_inputs(*targets: torch._ops.OpOverload) -> None:
    """Let Inductor compute what several calls read once.

    A call that asks for exact strides gets a copy of what is not in memory yet: computed anew for each. In memory, it is the
    same for all.
    """
    from torch._inductor.ir import TensorBox
    from torch._inductor.lowering import constrain_to_fake_tensors, make_fallback

    def held(node: fx.Node, *args: Any, **kwargs: Any) -> Any:
        for given in tree_leaves((args, kwargs)):
            if isinstance(given, TensorBox):
                given.realize()
        asked = tree_map_only(fx.Node, lambda n: n.meta["val"], (node.args, node.kwargs))
        return constrain_to_fake_tensors(args, kwargs, *asked)

    for target in targets:
        make_fallback(target, layout_constraint=held)


class CacheStamp(CustomGraphPass):
    """Changes nothing; its identity makes Inductor's caches forget programs of another version of qcompile.

    The decompositions above are not part of Inductor's cache key; the identities of custom passes are.
    """

    def __call__(self, graph: fx.Graph) -> None:
        """Leave the graph as it is."""

    def uuid(self) -> Any:
        """A digest of every source file that shapes what is compiled."""
        return _source_digest()


def cache_stamp() -> dict[str, Any]:
    """The Inductor option that installs the stamp, before the passes that the user put in its place."""
    present = get_custom_graph_passes(torch._inductor.config.post_grad_custom_pre_pass)
    return {"post_grad_custom_pre_pass": (CacheStamp(), *present), **LEAN}


@functools.cache
def _source_digest() -> bytes:
    digest = hashlib.sha256(torch.__version__.encode())
    for folder in _folders():
        for path in _sources(folder):
            content = path.read_bytes()
            digest.update(f"{path.relative_to(folder).as_posix()} {len(content)}\n".encode())
            digest.update(content)
    return digest.digest()


def _folders() -> tuple[Path, ...]:
    import qcompile.kernels
    import qcompile.passes

    files = (__file__, qcompile.passes.__file__, qcompile.kernels.__file__)
    return tuple(Path(str(file)).parent for file in files)


def _sources(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.suffix in (".py", ".cpp", ".h", ".cu", ".metal"))
