"""What the project wants to reach, as numbers that the records answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from benchkit.records import Run

__all__ = ["GOALS", "Goal"]

Runs = Mapping[str, Run]
SHAPES = ("4096x4096", "11008x4096", "4096x14336", "1536x576")


@dataclass(frozen=True)
class Goal:
    """What is measured, the least value wanted, and how to find it; ``found`` gives None where it was not measured."""

    what: str
    least: float
    found: Callable[[Runs], float | None]
    share: bool = False

    def text(self, value: float) -> str:
        """``1.25x``, or ``90%`` where the goal is a share."""
        return f"{value:.0%}" if self.share else f"{value:.2f}x"


def _times(runs: Runs, bench: str, ours: str, theirs: str, **case: object) -> float | None:
    """How many times faster ours is than theirs in one case."""
    run = runs.get(bench)
    a, b = (run.find(engine, **case) for engine in (ours, theirs)) if run is not None else (None, None)
    if a is None or b is None or not a.value or not b.value:
        return None
    return b.value / a.value if a.less_is_better else a.value / b.value


def _worst(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return min(known, default=None)


def _layer(scheme: str, theirs: str, *rows: int, ours: str = "qcompile") -> Callable[[Runs], float | None]:
    return lambda runs: _worst(
        [_times(runs, "layers", ours, theirs, shape=s, scheme=scheme, M=m) for s in SHAPES for m in rows]
    )


def _bandwidth(scheme: str) -> Callable[[Runs], float | None]:
    def found(runs: Runs) -> float | None:
        run = runs.get("layers")
        records = [run.find("of bandwidth", shape=s, scheme=scheme, M=1) for s in SHAPES] if run is not None else []
        return _worst([record.value for record in records if record is not None])

    return found


def _language(ours: str, theirs: str, what: str) -> Callable[[Runs], float | None]:
    return lambda runs: _times(runs, "language", ours, theirs, what=what)


def _faster(runs: Runs, bench: str, ours: str, theirs: str, **case: object) -> float | None:
    """The same, ours under ``torch.compile``, traced, or compiled ahead of time: the fastest of these."""
    found = [_times(runs, bench, engine, theirs, **case) for engine in (ours, f"{ours}, traced", f"{ours}, package")]
    return max((times for times in found if times is not None), default=None)


def _encoder(*theirs: str) -> Callable[[Runs], float | None]:
    return lambda runs: _worst(
        [_faster(runs, "encoder", "qcompile qint8 a channel", it, batch=b) for b in ("1x128", "32x128") for it in theirs]
    )


def _vision(theirs: str) -> Callable[[Runs], float | None]:
    return lambda runs: _worst([_faster(runs, "vision", "qcompile qint8 activations", theirs, batch=b) for b in (1, 8)])


def _never_slower(runs: Runs) -> float | None:
    run = runs.get("grid")
    if run is None:
        return None
    plain = {tuple(r.case.values()): r.value for r in run.records if r.engine == "float32"}
    return _worst([plain[tuple(r.case.values())] / r.value for r in run.records if r.engine == "qcompile"])


def _cold(runs: Runs) -> float | None:
    return _times(runs, "compile_time", "qint4", "float32 compiled", cache="cold")


def _warm(runs: Runs) -> float | None:
    run = runs.get("compile_time")
    record = run.find("qint4", cache="warm") if run is not None else None
    return None if record is None else 10.0 / record.value


_ORT, _FLOAT = "onnxruntime", "float32 compiled"
_INT8 = ("onnxruntime int8", "onnxruntime int8 fused")
GOALS = (
    Goal("one layer, int4 g128, M=1: of the read bandwidth (worst shape)", 0.9, _bandwidth("int4g128"), share=True),
    Goal("one layer, int4 g128, M=1, against ONNX Runtime", 1.3, _layer("int4g128", _ORT, 1)),
    Goal("one layer, int4 g128, M=2 to 16, against ONNX Runtime", 1.2, _layer("int4g128", _ORT, 2, 4, 8, 16)),
    Goal("one layer, int4 g128, M=32, against ONNX Runtime", 1.3, _layer("int4g128", _ORT, 32)),
    Goal("one layer, int4 g128, M=32, against float32 compiled", 5.0, _layer("int4g128", _FLOAT, 32)),
    Goal("one layer, int4 g128, M=512, against ONNX Runtime", 1.8, _layer("int4g128", _ORT, 512)),
    Goal("one layer, int4 g128, M=512, against float32 compiled", 2.5, _layer("int4g128", _FLOAT, 512)),
    Goal("one layer, int8, M=1: of the read bandwidth (worst shape)", 0.9, _bandwidth("int8"), share=True),
    Goal("one layer, int8, M=512, against float32 compiled", 1.5, _layer("int8", _FLOAT, 512)),
    Goal("one layer, int8 x int8 a token, M=512, against float32", 2.0, _layer("int8", _FLOAT, 512, ours="per token")),
    Goal("one layer, int8 x int8 static, M=512, against float32", 2.0, _layer("int8", _FLOAT, 512, ours="static")),
    *(
        Goal(f"one layer, {name}, M=1: of the read bandwidth", 0.8, _bandwidth(f"{name}g128"), share=True)
        for name in ("int2", "int3", "int5", "int6")
    ),
    Goal("SmolLM2-135M, 4 bits, decode, against llama.cpp Q4_0", 1.25, _language("qint4", "Q4_0", "decode")),
    Goal("SmolLM2-135M, 4 bits, prompt of 512, against llama.cpp Q4_0", 2.0, _language("qint4", "Q4_0", "prefill")),
    Goal("SmolLM2-135M, 8 bits, decode, against llama.cpp Q8_0", 1.25, _language("qint8", "Q8_0", "decode")),
    Goal("SmolLM2-135M, 8 bits, prompt of 512, against llama.cpp Q8_0", 2.0, _language("qint8", "Q8_0", "prefill")),
    Goal("MiniLM, int8 with a scale a channel, against float32 compiled", 2.0, _encoder(_FLOAT)),
    Goal("MiniLM, int8 with a scale a channel, against ONNX Runtime's dynamic int8 (the faster one)", 1.2, _encoder(*_INT8)),
    Goal("EfficientNet-lite0, int8, against float32 compiled", 1.5, _vision(_FLOAT)),
    Goal("EfficientNet-lite0, int8, against ONNX Runtime int8", 1.0, _vision("onnxruntime int8")),
    Goal("never slower than float32: the worst case of the grid", 0.95, _never_slower),
    Goal("compiling SmolLM2 (qcompile.trace), cold: torch.compile's time over ours", 1 / 1.3, _cold),
    Goal("compiling SmolLM2 (qcompile.trace), warm: 10 s over ours", 1.0, _warm),
)
