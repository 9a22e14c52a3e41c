"""THE list of passes, and the manager that runs it."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from qcompile.kernels.qparams import Clip
from qcompile.passes.base import Pass
from qcompile.passes.canonicalize import Canonicalize
from qcompile.passes.fuse import Fuse
from qcompile.passes.fuse_epilogues import FuseEpilogues
from qcompile.passes.fuse_siblings import FuseSiblings
from qcompile.passes.pack import AssignKernels, Pack
from qcompile.passes.program import Program
from qcompile.passes.quantize_weights import QuantizeWeights
from qcompile.passes.select import Select
from qcompile.passes.verify import Signature, verify

log = logging.getLogger("qcompile.passes")


def quantization(select: Select, clip: Clip = "max") -> list[Pass]:
    """From a float program to a quantized one, the same on every device."""
    return [
        Canonicalize(),
        select,
        QuantizeWeights(clip=clip),
        Fuse(),
        AssignKernels(),
    ]


def lowering() -> list[Pass]:
    """From a quantized program to one for the device that its weights are on."""
    return [
        FuseSiblings(),
        FuseEpilogues(),
        AssignKernels(),
        Pack(),
    ]


#: Every pass by its text name, so that one can be run alone.
PASSES: dict[str, type[Pass]] = {
    p.text_name(): p
    for p in (Canonicalize, Select, QuantizeWeights, Fuse, FuseSiblings, FuseEpilogues, AssignKernels, Pack)
}


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


#: Is called before (result None) and after each pass.
Observer = Callable[[int, Pass, Program, Result | None], None]


def run(
    passes: Sequence[Pass], program: Program, observer: Observer | None = None, check: bool | None = None
) -> list[Result]:
    """Run ``passes`` in order.

    Args:
        observer: told about each pass, before and after it.
        check: verify the program after each pass; None: where ``QCOMPILE_VERIFY=1`` is set.

    Raises:
        VerificationError: a pass broke the program.
    """
    check = os.environ.get("QCOMPILE_VERIFY") == "1" if check is None else check
    results = []
    fused = False
    for i, one in enumerate(passes):
        if observer is not None:
            observer(i, one, program, None)
        before = Signature.of(program) if check else None
        start = time.perf_counter()
        matches = one.run(program)
        result = Result(str(one), matches, time.perf_counter() - start)
        log.info("%s: %d matches in %.3f s", result.name, matches, result.seconds)
        fused = fused or isinstance(one, Fuse)
        if check:
            verify(program, result.name, before, fused=fused)
        if observer is not None:
            observer(i, one, program, result)
        results.append(result)
    program.recompile()
    return results
