"""The language model of the demo: perplexity, memory, size and speed of a float model and of its quantized selves.

Each variant lives in a process of its own. First all of them quantize and compile, two at a time; then they are timed
in turns, one running while the others wait, so that a slow moment of the machine falls on all of them alike.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from qcompile.demo import data
from qcompile.demo.cpus import available_cpus
from qcompile.demo.progress import bar
from qcompile.demo.table import megabytes, table
from qcompile.demo.variants import VARIANTS, Variant
from qcompile.demo.worker import Worker

__all__ = ["QUESTION", "LanguageResult", "run", "show"]

QUESTION = "What is the capital of France, and what is it known for?"


@dataclass
class LanguageResult:
    """What was measured of one variant. Bytes and seconds; ``decode`` and ``prefill`` hold one figure a step or run."""

    name: str
    load: dict[str, Any] = field(default_factory=dict)
    prepare: dict[str, Any] = field(default_factory=dict)
    perplexity: float = float("nan")
    prompt: int = 0
    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    answer: str = ""
    held: int = 0
    store: dict[str, Any] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)

    @property
    def decode_rate(self) -> float:
        """Tokens a second, from the median step."""
        return 1.0 / median(self.decode)

    @property
    def prefill_rate(self) -> float:
        """Tokens a second, from the median run."""
        return self.prompt / median(self.prefill)


def run(
    *,
    out: Path | None = None,
    folder: Path | None = None,
    text: str | None = None,
    variants: Sequence[Variant] = VARIANTS,
    tokens: int = 4096,
    context: int = 512,
    prompt: int = 512,
    room: int = 128,
    rounds: int = 3,
    steps: int = 24,
    answer_tokens: int = 48,
    question: str = QUESTION,
    threads: int | None = None,
    together: int = 2,
) -> list[LanguageResult]:
    """Measure each variant of a causal language model.

    Args:
        out: a folder for each quantized variant's report and graph dump, in a subfolder of its name; none when None.
        folder: a Hugging Face folder; SmolLM2-135M-Instruct, fetched and converted on first use, when None.
        text: the text for perplexity; the Brown corpus when None.
        variants: what to compare.
        tokens, context: how many tokens perplexity is taken over, and the window they are cut into.
        prompt, room: the prefill's length, and how many tokens more the static cache holds.
        rounds, steps: how often the variants take turns, and the decode steps of each turn.
        answer_tokens, question: the longest answer, and what is asked.
        threads: of torch in each process; the number of CPUs this process may use when None.
        together: how many variants quantize and compile at the same time.
    """
    if steps + 2 > room:
        raise ValueError(f"{steps} decode steps need a room of {steps + 2} tokens or more, given {room}")
    folder = folder or data.smollm2_folder()
    text = data.brown_text() if text is None else text
    threads = threads or available_cpus()
    results = [LanguageResult(variant.name, prompt=prompt) for variant in variants]
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="qcompile-demo-")))
        slice_file = work / "text.txt"
        slice_file.write_text(text, "utf-8")
        workers = []

        def start(variant: Variant) -> Worker:
            worker = Worker(
                "qcompile.demo.language_worker",
                *("--folder", str(folder), "--variant", variant.name, "--prompt", str(prompt), "--room", str(room)),
            )
            stack.callback(worker.close)
            return worker

        workers = [start(variant) for variant in variants]
        progress = stack.enter_context(bar(len(variants) * (4 + rounds), "language model"))

        def perplexity(worker: Worker, result: LanguageResult) -> None:
            progress.set_postfix_str(f"{result.name}: perplexity")
            answer = worker.ask("perplexity", file=str(slice_file), tokens=tokens, context=context)
            result.perplexity = answer["perplexity"]

        def store(index: int) -> None:
            variant, result = variants[index], results[index]
            if variant.quantized:
                progress.set_postfix_str(f"{result.name}: quantize an exported graph")
                worker = start(variant)
                worker.ask("load", threads=threads)
                place = ((out or work) / result.name).absolute()
                result.store = worker.ask("store", into=str(place / "model"))
                title = f"{folder.name} as {result.name}"
                result.report = worker.ask("report", html=str(place / "report.html"), title=title)
                result.held = result.report["held"]
                perplexity(worker, result)
                worker.close()
            else:
                result.store = {"disk": sum(path.stat().st_size for path in folder.glob("*.safetensors"))}
            progress.update()

        def ready(index: int) -> None:
            worker, result = workers[index], results[index]
            progress.set_postfix_str(f"{result.name}: load")
            result.load = worker.ask("load", threads=threads)
            progress.update()
            if not variants[index].quantized:
                result.held = result.load["parameter_bytes"]
                perplexity(worker, result)
            progress.set_postfix_str(f"{result.name}: compile")
            result.prepare = worker.ask("prepare")
            progress.update()

        pool = stack.enter_context(ThreadPoolExecutor(together))
        order = list(reversed(range(len(variants))))  # the slow ones first
        for outcome in [pool.submit(job, index) for job in (ready, store) for index in order]:
            outcome.result()
        for _ in range(rounds):
            for worker, result in zip(workers, results, strict=True):
                progress.set_postfix_str(f"{result.name}: speed")
                measured = worker.ask("speed", steps=steps)
                result.prefill.append(measured["prefill"])
                result.decode.extend(measured["decode"])
                progress.update()
        for worker, result in zip(workers, results, strict=True):
            progress.set_postfix_str(f"{result.name}: answer")
            result.answer = worker.ask("answer", question=question, tokens=answer_tokens)["text"]
            progress.update()
        if out is not None:
            progress.set_postfix_str("dump")
            quantized = [(w, v) for w, v in zip(workers, variants, strict=True) if v.quantized]
            dumps = [(worker, str((out / variant.name / "dump").absolute())) for worker, variant in quantized]
            for outcome in [pool.submit(worker.ask, "dump", folder=place) for worker, place in dumps]:
                outcome.result()
        progress.set_postfix_str("")
    return results


def show(results: Sequence[LanguageResult], question: str = QUESTION) -> str:
    """The results as tables of text."""
    base = next((r for r in results if r.name == "float32 compiled"), results[0])
    speed = [
        [
            r.name,
            f"{r.perplexity:.2f}",
            f"{r.prefill_rate:,.0f}",
            f"{r.decode_rate:.1f}",
            f"{r.decode_rate / base.decode_rate:.2f}x",
            megabytes(r.held),
            megabytes(r.store.get("disk")),
            f"{r.prepare['prefill_seconds'] + r.prepare['decode_seconds']:.0f}",
        ]
        for r in results
    ]
    head = ["", "perplexity", "prefill tok/s", "decode tok/s", f"/ {base.name}", "weights MB", "disk MB", "compile s"]
    size = [[r.name, *_resident(r, base)] for r in results]
    size_head = ["resident MB", "model", "quantizing: peak", "after", "compiling: peak", "after"]
    answers = "\n".join(f"  {r.name}: {r.answer}" for r in results)
    note = (
        "Resident MB are beyond what the imports take. Quantizing: an exported graph, nothing is compiled; in brackets the\n"
        "share of what both models' weights, and the quantized one's alone, take. Compiling: both programs of the\n"
        "loop are quantized and compiled, the compiler's own memory and the cache included; in brackets what is left\n"
        f"without what {base.name} has beside its weights, as a share of the quantized weights."
    )
    parts = [table(head, speed), *_busy(results), table(size_head, size), note, f"{question}\n{answers}"]
    return "\n\n".join(parts)


def _busy(results: Sequence[LanguageResult]) -> list[str]:
    """A warning where the median step is far from the fastest: somebody else had the processor, and ratios mislead."""
    slower = {r.name: median(r.decode) / min(r.decode) for r in results}
    name = max(slower, key=lambda n: slower[n])
    if slower[name] < 1.4:
        return []
    return [
        f"The machine was busy while this was timed: the median decode step of {name} took {slower[name]:.1f} times as "
        "long as its\nfastest. Do not believe the speeds; run it again when the machine is quiet."
    ]


def _resident(r: LanguageResult, base: LanguageResult) -> list[str]:
    """Cells: the model; the peak and the rest of quantizing a graph, with their shares; the same of compiling."""
    imports = r.load["before"]
    peak, after = "–", "–"
    if "peak" in r.store:
        extra, kept = (r.load["parameter_bytes"] + r.store[key] - r.store["before"] for key in ("peak", "after"))
        peak = f"{megabytes(extra)} ({extra / (r.load['parameter_bytes'] + r.held):.2f})"
        after = f"{megabytes(kept)} ({kept / r.held:.2f})"
    compiled = [megabytes(r.prepare[key] - imports) for key in ("peak", "after")]
    if "peak" in r.store and base is not r:
        # Generated code, graphs, guards and the cache of keys and values are what the float program holds, too.
        others = base.prepare["after"] - base.load["before"] - base.load["parameter_bytes"]
        compiled[1] += f" ({(r.prepare['after'] - imports - others) / r.held:.2f})"
    return [megabytes(r.load["after"] - imports), peak, after, *compiled]
