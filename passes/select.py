"""Which weight gets which scheme, and why the rest do not."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import fx

from qcompile.kernels.dtypes import QType, qint8
from qcompile.kernels.scheme import Granularity, Mode, PerChannel, PerGroup, Scheme
from qcompile.passes.base import Pass
from qcompile.passes.program import Constant, Program, Site, clean_path
from qcompile.passes.shapes import same_size

#: Group size of integer dtypes where the user names none. At 8 bits too: one scale a channel raised a small language model's
#: perplexity by 0.9 %, groups of 32 by 0.1 %.
DEFAULT_GROUP = 32

#: The group size that stands for one scale an output channel.
PER_CHANNEL = -1

#: From how many elements on a weight is quantized: held to AVX2, 64 x 64 is slower than in float32 from 32 rows on.
MIN_ELEMENTS = 8192

#: How much smaller than ``min_elements`` a convolution's weight may be: it is multiplied at many positions.
POSITIONS = 32

#: How much larger it has to be where the program multiplies one row by it, on a CPU: calling the operator takes one or two
#: microseconds longer than calling the float product does, which with fewer elements takes no longer than that itself.
ONE_ROW = 5

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Select(Pass):
    """Give each site's row in the report a scheme or a reason; the graph stays as it is.

    All sites of one weight get the same verdict, so that the weight is quantized once and held once.

    Attributes:
        weights: the quantized dtype of weights.
        group_size: elements of the reduction axis that share a scale; -1: all, one scale an output channel. None: 32 for
            integer dtypes, all for float8, and at 8 bits all for convolutions: an image is rounded by pixels or as a whole,
            and a sum over channels and positions is then one integer.
        mode: ``symmetric``, ``affine`` or ``shift``; None: symmetric at 8 bits, affine below.
        scale_dtype: of the scale; None: float32 for one scale a channel, float16 for groups.
        embeddings: the dtype of tables that are looked up (also where a linear shares the table). None: ``weights``, but at
            least 8 bits, as a table's rounding error is never averaged out.
        include: patterns; only weights of which a name or the module matches are quantized.
        exclude: patterns; those of which a name or the module matches are not.
        min_elements: a weight with fewer elements is too small to win (of a convolution, with a 32nd of that; of a linear
            that is known to get one row, on a CPU, with 5 times that).
        small_mode: the mode below 8 bits where ``mode`` is None.

    Before: canonicalized. After: each site's decision has a scheme or a reason.
    """

    weights: QType = qint8
    group_size: int | None = None
    mode: Mode | None = None
    scale_dtype: torch.dtype | None = None
    embeddings: QType | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    min_elements: int = MIN_ELEMENTS
    small_mode: Mode = "affine"

    def run(self, program: Program) -> int:
        """Decide; returns how many sites got a scheme."""
        by_weight: dict[str, list[Site]] = {}
        for site in program.sites:
            by_weight.setdefault(site.weight.name, []).append(site)
        for name, sites in by_weight.items():
            constant = program.constants[name]
            reason = self._reason(constant, sites)
            for i, site in enumerate(sites):
                site.decision.shared = i > 0
                if reason is None:
                    site.decision.scheme = str(self.scheme(constant, sites))
                else:
                    site.decision.reason = reason
        return sum(s.decision.quantized for s in program.sites)

    def scheme(self, constant: Constant, sites: Sequence[Site]) -> Scheme:
        """The scheme for the weight of ``sites``."""
        looked_up = any(s.decision.op == "embedding" for s in sites)
        conv = any(s.decision.op == "conv" for s in sites)
        return self.scheme_for(constant.tensor.shape, looked_up, conv)

    def scheme_for(self, shape: Sequence[int], looked_up: bool = False, conv: bool = False) -> Scheme:
        """The scheme for a weight of ``shape``, reduction axis last.

        Args:
            looked_up: it is a lookup table (too).
            conv: it is that of a convolution.
        """
        qtype = self.weights
        if looked_up:
            qtype = self.embeddings or (self.weights if self.weights.bits >= 8 else qint8)
        columns = shape[-1]
        small = qtype.bits < 8
        whole = qtype.is_float or (conv and not small and columns > DEFAULT_GROUP)
        size = self.group_size or (PER_CHANNEL if whole else DEFAULT_GROUP)
        granularity: Granularity = PerGroup(max(1, columns if size == PER_CHANNEL else min(size, columns)))
        if size == PER_CHANNEL and len(shape) == 2 and not small:
            granularity = PerChannel(0)
        mode: Mode = self.mode or (self.small_mode if small else "symmetric")
        if qtype.is_float:
            mode = "symmetric"
        grouped = isinstance(granularity, PerGroup) and granularity.size < columns
        scale_dtype = self.scale_dtype or (torch.float16 if grouped or small else torch.float32)
        return Scheme(qtype, granularity, mode, scale_dtype)

    def _reason(self, constant: Constant, sites: list[Site]) -> str | None:
        """Why the weight stays float, or None."""
        names = [*constant.names, *(s.decision.module for s in sites if s.decision.module)]
        tensor = constant.tensor
        hit = first_match(self.exclude, names)
        if hit is not None:
            return f"excluded by {hit!r}"
        if self.include and first_match(self.include, names) is None:
            return f"not among the included: {', '.join(map(repr, self.include))}"
        if tensor.dtype not in FLOATS:
            return f"weight is {str(tensor.dtype).removeprefix('torch.')}, not float32, float16 or bfloat16"
        if constant.receives_grad:
            return "weight receives gradients (quantize under torch.no_grad(), or set requires_grad_(False))"
        if constant.mutated:
            return "the graph writes to the weight"
        if not constant.is_parameter and not self.include:
            return "a buffer, not a parameter (name it in `include` to quantize it)"
        least = self.min_elements
        if any(s.decision.op == "conv" for s in sites):
            least //= POSITIONS
        rows = ""
        # what an earlier graph quantized and released is on the meta device: there is no float weight to go back to
        if tensor.device.type == "cpu" and all(_one_row(site) for site in sites):
            least, rows = least * ONE_ROW, " with one row"
        if tensor.numel() < least:
            return f"too small to win{rows}: {tensor.numel()} elements, at least {least} pay"
        return None


def _one_row(site: Site) -> bool:
    """Whether a linear multiplies one row, whatever the input; a number of rows that varies is none of these."""
    x = site.node.args[0]
    if site.decision.op != "linear" or not isinstance(x, fx.Node):
        return False
    return all(same_size(size, 1) for size in x.meta["val"].shape[:-1])


def first_match(patterns: Iterable[str], names: Iterable[str]) -> str | None:
    """The first pattern (as of :mod:`fnmatch`) that matches a name, or a leading part of one that ends at a dot."""
    names = [clean_path(n) for n in names]
    for pattern in patterns:
        for name in names:
            parts = name.split(".")
            if any(fnmatchcase(".".join(parts[: i + 1]), pattern) for i in range(len(parts))):
                return pattern
    return None


def unmatched(patterns: Iterable[str], program: Program) -> list[str]:
    """The patterns that match no weight of any site."""
    names = [n for s in program.sites for n in (*program.constants[s.weight.name].names, s.decision.module) if n]
    return [p for p in patterns if first_match([p], names) is None]
