"""The table in docs/zoo.md: ``python tests/zoo/table.py > docs/zoo.md``."""

from __future__ import annotations

import logging
import re
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "passes"))

import torch
import transformers
from architectures import ARCHITECTURES
from specimen import Specimen, eager, exported

HEAD = """# Architectures

Made by `python tests/zoo/table.py`. Each is a tiny model with random weights of transformers {transformers}, exported by
torch {torch}, its weights quantized to qint8 (all, however small: `min_elements=0`), and run. There is no code for any of
them in qcompile; the same list is in the tests.

*Products* are matmul-like operators in the exported float graph, lookups in tables among them. *Activations*: both operands
are computed from the input, as in attention; there is no weight to quantize. *Cosine* is that of the outputs, quantized
against float. *Eager* is the cosine of the module quantized in place and frozen, which runs on the CPU's kernels.

| kind | architecture | products | quantized | activations | left alone, and why | cosine | eager |
| --- | --- | ---: | ---: | ---: | --- | ---: | ---: |"""


def _why(found: Specimen) -> str:
    """The reasons, with the names of parameters shortened."""
    counts: dict[str, int] = {}
    for reason, times in found.alone.items():
        short = re.sub(r" from .*", "", reason).replace("(name it in `include` to quantize it)", "")
        counts[short.strip()] = counts.get(short.strip(), 0) + times
    return "; ".join(f"{times}: {reason}" for reason, times in counts.items())


def main() -> None:
    """Print the table."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    print(HEAD.format(transformers=transformers.__version__, torch=torch.__version__.partition("+")[0]))
    experts = 0
    noisy = []
    for architecture in ARCHITECTURES:
        found = exported(architecture)
        experts += len(found.experts)
        mark = ""
        if found.noise is not None:
            noisy.append(f"{architecture.name} {found.noise:.3f}")
            mark = "*"
        print(
            f"| {architecture.kind} | {architecture.name} | {found.matmuls} | {found.quantized} | {found.activations} "
            f"| {_why(found)} | {found.cosine:.4f}{mark} | {eager(architecture).cosine:.4f} |", flush=True,
        )  # fmt: skip
    print(f"\n{len(ARCHITECTURES)} architectures; all {experts} stacks of expert weights are quantized.")
    if noisy:
        print(
            "\n\\* A deep stack of random convolutions amplifies any change of its weights: with random noise as large as "
            f"the rounding, the float model itself comes to {', '.join(noisy)}."
        )


if __name__ == "__main__":
    main()
