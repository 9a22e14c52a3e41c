"""Text generation with SmolLM2-135M: a question answered by the float model and by its quantized selves.

    python docs/examples/text_generation.py [--question "..."] [--compile] [--quick]

The models are transformers' own modules, quantized in place, run by transformers' own ``generate``:

    model = AutoModelForCausalLM.from_pretrained(folder)
    qcompile.quantize(model, weights=qcompile.qint8)
    qcompile.freeze(model)
    model.generate(...)

Layers that run on their own, one by one, are what a model needs that no tracer takes. This one can be traced, and is faster
where the whole step is one program: ``--compile`` adds ``torch.compile(model, backend="qcompile")`` of the qint8 module,
which reaches the graph and the kernels that compiling the float model with this backend reaches; `docs/demo.md` has its
speed in a loop made for it.

Perplexity is over the first 1,024 tokens of the Brown corpus. The model's file is itself 4-bit (see `docs/demo.md`).

Seen on an AMD EPYC (Zen 5, AVX-512 and VNNI; one thread of two busy cores): perplexity 31.22 float, 31.41 qint8
(31.46 compiled), 37.26 qint4; 21.6, 75.0 and 73.7 tokens/s; 538 MB become 143 and 93. Each names Paris.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import need, stage, weight_bytes, working_copy
from torch import Tensor, nn

import qcompile
from qcompile.demo.table import table

QUESTION = "What is the capital of France, and what is it known for?"
VARIANTS = {
    "float32": None,
    "qint8": {"weights": "qint8"},
    "qint4, hqq": {"weights": "qint4", "optimizer": "hqq"},
}


@dataclass(frozen=True)
class Answer:
    """What a model said, how fast (tokens a second, the prompt's included in the time), and how well it models a text."""

    text: str
    rate: float
    perplexity: float
    size: int


@torch.no_grad()
def perplexity(model: Any, tokens: Tensor) -> float:
    """Of the tokens, int64 ``[1, n]``, in one window."""
    logits = model(tokens).logits[0, :-1].float()
    return float(nn.functional.cross_entropy(logits, tokens[0, 1:]).exp())


@torch.no_grad()
def generate(model: Any, prompt: Tensor, longest: int, end: int) -> tuple[Tensor, float]:
    """The tokens that follow the prompt, int64 ``[1, n]``, chosen greedily, and the seconds it took."""
    start = time.perf_counter()
    out = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=longest, do_sample=False, pad_token_id=end
    )
    return out[0, prompt.shape[1] :], time.perf_counter() - start


def answer(model: Any, tokenizer: Any, question: str, text: Tensor, longest: int) -> Answer:
    """Ask a chat model, and take its perplexity over a text."""
    chat = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    generate(model, prompt["input_ids"], 1, tokenizer.eos_token_id)  # what is done once is not timed
    said, seconds = generate(model, prompt["input_ids"], longest, tokenizer.eos_token_id)
    words = tokenizer.decode(said, skip_special_tokens=True).strip()
    return Answer(words, len(said) / seconds, perplexity(model, text), weight_bytes(model))


def main() -> None:
    """Fetch the model, ask each variant, and print the answers and the table."""
    parser = argparse.ArgumentParser(description="SmolLM2-135M: one question, float and quantized")
    parser.add_argument("--question", default=QUESTION)
    parser.add_argument("--tokens", type=int, default=48, help="the longest answer (48)")
    parser.add_argument("--model", type=Path, help="another folder of a chat model that transformers loads")
    parser.add_argument("--compile", action="store_true", help="also compile the qint8 module with the qcompile backend")
    parser.add_argument("--quick", action="store_true", help="answers of 8 tokens, perplexity over 128")
    options = parser.parse_args()
    need("transformers", "gguf", "accelerate")
    from qcompile.demo.data import brown_text, smollm2_folder
    from qcompile.demo.loading import load

    model, tokenizer = load(options.model or smollm2_folder())
    longest, count = (8, 128) if options.quick else (options.tokens, 1024)
    text = tokenizer(brown_text(2), return_tensors="pt").input_ids[:, :count]
    rows = []
    for name, wanted in VARIANTS.items():
        with stage(f"{name}: quantize"):
            each = working_copy(model)
            if wanted is not None:
                qcompile.freeze(qcompile.quantize(each, **wanted))
        with stage(f"{name}: answer"):
            found = answer(each, tokenizer, options.question, text, longest)
        print(f"{name}:\n    {found.text}")
        rows.append([name, f"{found.perplexity:.2f}", f"{found.rate:.1f}", f"{found.size / 1e6:.0f}"])
        if options.compile and name == "qint8":
            with stage(f"{name}: compile and answer"), torch.no_grad():
                fast = torch.compile(each, backend="qcompile")
                rows.append([f"{name}, compiled", f"{perplexity(fast, text):.2f}", "", ""])
    print(table(["SmolLM2-135M", "perplexity", "tokens/s", "MB"], rows))


if __name__ == "__main__":
    main()
