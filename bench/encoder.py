"""A sentence encoder, all-MiniLM-L6-v2: milliseconds a batch against ONNX Runtime and ``torch.compile``, in turns.

    python bench/encoder.py                        # batches of 1 and of 32 texts of 128 tokens
    python bench/encoder.py --batches 8x64 --emulate-avx2

ONNX Runtime's int8 is ``quantize_dynamic`` of the model that torch exports, as it is and after ONNX Runtime's own optimizer
for transformers ("fused"); the faster of the two is the one to beat. Ours is ``torch.compile(backend="qcompile")`` and, of
the fastest, ``qcompile.trace`` ("traced") and an exported program compiled ahead of time ("package"): without guards of
Dynamo's to check on each call. All results are compared with float's, by cosine of the mean hidden state, before anything is
timed.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from benchkit import command, machine, peers
from benchkit.records import Record, table
from benchkit.timing import WARM, medians
from torch import Tensor, nn

OURS: dict[str, dict[str, Any]] = {
    "qint8": {"weights": "qint8"},  # groups of 32
    "qint8 a channel": {"weights": "qint8", "group_size": -1},
    "qint4": {"weights": "qint4"},
}
PACKAGED = "qint8 a channel"  # also traced; and compiled ahead of time: as ONNX Runtime's session, without Python to call
PAUSE = 0.15  # ONNX Runtime's threads go on spinning for a while after a run


class Encoder(nn.Module):
    """Tokens and mask, int64 ``[b, t]``, to the last hidden state, float ``[b, t, d]``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model  # a class of transformers

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        return self.model(input_ids=tokens, attention_mask=mask).last_hidden_state


def main() -> None:
    args = _arguments()
    machine.emulate_avx2(args.emulate_avx2)
    threads = machine.use_threads(args.threads)
    print(machine.summary(), flush=True)
    records: list[Record] = []
    with tempfile.TemporaryDirectory() as folder:
        for batch in args.batches.split(","):
            records += _batch(batch, Path(folder), threads, args.seconds)
    command.finish(args, "encoder", records)


def _batch(name: str, folder: Path, threads: int, seconds: float) -> list[Record]:
    import qcompile
    from qcompile.demo.data import minilm_folder
    from qcompile.demo.loading import load

    size, length = (int(part) for part in name.split("x"))
    torch.compiler.reset()
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1000, 20_000, (size, length), generator=generator)
    mask = torch.ones_like(tokens)

    def fresh() -> Encoder:  # a copy each: a compiled model's float weights may be given up
        return Encoder(load(minilm_folder(), "AutoModel")[0]).eval()

    calls: dict[str, Callable[[], Tensor]] = {}
    plain = torch.compile(fresh(), dynamic=False)
    calls["float32 compiled"] = partial(plain, tokens, mask)
    for kind, options in OURS.items():
        ours = torch.compile(fresh(), backend="qcompile", dynamic=False, options=options)
        calls[f"qcompile {kind}"] = partial(ours, tokens, mask)
    traced = qcompile.trace(fresh(), **OURS[PACKAGED])
    calls[f"qcompile {PACKAGED}, traced"] = partial(traced, tokens, mask)
    package = _package(fresh(), tokens, mask, folder / f"{name}.pt2")
    calls[f"qcompile {PACKAGED}, package"] = partial(package, tokens, mask)
    if peers.available("onnxruntime", "onnx"):
        calls |= _onnxruntime(fresh(), tokens, mask, folder / name, threads)
    with torch.no_grad():
        wanted = calls["float32 compiled"]().mean(1)
        cosines = {kind: float(torch.cosine_similarity(call().mean(1), wanted).mean()) for kind, call in calls.items()}
        times = medians(calls, seconds, pause=PAUSE, warm=WARM)
    base = times["float32 compiled"]
    rows = [[kind, f"{t * 1e3:.2f}", f"{base / t:.2f}x", f"{cosines[kind]:.4f}"] for kind, t in times.items()]
    print(f"\n{size} texts of {length} tokens\n{table(['engine', 'ms', 'against float32', 'cosine'], rows)}", flush=True)
    case = {"model": "all-MiniLM-L6-v2", "batch": name}
    return [Record(case, kind, t * 1e3, "ms") for kind, t in times.items()]


def _package(model: Encoder, tokens: Tensor, mask: Tensor, file: Path) -> Callable[[Tensor, Tensor], Tensor]:
    import qcompile

    with torch.no_grad():
        program = qcompile.quantize(torch.export.export(model, (tokens, mask)), **OURS[PACKAGED])
        return qcompile.aot_load(qcompile.aot_compile(program, file))


def _onnxruntime(model: Encoder, tokens: Tensor, mask: Tensor, base: Path, threads: int) -> dict[str, Callable[[], Tensor]]:
    from benchkit import onnx_models

    config = model.model.config
    model.model.set_attn_implementation("eager")  # the form that ONNX Runtime's optimizer knows
    base.mkdir()
    file = onnx_models.export(model, (tokens, mask), base / "model.onnx", ("tokens", "mask"))
    fused = onnx_models.optimized(file, config.num_attention_heads, config.hidden_size)
    inputs = {"tokens": tokens, "mask": mask}
    files = {"float32": file, "float32 fused": fused, "int8": onnx_models.dynamic_int8(file)}
    files["int8 fused"] = onnx_models.dynamic_int8(fused)
    return {f"onnxruntime {kind}": onnx_models.session(path, inputs, threads) for kind, path in files.items()}


def _arguments() -> argparse.Namespace:
    parser = command.parser(__doc__)
    parser.add_argument("--batches", default="1x128,32x128", help="texts x tokens, comma separated")
    parser.add_argument("--seconds", type=float, default=20.0, help="for each batch")
    return parser.parse_args()


if __name__ == "__main__":
    main()
