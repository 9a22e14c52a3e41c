"""PyTorch's quantizers on one ``nn.Linear``: torchao, optimum-quanto and bitsandbytes against qcompile and float32.

    python bench/quantizers.py                     # 4096 x 4096, eager, 1, 32 and 512 rows
    python bench/quantizers.py --size 1024 --rows 1,8 --compile
    python bench/quantizers.py --emulate-avx2      # holds all of them: they run torch's kernels

Each library quantizes a module its own way, in the scheme nearest to int4 in groups of 128 or int8 that it has for a CPU.
Modules are called eagerly, as their documentation shows, or with ``--compile`` under ``torch.compile``. One layer is called
again and again, so that at few rows the weights come from the cache where they fit; for weights from memory see layers.py.
A library that cannot run a case is listed with what it said.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from typing import Any

import torch
from benchkit import command, machine, peers
from benchkit.records import Record, table
from benchkit.timing import medians
from torch import nn


def main() -> None:
    args = _arguments()
    machine.emulate_avx2(args.emulate_avx2)
    machine.use_threads(args.threads)
    print(machine.summary(), flush=True)
    torch.manual_seed(0)
    base = nn.Linear(args.size, args.size, bias=False).eval().requires_grad_(False)
    kinds: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {}
    for name, make in {**_ours(), **_torchao(), **_quanto(), **_bitsandbytes()}.items():
        try:
            model = nn.Sequential(copy.deepcopy(base))
            made = make(model)
            kinds[name] = torch.compile(made, dynamic=False) if args.compile else made
        except Exception as error:  # a peer's own; the others go on
            print(f"{name}: {type(error).__name__}: {str(error).splitlines()[0][:120]}", flush=True)
    records: list[Record] = []
    lines: dict[str, list[str]] = {}
    rows = [int(m) for m in args.rows.split(",")]
    for m in rows:
        x = torch.randn(m, args.size)
        with torch.no_grad():  # optimum-quanto's int4 refuses inference mode
            wanted = base(x)
            calls, errors = {}, {}
            for name, module in kinds.items():
                try:
                    errors[name] = float((module(x) - wanted).norm() / wanted.norm())
                    calls[name] = lambda module=module, x=x: module(x)
                except Exception as error:
                    print(f"{name}, {m} rows: {type(error).__name__}: {str(error).splitlines()[0][:120]}", flush=True)
            times = medians(calls, args.seconds, least=2)
        case = {"shape": f"{args.size}x{args.size}", "M": m, "mode": "compiled" if args.compile else "eager"}
        for name in kinds:
            if name in times:
                records.append(Record(case, name, times[name] * 1e3, "ms"))
            text = f"{times[name] * 1e3:.2f}" if name in times else "-"
            lines.setdefault(name, [name, f"{errors.get(name, float('nan')):.1%}"]).append(text)
    print(f"\n{args.size} x {args.size}, {'compiled' if args.compile else 'eager'}, ms")
    print(table(["library and scheme", "error", *(f"M={m}" for m in rows)], lines.values()))
    command.finish(args, "quantizers", records)


Make = Callable[[nn.Sequential], nn.Module]


def _ours() -> dict[str, Make]:
    import qcompile

    def quantized(**options: Any) -> Make:
        return lambda module: qcompile.freeze(qcompile.quantize(module, **options))

    return {
        "float32": lambda module: module,
        "qcompile int8": quantized(weights="qint8"),
        "qcompile int4": quantized(weights="qint4", group_size=128),
    }


def _torchao() -> dict[str, Make]:
    if not peers.available("torchao"):
        return {}
    from torchao import quantization as ao

    def quantized(make: Callable[[], object]) -> Make:
        def apply(module: nn.Sequential) -> nn.Module:
            ao.quantize_(module, make())
            return module

        return apply

    return {
        "torchao int8 weight-only": quantized(lambda: ao.Int8WeightOnlyConfig()),
        "torchao int8 dynamic": quantized(lambda: ao.Int8DynamicActivationInt8WeightConfig()),
        "torchao int4 weight-only": quantized(
            lambda: ao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=ao.PerGroup(128))  # type: ignore[attr-defined]
        ),
    }


def _quanto() -> dict[str, Make]:
    if not peers.available("optimum-quanto"):
        return {}
    from optimum import quanto

    def quantized(weights: object) -> Make:
        def apply(module: nn.Sequential) -> nn.Module:
            quanto.quantize(module, weights=weights)
            quanto.freeze(module)
            return module

        return apply

    return {"optimum-quanto int8": quantized(quanto.qint8), "optimum-quanto int4": quantized(quanto.qint4)}


def _bitsandbytes() -> dict[str, Make]:
    if not peers.available("bitsandbytes"):
        return {}
    import bitsandbytes as bnb

    def quantized(make: Callable[[int, int], nn.Module]) -> Make:
        def apply(module: nn.Sequential) -> nn.Module:
            old = module[0]
            n, k = old.get_parameter("weight").shape
            new = make(k, n)
            new.load_state_dict(old.state_dict())
            return nn.Sequential(new).to("cpu").requires_grad_(False)

        return apply

    return {
        "bitsandbytes nf4": quantized(
            lambda k, n: bnb.nn.Linear4bit(k, n, bias=False, compute_dtype=torch.float32, quant_type="nf4")
        ),
        "bitsandbytes int8": quantized(lambda k, n: bnb.nn.Linear8bitLt(k, n, bias=False, has_fp16_weights=False)),
    }


def _arguments() -> argparse.Namespace:
    parser = command.parser(__doc__)
    parser.add_argument("--size", type=int, default=4096, help="of in_features and out_features")
    parser.add_argument("--rows", default="1,32,512", help="rows of x, comma separated")
    parser.add_argument("--compile", action="store_true", help="each under torch.compile")
    parser.add_argument("--seconds", type=float, default=6.0, help="for each number of rows")
    return parser.parse_args()


if __name__ == "__main__":
    main()
