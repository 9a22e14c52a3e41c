"""A causal language model, SmolLM2-135M: prompt and tokens a second against llama.cpp and ``torch.compile``, in turns.

    python bench/language.py                       # prompt of 512, then 24 tokens one by one; 5 rounds
    python bench/language.py --rounds 9 --variants qint4,Q4_0
    python bench/language.py --emulate-avx2        # llama.cpp, too, where it was built so (LLAMA_CPP_LIB_PATH)

Ours is transformers' model with a static cache, compiled by ``qcompile.trace`` as ``qcompile.generate`` does it ("qint4
torch.compile": by Dynamo instead), in the loop of ``qcompile/demo/generation.py``; 4 and 8 bits in groups of 32, as Q4_0 and
Q8_0 have them, the table and head in 8 bits where llama.cpp has them so. All engines live in one process and take turns: a
prompt into an empty cache, then the tokens. Rates are from the median prompt and the median token.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from benchkit import command, machine, peers
from benchkit.records import Record, table
from benchkit.timing import undisturbed

import qcompile
from qcompile.generation import Compile

VARIANTS = "float32 compiled,qint8,qint4,Q8_0,Q4_0"
OURS: dict[str, dict[str, Any]] = {
    "qint8": {"weights": "qint8", "group_size": 32},
    "qint4": {"weights": "qint4", "group_size": 32},
}

FOLLOWED = " torch.compile"
"""Ends the name of a variant of ours that Dynamo traces."""

Turn = Callable[[int, int], tuple[float, list[float]]]
"""From prompt length and steps to the seconds of a prompt and of each step after it."""


def main() -> None:
    args = _arguments()
    machine.emulate_avx2(args.emulate_avx2)
    threads = machine.use_threads(args.threads)
    turns: dict[str, Turn] = {}
    for name in args.variants.split(","):
        start = time.perf_counter()
        turn = _make(name, args.prompt + args.steps + 8, threads)
        if turn is not None:
            turn(args.prompt, 2)  # compiles
            turns[name] = turn
            print(f"{name}: ready after {time.perf_counter() - start:.1f} s", flush=True)
    prompt: dict[str, list[float]] = {name: [] for name in turns}
    step: dict[str, list[float]] = {name: [] for name in turns}
    for _ in range(args.rounds):
        with undisturbed():
            for name, turn in turns.items():
                time.sleep(0.05)
                seconds, steps = turn(args.prompt, args.steps)
                prompt[name].append(seconds)
                step[name] += steps
    records, rows = [], []
    for name in turns:
        rates = {"prefill": args.prompt / median(prompt[name]), "decode": 1 / median(step[name])}
        for what, rate in rates.items():
            records.append(Record({"model": "SmolLM2-135M", "what": what, "prompt": args.prompt}, name, rate, "tokens/s"))
        rows.append([name, f"{rates['prefill']:,.0f}", f"{rates['decode']:.1f}", f"{1e3 / rates['decode']:.2f}"])
    print(f"\n{machine.summary()}\n{threads} threads, prompt {args.prompt}, {args.steps} steps, {args.rounds} rounds\n")
    print(table(["engine", "prefill tokens/s", "decode tokens/s", "ms a token"], rows))
    command.finish(args, "language", records)


def _make(name: str, length: int, threads: int) -> Turn | None:
    if name.removesuffix(FOLLOWED) in OURS or name.startswith("float32"):
        return _torch(name, length)
    if name not in ("Q4_0", "Q8_0", "F32"):
        raise SystemExit(f"variant {name!r}: there are {VARIANTS} and F32")
    return _llama(name, length, threads) if peers.available("llama-cpp-python") else None


def compiler(name: str) -> Compile:
    """How to compile: one of ``OURS``, traced by a call or by Dynamo, or float32 under ``torch.compile``."""
    options = OURS.get(name.removesuffix(FOLLOWED))
    if name in OURS:
        return lambda step: qcompile.trace(step, **OURS[name])
    how: dict[str, Any] = {} if options is None else {"backend": "qcompile", "options": options}
    return lambda step: torch.compile(step, fullgraph=True, dynamic=False, **how)


def _torch(name: str, length: int) -> Turn:
    from qcompile.demo.data import smollm2_folder
    from qcompile.demo.generation import GreedyDecoder
    from qcompile.demo.loading import load

    model, _ = load(smollm2_folder())
    decoder = GreedyDecoder(model, length, compiler(name))

    def turn(prompt: int, steps: int) -> tuple[float, list[float]]:
        tokens = torch.randint(1000, 10_000, (1, prompt), generator=torch.Generator().manual_seed(0))
        seconds, token = decoder.time_prefill(tokens)
        return seconds, decoder.time_decode(token, steps)

    return turn


def _llama(kind: str, length: int, threads: int) -> Turn:
    from benchkit.llama import Llama, smollm2_gguf

    engine = Llama(smollm2_gguf(kind), length, threads)

    def turn(prompt: int, steps: int) -> tuple[float, list[float]]:
        tokens = torch.randint(1000, 10_000, (prompt,), generator=torch.Generator().manual_seed(0)).tolist()
        engine.reset()
        start = time.perf_counter()
        token = engine.feed(tokens)
        seconds = time.perf_counter() - start
        token, times = engine.feed([token]), []
        for _ in range(steps):
            start = time.perf_counter()
            token = engine.feed([token])
            times.append(time.perf_counter() - start)
        return seconds, times

    return turn


def _arguments() -> argparse.Namespace:
    parser = command.parser(__doc__)
    parser.add_argument("--variants", default=VARIANTS, help="comma separated; F32 is llama.cpp's float")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=5)
    return parser.parse_args()


if __name__ == "__main__":
    main()
