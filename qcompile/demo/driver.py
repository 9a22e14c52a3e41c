"""The demo's command line: which parts run, with how much of everything, and what is printed."""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qcompile.demo.cpus import available_cpus
from qcompile.demo.fetch import DownloadError
from qcompile.demo.progress import say
from qcompile.demo.worker import WorkerError

__all__ = ["PARTS", "main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts that the arguments name; the exit status is 1 when one of them could not run."""
    parser = argparse.ArgumentParser(prog="qcompile demo", description="Real models, float against quantized.")
    parser.add_argument("--quick", action="store_true", help="less of everything: minutes instead of ten")
    parser.add_argument("--only", choices=sorted(PARTS), action="append", help="one part (may be given several times)")
    parser.add_argument("--out", type=Path, default=Path("qcompile-demo"), help="folder for the report and the dump")
    options = parser.parse_args(argv)
    start = time.perf_counter()
    options.out.mkdir(parents=True, exist_ok=True)
    print(_machine(), flush=True)
    figures: dict[str, Any] = {"machine": _machine()}
    failed = []
    for name in options.only or PARTS:
        title, part = PARTS[name]
        print(f"\n## {title}\n", flush=True)
        try:
            text, figures[name] = part(options.quick, options.out)
        except (DownloadError, WorkerError, ModuleNotFoundError) as error:
            failed.append(name)
            print(f"{title} could not run: {error}", flush=True)
            continue
        print(text, flush=True)
    record = options.out / "figures.json"
    _write(record, json.dumps(figures, indent=1))
    print(f"\n{time.perf_counter() - start:.0f} s in all; every figure lies in {record}", flush=True)
    if failed:
        say(f"not run: {', '.join(failed)}")
    return 1 if failed else 0


def _language(quick: bool, out: Path) -> tuple[str, Any]:
    from qcompile.demo import language
    from qcompile.demo.loading import missing

    reason = missing()
    if reason:
        raise ModuleNotFoundError(reason)
    amounts: dict[str, Any] = {"tokens": 1024, "rounds": 2, "steps": 12} if quick else {}
    results = language.run(out=out, **amounts)
    pages = [str(out / r.name / page) for r in results if r.report for page in ("report.html", "dump/index.html")]
    lies = "What became of each weight, and what each pass did to the graph:\n" + "\n".join(f"  {p}" for p in pages)
    return f"{language.show(results)}\n\n{lies}", [asdict(result) for result in results]


def _encoder(quick: bool, out: Path) -> tuple[str, Any]:
    from qcompile.demo import encoder
    from qcompile.demo.loading import missing

    reason = missing()
    if reason:
        raise ModuleNotFoundError(reason)
    results = encoder.run(count=60 if quick else 200)
    return encoder.show(results), [asdict(result) for result in results]


def _vision(quick: bool, out: Path) -> tuple[str, Any]:
    from qcompile.demo import vision

    results = vision.run(epochs=2 if quick else 5)
    return vision.show(results), [asdict(result) for result in results]


PARTS: dict[str, tuple[str, Callable[[bool, Path], tuple[str, Any]]]] = {
    "language": ("Language model: SmolLM2-135M-Instruct on the Brown corpus", _language),
    "encoder": ("Sentence encoder: all-MiniLM-L6-v2 finds the other half of a document", _encoder),
    "vision": ("Image classifier: a small convolutional network on MNIST", _vision),
}
"""The parts by name: a title, and what runs it and returns its text and its figures."""


def _machine() -> str:
    import torch

    return (
        f"{available_cpus()} CPUs, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}, "
        f"Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    )


def _write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, "utf-8")
    temporary.replace(path)
