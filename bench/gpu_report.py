"""The static code report of the Triton kernels: compiles them for GPUs that need not be there, and reads the machine code.

    python bench/gpu_report.py                 every case, written to docs/gpu_report.json and docs/gpu_report.md
    python bench/gpu_report.py --only "int8 x"  cases that hold this text; the others stay as they are in the report
    python bench/gpu_report.py --check sm_90   the cases marked for continuous integration, printed as JSON

What is compiled is what the launchers would launch on that GPU: the same arguments, from the same table of configurations.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from qcompile.kernels.layouts import planes
from qcompile.kernels.triton.grouped import grouped_linear_planes
from qcompile.kernels.triton.linear import linear_planes
from qcompile.kernels.triton.norm_quantize import norm_quantize
from qcompile.kernels.triton.quantized import linear_quantized
from qcompile.kernels.triton.rows import dequantize_planes, embedding_planes
from qcompile.kernels.triton.static_code import Facts, examine, record
from qcompile.kernels.triton.table import CODES_GROUP
from qcompile.kernels.triton.target import Target

DOCS = Path(__file__).resolve().parent.parent / "docs"
TARGETS = {
    "sm_80": Target("sm_80", 108), "sm_89": Target("sm_89", 128), "sm_90": Target("sm_90", 132),
    "sm_100": Target("sm_100", 148), "gfx942": Target("gfx942", 304),
}  # fmt: skip
F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
N = K = 4096
#: (label, bits, group, zero point, activations, kind, rows of x, of these in continuous integration)
LINEARS = (
    ("int8 a row", 8, 0, "none", F16, "int", (1, 16, 64, 512), (16,)),
    ("int4 g128 affine", 4, 128, "codes", F16, "int", (1, 2, 16, 32, 64, 512), (1, 16, 512)),
    ("int4 g32 affine", 4, 32, "codes", F16, "int", (1, 16, 512), ()),
    ("int4 g128 affine", 4, 128, "codes", BF16, "int", (1, 16, 64, 512), (16,)),
    ("int4 g128 shift", 4, 128, "shift", BF16, "int", (1, 16, 512), ()),
    ("int3 g128 affine", 3, 128, "codes", F16, "int", (1, 16, 64, 512), (16,)),
    ("int2 g64 affine", 2, 64, "codes", F16, "int", (1, 16, 64, 512), (1,)),
    ("float8 e4m3fn a row", 8, 0, "none", BF16, "finite_e4m3fn", (1, 16, 64, 512), (16,)),
    ("int4 g128 affine", 4, 128, "codes", F32, "int", (1, 16, 64, 512), ()),
)
#: Codes by codes: (label, dtype, group, of M = 1, 16, 64 and 512 those in continuous integration)
CODES = (
    ("int8 x int8", torch.int8, 0, (512,)),
    ("int8 x int8 g32", torch.int8, 32, ()),
    ("int8 x int8 g64", torch.int8, 64, (16,)),
    ("float8 e4m3fn x float8 e4m3fn", torch.float8_e4m3fn, 0, ()),
    ("float8 e4m3fnuz x float8 e4m3fnuz", torch.float8_e4m3fnuz, 0, ()),
)


def meta(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def weight(lead: tuple[int, ...], bits: int, group: int, zero: str) -> tuple[Tensor, Tensor, Tensor | None]:
    grouped = (*lead, planes.group_count(K, group))
    zeros = {"none": None, "codes": meta(grouped, torch.uint8), "shift": meta(grouped, F16)}
    return meta((*lead, planes.row_elements(K, bits)), torch.int16), meta(grouped, F16), zeros[zero]


def cases() -> Iterator[tuple[str, bool, Callable[[], object]]]:
    """(name, whether continuous integration compiles it, the call)."""
    for label, bits, group, zero, dtype, kind, rows, checked in LINEARS:
        parts = weight((N,), bits, group, zero)
        for m in rows:
            name = f"{label}, {str(dtype).removeprefix('torch.')}, M={m}"
            yield name, m in checked, partial(linear_planes, meta((m, K), dtype), *parts, None, bits, kind, group, N)
    parts = weight((8, N), 4, 128, "codes")
    for m in (16, 1024):
        call = partial(grouped_linear_planes, meta((m, K), BF16), *parts, meta((8,), torch.int32), 4, "int", 128)
        yield f"8 experts, int4 g128, bfloat16, T={m}", m == 16, call
    for name, dtype, group, checked in CODES:
        kind = "qint8" if dtype == torch.int8 else f"q{str(dtype).removeprefix('torch.')}"
        scheme, x_scheme = f"{kind}/{f'group={group}' if group else 'channel=0'}/symmetric/float32", f"{kind}/group={K}"
        scale = meta((N, K // group) if group else (N,), F32)
        for m in (1, 16, 64, 512):
            x, w = (meta((m, K), dtype), meta((m, 1), F32)), (meta((N, K), dtype), scale)
            product = partial(linear_quantized, *x, *w, None, f"{x_scheme}/symmetric/float32", scheme, [N, K], F16)
            yield f"{name}, M={m}", m in checked, product
    yield "RMSNorm to int8", True, lambda: norm_quantize(meta((512, K), BF16), meta((K,), BF16), None, 1e-6, "rms", "qint8")
    packed = weight((N,), 4, 128, "codes")
    yield "embedding int4 g128", True, lambda: embedding_planes(
        meta((64,), torch.int64), *packed, 4, "int", 128, N, K, BF16
    )
    yield "decode int4 g128", False, lambda: dequantize_planes(*packed, 4, "int", 128, K, BF16)


def rows(arch: str, only_checked: bool, text: str = "") -> Iterator[tuple[str, Facts]]:
    """``(name, facts)`` of each kernel; of those that end a product, one for each number of parts and dtype."""
    finished: set[str] = set()
    for name, checked, call in cases():
        if (only_checked and not checked) or text not in name:
            continue
        if "int8 g32," in name and CODES_GROUP[TARGETS[arch].family] > 32:
            continue  # left to the float product there
        if "e4m3fnuz" in name and not TARGETS[arch].hip:
            continue  # AMD's own
        for launch in record(TARGETS[arch], call):
            label = name
            if launch.name == "finish":
                out = launch.arguments["out"]
                label = f"sum of {launch.arguments['SPLIT']} parts, {str(out.dtype).removeprefix('torch.')}, M={len(out)}"
                if label in finished:
                    continue
                finished.add(label)
            yield f"{arch} | {launch.name} | {label}", examine(launch, arch)


HEAD = """# Static code report

Written by `python bench/gpu_report.py`; nothing here was run on a GPU. Each kernel is compiled by the pinned Triton for the
GPU, with the arguments and the configuration that the launcher would use there for a layer of 4096 x 4096, and its machine
code is read. It says what the compiler made, not how fast it is. `tests/gpu/test_triton_code.py` compiles a part of it again
and compares.

- *registers* a thread; *spills* bytes, and must be 0; *shared* KiB a block; *occupancy* of the warps a processor could hold;
- *loop*: instructions of the inner loop; *a weight*: these, over all threads of a block, for each weight that it decodes (a
  tile of many rows of x decodes a weight in several warps, and multiplies it often);
- *mma*: tensor-core instructions; *128-bit*: loads or copies of 16 bytes; *shfl*, *bar*: shuffles and barriers; all in the
  loop. Blackwell's tensor cores are fed through tensor memory, and every product waits at a barrier.

| GPU | kernel | case | registers | spills | shared | occupancy | loop | a weight | mma | 128-bit | shfl | bar |
| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
"""


def table(report: dict[str, dict[str, float]]) -> str:
    lines = []
    for name, f in report.items():
        weight_cost = f"{f['per_weight']:.1f}" if f["per_weight"] else ""
        lines.append(
            f"| {name} | {f['registers']} | {f['spills']} | {f['shared'] / 1024:.0f} | {f['occupancy']:.2f} | {f['loop']} | "
            f"{weight_cost} | {f['tensor_core']} | {f['wide']} | {f['shuffles']} | {f['barriers']} |"
        )
    return HEAD + "\n".join(lines) + "\n"


def _place(before: dict[str, object]) -> Callable[[str], tuple[int, int]]:
    """Where a row stands: by GPU, then as before, new ones last."""
    archs, order = list(TARGETS), list(before)
    return lambda name: (archs.index(name.partition(" ")[0]), order.index(name) if name in before else len(order))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", metavar="ARCH", choices=TARGETS)
    parser.add_argument("--only", metavar="TEXT", default="")
    given = parser.parse_args()
    check = given.check
    report = {}
    for arch in [check] if check else TARGETS:
        for name, facts in rows(arch, bool(check), given.only):
            report[name] = dataclasses.asdict(facts)
            if not check:
                print(name, report[name], flush=True)
    if check:
        print(json.dumps(report))
        return
    if given.only:
        before = json.loads((DOCS / "gpu_report.json").read_text(encoding="utf-8"))
        report = {name: {**before, **report}[name] for name in sorted({**before, **report}, key=_place(before))}
    (DOCS / "gpu_report.json").write_text(json.dumps(report, indent=0) + "\n", encoding="utf-8")
    (DOCS / "gpu_report.md").write_text(table(report), encoding="utf-8")


if __name__ == "__main__":
    main()
