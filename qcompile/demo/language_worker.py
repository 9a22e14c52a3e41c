"""The process that runs one variant of a causal language model; ``language.py`` is its parent."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qcompile.demo import memory
from qcompile.demo.variants import Variant, by_name
from qcompile.demo.worker import serve

__all__ = ["LanguageWorker"]


class LanguageWorker:
    """Load, prepare (quantize and compile), then measure; each method returns what JSON can carry.

    Args:
        folder: a Hugging Face folder with a causal language model and its tokenizer.
        variant: how to run it.
        prompt: how many tokens the prefill program takes.
        room: how many tokens the cache has beyond them.
    """

    def __init__(self, folder: Path, variant: Variant, prompt: int, room: int) -> None:
        self.folder, self.variant, self.prompt, self.room = folder, variant, prompt, room

    def load(self, threads: int) -> dict[str, Any]:
        """Import and load; resident bytes before (with everything imported) and after."""
        import torch
        import transformers  # noqa: F401  imported here so that the figure before loading has it

        from qcompile.demo.loading import load

        torch.set_num_threads(threads)
        if self.variant.backend is not None:
            # The compiler's own modules are some 200 MB: no part of any model.
            import torch._inductor.compile_fx
        if self.variant.quantized:
            import qcompile  # noqa: F401
        memory.settle()
        before = memory.resident()
        start = time.perf_counter()
        self.model, self.tokenizer = load(self.folder)
        memory.settle()
        after = memory.resident()
        parameters = {p.data_ptr(): p.numel() * p.element_size() for p in self.model.parameters()}
        self.parameter_bytes = sum(parameters.values())
        return {
            "seconds": time.perf_counter() - start,
            "before": before.total,
            "after": after.total,
            "parameter_bytes": self.parameter_bytes,
        }

    def store(self, into: str) -> dict[str, Any]:
        """Export the plain forward, quantize the graph, save it, and lower it for ``perplexity``.

        Nothing is compiled here, so what is counted is the float model, the quantized one, and what quantizing needs.
        Returns resident bytes before, meanwhile and after, seconds, and bytes on disk.
        """
        import torch

        import qcompile
        from qcompile.export import lowered

        tokens = torch.zeros(1, 16, dtype=torch.long)
        sequence = {1: torch.export.Dim.AUTO}
        with torch.no_grad():
            # Not strict: a strict export keeps the float model alive in Dynamo's caches after it is given up.
            program = torch.export.export(_logits_module(self.model), (tokens,), dynamic_shapes=(sequence,), strict=False)
            self.model = None
            _warm_up(self.variant.options)
            memory.settle()
            before = memory.resident().total
            memory.reset_peak()
            start = time.perf_counter()
            quantized = qcompile.quantize(program, **self.variant.options)
            seconds = time.perf_counter() - start
            peak = memory.peak()
            del program
            memory.settle()
            after = memory.resident().total
            folder = qcompile.save(quantized, into)
            self.logits = lowered(quantized).module()
        self.quantized = quantized
        disk = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        return {"before": before, "peak": peak, "after": after, "seconds": seconds, "disk": disk}

    def prepare(self) -> dict[str, Any]:
        """Compile both programs of the loop by running each once; seconds, the peak meanwhile, resident bytes after."""
        import torch

        from qcompile.demo.generation import GreedyDecoder

        memory.reset_peak()
        start = time.perf_counter()
        self.decoder = GreedyDecoder(self.model, self.prompt + self.room, self.variant.compile)
        token = self.decoder.feed(torch.arange(self.prompt)[None] % 1000 + 1000)
        first = time.perf_counter()
        peak_first = memory.peak()
        self.decoder.feed(token)
        end = time.perf_counter()
        memory.settle()
        return {
            "prefill_seconds": first - start,
            "decode_seconds": end - first,
            "peak_first": peak_first,
            "peak": memory.peak(),
            "after": memory.resident().total,
        }

    def perplexity(self, file: str, tokens: int, context: int) -> dict[str, Any]:
        """Perplexity over the first ``tokens`` tokens of a text file, in independent windows of ``context``.

        Float: the model, eagerly. Quantized: the program that ``store`` lowered, with the kernels that the compiled one
        has too, but without a compiler: nothing is gained by compiling what runs a few times.
        """
        import math

        import torch

        from qcompile.demo.generation import negative_log_likelihood

        text = Path(file).read_text("utf-8")
        ids = self.tokenizer(text, return_tensors="pt").input_ids[0][:tokens]
        if len(ids) < tokens or tokens % context:
            raise ValueError(f"{len(ids)} of {tokens} tokens in {file}; windows of {context} must divide them")
        logits = self.logits if self.variant.quantized else _logits_module(self.model)
        start = time.perf_counter()
        total = 0.0
        with torch.no_grad():
            for row in ids.view(-1, context):
                total += float(negative_log_likelihood(logits(row[None]), row[None]))
        count = tokens - tokens // context
        return {"perplexity": math.exp(total / count), "seconds": time.perf_counter() - start}

    def report(self, html: str, title: str) -> dict[str, Any]:
        """Write the page of the report on what ``store`` quantized; its totals, and the bytes of all parameters."""
        from dataclasses import asdict

        import qcompile

        report = qcompile.report(self.quantized)
        target = Path(html)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(report.to_html(title), "utf-8")
        return {**asdict(report.totals), "held": report.totals.bytes + self._other_bytes(report.totals.float_bytes)}

    def _other_bytes(self, counted: int) -> int:
        """Bytes of parameters that are no weight of a matmul or lookup, such as those of norms."""
        return self.parameter_bytes - counted

    def speed(self, steps: int) -> dict[str, Any]:
        """Seconds of one prefill and of each of ``steps`` decode steps after it."""
        import torch

        prompt = torch.randint(1000, 10_000, (1, self.prompt), generator=torch.Generator().manual_seed(0))
        prefill, token = self.decoder.time_prefill(prompt)
        return {"prefill": prefill, "decode": self.decoder.time_decode(token, steps)}

    def dump(self, folder: str) -> None:
        """Compile the decode step once more, writing what each pass did to its graph into a folder.

        The last thing that is asked: what a dump holds would count as memory for quantizing. Inductor finds what it made
        before in its cache.
        """
        import torch

        torch._dynamo.reset()
        self.decoder.reset()
        with _dumping(folder):
            self.decoder.feed(torch.tensor([[1]]))

    def answer(self, question: str, tokens: int) -> dict[str, Any]:
        """The greedy answer to one chat message, through the tokenizer's chat template when it has one."""
        if self.tokenizer.chat_template is None:
            ids = self.tokenizer(question).input_ids
        else:
            messages = [{"role": "user", "content": question}]
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            ids = self.tokenizer(text, add_special_tokens=False).input_ids
        stop = {self.tokenizer.eos_token_id}
        start = time.perf_counter()
        out = list(self.decoder.answer(ids, tokens, stop))
        return {
            "text": self.tokenizer.decode(out, skip_special_tokens=True).strip(),
            "tokens": len(out),
            "seconds": time.perf_counter() - start,
        }


def _logits_module(model: Any) -> Any:
    """A module from tokens, int64 ``[1, n]``, to logits ``[1, n, vocabulary]``, without a cache."""
    import torch

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.model(input_ids=tokens, use_cache=False).logits

    return Logits().eval()


def _warm_up(options: dict[str, Any]) -> None:
    """Quantize a small graph: what is imported and loaded on first use is there afterwards, and no part of any model."""
    import torch

    import qcompile

    small = torch.nn.Linear(256, 256)
    qcompile.quantize(torch.export.export(small.eval(), (torch.zeros(1, 256),)), **options)


@contextmanager
def _dumping(folder: str) -> Iterator[None]:
    """Inside the block what is compiled is dumped there."""
    os.environ["QCOMPILE_DUMP"] = folder
    try:
        yield
    finally:
        del os.environ["QCOMPILE_DUMP"]


def main(argv: list[str] | None = None) -> None:
    """Serve the methods of a LanguageWorker to the parent process."""
    parser = argparse.ArgumentParser(prog="python -m qcompile.demo.language_worker", description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--variant", required=True)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--room", type=int, default=128)
    options = parser.parse_args(argv)
    serve(LanguageWorker(options.folder, by_name(options.variant), options.prompt, options.room))


if __name__ == "__main__":
    main()
