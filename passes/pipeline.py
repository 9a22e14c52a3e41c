"""THE list of passes, and the manager that runs it."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from qcompile.kernels.dtypes import QType
from qcompile.kernels.qparams import Clip
from qcompile.passes.base import Pass
from qcompile.passes.canonicalize import Canonicalize
from qcompile.passes.chain_linears import ChainLinears
from qcompile.passes.find_norms import FindNorms
from qcompile.passes.fold_batch_norm import FoldBatchNorm
from qcompile.passes.fuse import Fuse
from qcompile.passes.fuse_attention import FuseAttention
from qcompile.passes.fuse_conv_epilogues import FuseConvEpilogues
from qcompile.passes.fuse_epilogues import FuseEpilogues
from qcompile.passes.fuse_siblings import FuseSiblings
from qcompile.passes.gather_sequences import GatherSequences
from qcompile.passes.group_attention import GroupAttention
from qcompile.passes.inline_regions import InlineRegions
from qcompile.passes.keep_codes import KeepCodes
from qcompile.passes.merge_fake_quantize import MergeFakeQuantize
from qcompile.passes.multiply_codes import MultiplyCodes
from qcompile.passes.pack import AssignKernels, Pack
from qcompile.passes.program import Program
from qcompile.passes.quantize_activations import QuantizeActivations
from qcompile.passes.quantize_weights import QuantizeWeights
from qcompile.passes.remove_identities import RemoveIdentities
from qcompile.passes.restride import Restride
from qcompile.passes.select import Select
from qcompile.passes.unpack import Unpack
from qcompile.passes.verify import Signature, verify

log = logging.getLogger("qcompile.passes")


def quantization(select: Select, clip: Clip = "max", activations: QType | None = None) -> list[Pass]:
    """From a float program to a quantized one, the same on every device."""
    return [
        InlineRegions(),
        Unpack(),
        Canonicalize(),
        select,
        QuantizeWeights(clip=clip),
        Fuse(),
        QuantizeActivations(activations),
        AssignKernels(),
    ]


def arrival() -> list[Pass]:
    """From a program whose weights came quantized to a quantized program; its float weights stay as they are."""
    return [
        InlineRegions(),
        Unpack(),
        Canonicalize(),
        Fuse(),
        AssignKernels(),
    ]


def lowering() -> list[Pass]:
    """From a quantized program to one for the device that its weights are on."""
    return [
        RemoveIdentities(),
        MergeFakeQuantize(),
        FuseSiblings(),
        FuseEpilogues(),
        FoldBatchNorm(),
        FuseConvEpilogues(),
        GroupAttention(),
        FuseAttention(),
        FindNorms(),
        MultiplyCodes(),
        AssignKernels(),
        Pack(),
        KeepCodes(),
        ChainLinears(),
        Restride(),
        GatherSequences(),
    ]


#: Every pass by its text name, so that one can be run alone.
PASSES: dict[str, type[Pass]] = {
    p.text_name(): p
    for p in (
        InlineRegions, Unpack, Canonicalize, Select, QuantizeWeights, Fuse, QuantizeActivations,
        RemoveIdentities, MergeFakeQuantize, FuseSiblings, FuseEpilogues, FoldBatchNorm, FuseConvEpilogues,
        GroupAttention, FuseAttention, FindNorms, MultiplyCodes, AssignKernels, Pack, KeepCodes, ChainLinears, Restride,
        GatherSequences,
    )
}  # fmt: skip


@dataclass(frozen=True)
class Result:
    """What one pass did.

    Attributes:
        name: the pass with its options, as text.
        matches: how often it matched.
        seconds: how long it took.
    """

    name: str
    matches: int
    seconds: float


class Observer(Protocol):
    """What is told about each pass of a run; several runs over one program may share one."""

    def before(self, one: Pass, program: Program) -> None:
        """``one`` is about to run."""

    def after(self, one: Pass, program: Program, result: Result) -> None:
        """``one`` has run."""

    def failed(self, one: Pass, program: Program, error: Exception) -> None:
        """``one``, or the check of what it left, raised; the error goes on to the caller."""

    def done(self, program: Program) -> None:
        """The run is over."""


def run(
    passes: Sequence[Pass], program: Program, observer: Observer | None = None, check: bool | None = None
) -> list[Result]:
    """Run ``passes`` in order.

    Args:
        observer: told about each pass, before and after it, and where one fails.
        check: verify the program after each pass; None: where ``QCOMPILE_VERIFY=1`` is set.

    Raises:
        VerificationError: a pass broke the program.
    """
    check = os.environ.get("QCOMPILE_VERIFY") == "1" if check is None else check
    results = []
    fused = False
    for one in passes:
        if observer is not None:
            observer.before(one, program)
        before = Signature.of(program) if check else None
        start = time.perf_counter()
        fused = fused or isinstance(one, Fuse)
        try:
            matches = one.run(program)
            result = Result(str(one), matches, time.perf_counter() - start)
            if check:
                verify(program, result.name, before, fused=fused)
        except Exception as error:
            if observer is not None:
                observer.failed(one, program, error)
            raise
        log.info("%s: %d matches in %.3f s", result.name, matches, result.seconds)
        if observer is not None:
            observer.after(one, program, result)
        results.append(result)
    program.recompile()
    if observer is not None:
        observer.done(program)
    return results
