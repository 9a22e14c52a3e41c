"""Attention: ``qcompile::attention`` against torch's, in alternating order; prints a table.

    python bench/attention.py                      # 9 heads on 3 of keys, 640 positions of 64, one query
    python bench/attention.py --queries 16 --heads 32 --groups 8 --size 128 --dtype bfloat16
    python bench/attention.py --queries 512 --seen 512                  # a prompt that is read into the cache
    python bench/attention.py --batch 32 --heads 12 --groups 12 --size 32 --queries 128 --keys 128 --mask none --layers 6
    python bench/attention.py --emulate-avx2       # as a processor without AVX-512 would run it, torch included

``torch`` is what a compiled program calls: the flash kernel on a float mask and grouped heads. Keys, values and masks
rotate among as many layers as a model has, each call reading another layer's, so that what a step reads is in the cache
that it would be in. Times are medians of a whole round through the layers, in microseconds a layer. Compare columns of
one run, not runs.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

from benchkit import machine
from benchkit.timing import alternate


def main() -> None:
    args = _arguments()
    machine.emulate_avx2(args.emulate_avx2)

    import torch

    import qcompile  # noqa: F401  registers the operators
    from qcompile.kernels.cpu import build

    if args.threads:
        torch.set_num_threads(args.threads)
    loaded = build.ensure_loaded()
    if not loaded.loaded:
        raise SystemExit(build.status())
    torch.manual_seed(0)
    dtype = getattr(torch, args.dtype)
    q = torch.randn(args.batch, args.heads, args.queries, args.size, dtype=dtype)
    cache = [torch.randn(2, args.batch, args.groups, args.keys, args.size, dtype=dtype) for _ in range(args.layers)]
    threads = torch.get_num_threads()
    print(f"\n{args.heads} heads on {args.groups} of {args.keys} x {args.size}, {args.queries} queries, {args.dtype}")
    print(f"batch of {args.batch}, mask: {args.mask}, {args.layers} layers")
    print(f"{threads} threads, {build.isa()}, torch {torch.__version__}\n")
    print("| seen | torch µs | qcompile µs | speed-up |\n| --- | --- | --- | --- |", flush=True)
    masked = args.mask == "cache"
    for seen in [int(s) for s in args.seen.split(",")] if masked else [args.keys]:
        _row(seen, q, cache, args)


def _row(seen: int, q: object, cache: list, args: argparse.Namespace) -> None:
    import torch

    causal = args.mask == "causal"
    last = torch.arange(seen - args.queries, seen)[:, None]
    mask = (torch.arange(args.keys) <= last)[None, None]
    bias = torch.zeros(mask.shape, dtype=cache[0].dtype).masked_fill(~mask, -torch.inf)
    given, added = (mask, bias) if args.mask == "cache" else (None, None)
    scale = args.size**-0.5
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    op = torch.ops.qcompile.attention.default
    calls: dict[str, Callable[[], object]] = {
        "torch": lambda: [flash(q, k, v, 0.0, causal, attn_mask=added, scale=scale)[0] for k, v in cache],
        "qcompile": lambda: [op(q, k, v, given, scale, causal) for k, v in cache],
    }
    with torch.inference_mode():
        for a, b in zip(*(call() for call in calls.values()), strict=True):
            torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)
        times = alternate(calls, args.seconds, turn=0.0)
    micros = {name: statistics.median(t) / args.layers * 1e6 for name, t in times.items()}
    ratio = statistics.median(a / b for a, b in zip(times["torch"], times["qcompile"], strict=True))
    print(f"| {seen} | {micros['torch']:.1f} | {micros['qcompile']:.1f} | {ratio:.2f}x |", flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, default=9, help="of queries")
    parser.add_argument("--groups", type=int, default=3, help="heads of keys and values")
    parser.add_argument("--queries", type=int, default=1)
    parser.add_argument("--keys", type=int, default=640, help="positions of the cache")
    parser.add_argument("--size", type=int, default=64, help="values of a head")
    parser.add_argument("--seen", default="64,300,640", help="how many positions the mask shows, comma separated")
    parser.add_argument("--mask", default="cache", choices=("cache", "causal", "none"), help="cache: up to --seen")
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--threads", type=int, default=0, help="0 = torch's default")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each row")
    parser.add_argument("--emulate-avx2", action="store_true", help="hold torch and the kernels to AVX2")
    return parser.parse_args()


if __name__ == "__main__":
    main()
