"""The sentence encoder of the demo: do the two halves of a document still find each other when it is quantized?

Each Brown document is cut in the middle. A half counts as found when its nearest neighbour by cosine, among all other
halves of all documents, is the other half of its own document.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qcompile.demo import data
from qcompile.demo.progress import bar
from qcompile.demo.table import table
from qcompile.demo.variants import VARIANTS, Variant

__all__ = ["EncoderResult", "halves", "run", "show", "top1"]


@dataclass(frozen=True)
class EncoderResult:
    """One variant: accuracy, mean cosine to float's embeddings, and sentences a second without the first batch."""

    name: str
    accuracy: float
    cosine: float
    rate: float


def halves(text: str) -> tuple[str, str]:
    """The first and the second half of a text, cut between two words."""
    words = text.split(" ")
    middle = len(words) // 2
    return " ".join(words[:middle]), " ".join(words[middle:])


def top1(embeddings: Tensor) -> float:
    """The share of rows whose nearest other row is their partner: row 2i's is 2i + 1 and the other way round.

    Args:
        embeddings: float ``[2n, d]`` with rows of length 1.
    """
    count = len(embeddings)
    if embeddings.dim() != 2 or count % 2 or count == 0:
        raise ValueError(f"embeddings has shape {tuple(embeddings.shape)}, allowed is [2n, d]")
    similarity = (embeddings @ embeddings.T).fill_diagonal_(-2.0)
    partner = torch.arange(count) ^ 1
    return float((similarity.argmax(1) == partner).float().mean())


def run(
    *,
    folder: Path | None = None,
    documents: Sequence[str] | None = None,
    variants: Sequence[Variant] = (VARIANTS[0], *VARIANTS[2:]),
    count: int = 200,
    length: int = 256,
    batch: int = 20,
) -> list[EncoderResult]:
    """Measure each variant of an encoder of transformers with mean pooling.

    Args:
        folder: a Hugging Face folder; all-MiniLM-L6-v2, fetched on first use, when None.
        documents: texts; the first ``count`` of the Brown corpus, spread over its genres, when None.
        variants: what to compare; the first is what the cosine is taken against.
        count: how many documents.
        length: tokens of each half that the encoder sees; longer halves are cut, shorter ones padded.
        batch: halves in one call.
    """
    from qcompile.demo.loading import load

    folder = folder or data.minilm_folder()
    if documents is None:
        corpus = data.brown()
        documents = [corpus[i * len(corpus) // count].text for i in range(count)]
    texts = [half for document in documents for half in halves(document)]
    results: list[EncoderResult] = []
    reference: Tensor | None = None
    with bar(len(variants) * ((len(texts) + batch - 1) // batch), "sentence encoder") as progress:
        for variant in variants:
            progress.set_postfix_str(variant.name)
            model, tokenizer = load(folder, "AutoModel")
            embed = variant.compile(_embedder(model))
            rows, seconds = [], []
            for start in range(0, len(texts), batch):
                inputs = _tokens(tokenizer, texts[start : start + batch], batch, length)
                begin = time.perf_counter()
                with torch.no_grad():
                    out = embed(inputs["input_ids"], inputs["attention_mask"])
                seconds.append(time.perf_counter() - begin)
                rows.append(out[: len(texts) - start].clone())
                progress.update()
            embeddings = torch.cat(rows)
            reference = embeddings if reference is None else reference
            steady = seconds[1:] or seconds  # the first call compiles
            results.append(
                EncoderResult(
                    variant.name,
                    top1(embeddings),
                    float((embeddings * reference).sum(1).mean()),
                    batch * len(steady) / sum(steady),
                )
            )
        progress.set_postfix_str("")
    return results


def show(results: Sequence[EncoderResult]) -> str:
    """The results as a table of text."""
    rows = [[r.name, f"{r.accuracy:.1%}", f"{r.cosine:.4f}", f"{r.rate:.1f}"] for r in results]
    return table(["variant", "halves found", f"cosine to {results[0].name}", "texts/s"], rows)


def _embedder(model: Any) -> Callable[[Tensor, Tensor], Tensor]:
    def embed(tokens: Tensor, mask: Tensor) -> Tensor:
        """Token ids and mask, int64 ``[b, t]``, to embeddings of length 1, float ``[b, d]``."""
        hidden = model(input_ids=tokens, attention_mask=mask).last_hidden_state
        weight = mask[..., None].to(hidden.dtype)
        return torch.nn.functional.normalize((hidden * weight).sum(1) / weight.sum(1), dim=1)

    return embed


def _tokens(tokenizer: Any, texts: Sequence[str], batch: int, length: int) -> dict[str, Tensor]:
    """The texts as one batch of a fixed size; the last one is filled up with copies of its first text."""
    filled = [*texts, *([texts[0]] * (batch - len(texts)))]
    out = tokenizer(filled, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    return {"input_ids": out["input_ids"], "attention_mask": out["attention_mask"]}
