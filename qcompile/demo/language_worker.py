"""The process that runs one variant of a causal language model; ``language.py`` is its parent."""

from __future__ import annotations

import argparse
import time
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
        # safetensors maps the file: pages count as resident only once they were read.
        for parameter in self.model.parameters():
            parameter.sum()
        memory.settle()
        after = memory.resident()
        parameters = {p.data_ptr(): p.numel() * p.element_size() for p in self.model.parameters()}
        return {
            "seconds": time.perf_counter() - start,
            "before": before.total,
            "after": after.total,
            "parameter_bytes": sum(parameters.values()),
        }

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
        """Perplexity over the first ``tokens`` tokens of a text file, in independent windows of ``context``."""
        import math

        import torch

        from qcompile.demo.generation import score_function

        text = Path(file).read_text("utf-8")
        ids = self.tokenizer(text, return_tensors="pt").input_ids[0][:tokens]
        if len(ids) < tokens or tokens % context:
            raise ValueError(f"{len(ids)} of {tokens} tokens in {file}; windows of {context} must divide them")
        # Nothing is gained by compiling what runs a few times and is no faster compiled; the quantized model has no
        # other way to run than its compiled one.
        score = score_function(self.model, self.variant.compile if self.variant.quantized else lambda f: f)
        start = time.perf_counter()
        total = 0.0
        with torch.no_grad():
            for row in ids.view(-1, context):
                total += float(score(row[None].clone()))
        count = tokens - tokens // context
        return {"perplexity": math.exp(total / count), "seconds": time.perf_counter() - start}

    def speed(self, steps: int) -> dict[str, Any]:
        """Seconds of one prefill and of each of ``steps`` decode steps after it."""
        import torch

        prompt = torch.randint(1000, 10_000, (1, self.prompt), generator=torch.Generator().manual_seed(0))
        prefill, token = self.decoder.time_prefill(prompt)
        return {"prefill": prefill, "decode": self.decoder.time_decode(token, steps)}

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
