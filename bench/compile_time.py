"""Seconds to compile a language model, SmolLM2-135M: prompt and token programs, caches cold and warm.

    python bench/compile_time.py                   # float32, and ours in 8 and 4 bits
    python bench/compile_time.py --variants qint4

Ours is compiled by ``qcompile.trace``, as ``qcompile.generate`` does it; "qint4 torch.compile" is traced by Dynamo instead.

Each figure is of a process of its own, from the first call of the prompt's program to the end of the first call of the
token's; for ours quantizing and packing are in it. Cold: Inductor's caches are empty (a temporary folder). Warm: the same
once more on what the cold one left. The kernel library is built before, where it has to be.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile

from benchkit import command, machine
from benchkit.records import Record, table
from benchkit.timing import once, undisturbed

VARIANTS = "float32 compiled,qint8,qint4,qint4 torch.compile"


def main() -> None:
    args = _arguments()
    machine.emulate_avx2(args.emulate_avx2)
    machine.use_threads(args.threads)
    if args.child:
        _child(args.child, args.prompt)
        return
    print(machine.summary(), flush=True)
    records, rows = [], []
    for name in args.variants.split(","):
        with tempfile.TemporaryDirectory() as folder:
            environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": folder}
            seconds = {}
            for what in ("cold", "warm"):
                seconds[what] = _measure(name, args, environment)
                records.append(Record({"model": "SmolLM2-135M", "cache": what}, name, seconds[what], "s"))
        rows.append([name, f"{seconds['cold']:.1f}", f"{seconds['warm']:.1f}"])
        print(f"{name}: cold {seconds['cold']:.1f} s, warm {seconds['warm']:.1f} s", flush=True)
    print(f"\n{table(['variant', 'cold s', 'warm s'], rows)}")
    command.finish(args, "compile_time", records)


def _measure(name: str, args: argparse.Namespace, environment: dict[str, str]) -> float:
    words = [sys.executable, __file__, "--child", name, "--threads", str(args.threads), "--prompt", str(args.prompt)]
    done = subprocess.run(words, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name}: the process that compiles ended with status {done.returncode}")
    return float(json.loads(done.stdout.splitlines()[-1])["seconds"])


def _child(name: str, prompt: int) -> None:
    import torch
    from language import compiler

    from qcompile.demo.data import smollm2_folder
    from qcompile.demo.generation import GreedyDecoder
    from qcompile.demo.loading import load
    from qcompile.kernels.cpu import build

    build.ensure_loaded()
    model, _ = load(smollm2_folder())
    decoder = GreedyDecoder(model, prompt + 32, compiler(name))

    def both() -> None:
        token = decoder.feed(torch.arange(prompt)[None] + 1000)
        decoder.feed(token)

    with undisturbed():
        seconds = once(both)
    print(json.dumps({"seconds": seconds}), flush=True)


def _arguments() -> argparse.Namespace:
    parser = command.parser(__doc__)
    parser.add_argument("--variants", default=VARIANTS, help="comma separated")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--child", default="", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
