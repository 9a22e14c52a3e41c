"""``qcompile.generate`` against transformers' own generation, by chunks, in batches, with ends."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import qcompile
from qcompile.generation import Decoder

transformers = pytest.importorskip("transformers", reason="generating needs transformers")


def tiny(kind: str = "llama") -> Any:
    torch.manual_seed(0)
    if kind == "gpt2":
        config = transformers.GPT2Config(vocab_size=97, n_embd=64, n_layer=2, n_head=4, n_positions=128)
    else:
        config = transformers.LlamaConfig(
            vocab_size=97, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96,
            num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=True,
        )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():  # the usual small initialisation makes every answer the same token
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def theirs(model: Any, tokens: Tensor, count: int) -> Tensor:
    return model.generate(tokens, max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("chunks", [(), (4,), (16, 3)])
def test_chunks_change_nothing(kind: str, chunks: tuple[int, ...]) -> None:
    model, tokens = tiny(kind), torch.randint(97, (2, 11), generator=torch.Generator().manual_seed(1))
    want = theirs(model, tokens, 9)
    decoder = Decoder(model, 20, batch=2)
    for _ in range(2):  # the second time into a cache that was used
        got = torch.cat([tokens, *decoder.stream(tokens, 9, chunks)], 1)
        assert torch.equal(got, want)
    assert len(set(want.flatten().tolist())) > 4


def test_only_the_shapes_that_were_asked_for() -> None:
    seen: list[int] = []

    def watch(step: Any) -> Any:
        def call(tokens: Tensor) -> Tensor:
            seen.append(tokens.shape[1])
            return step(tokens)

        return call

    decoder = Decoder(tiny(), 64, watch)
    list(decoder.stream(torch.randint(97, (1, 45)), 3, (16, 4)))
    assert seen == [16, 16, 4, 4, 4, 1, 1, 1]


def test_generate_compiles_and_quantizes() -> None:
    torch._dynamo.reset()
    model, tokens = tiny(), torch.tensor([[5, 9, 2, 44, 17], [1, 2, 3, 4, 5]])
    want = theirs(model, tokens, 6)
    steps: list[Tensor] = []
    got = qcompile.generate(model, tokens, 6, chunks=(4,), on_token=steps.append, weights="qint8", min_elements=0)
    assert got.shape == (2, 11) and torch.equal(torch.cat(steps, 1), got[:, 5:])
    # 8 bits may choose another token where two are close; the first one hangs on no choice before
    assert torch.equal(got[:, :6], want[:, :6])


def test_ends_and_other_choices() -> None:
    model, tokens = tiny(), torch.tensor([[5, 9, 2], [1, 2, 3]])
    decoder = Decoder(model, 16, batch=2, pick=lambda logits: logits.argmin(-1, keepdim=True))
    least = torch.cat(list(decoder.stream(tokens, 2)), 1)
    assert not torch.equal(least, theirs(model, tokens, 2)[:, 3:])
    want = theirs(model, tokens, 8)[:, 3:]
    stop = {int(want[0, 2]), int(want[1, 4])}
    torch._dynamo.reset()
    got = qcompile.generate(model, tokens, 8, stop=stop, chunks=(), weights="qint8", exact=True, min_elements=10**9)[:, 3:]
    for row, full in zip(got.tolist(), want.tolist(), strict=True):
        end = next(i for i, t in enumerate(full) if t in stop)
        assert row[: end + 1] == full[: end + 1] and set(row[end:]) == {full[end]}
    assert got.shape[1] <= 5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: qcompile.generate(m, torch.zeros(3, dtype=torch.long), 2), "must be \\[batch, n\\]"),
        (lambda m: qcompile.generate(m, torch.zeros(1, 2, dtype=torch.long), 0), "at least 1"),
        (lambda m: qcompile.generate(m, torch.zeros(1, 2, dtype=torch.long), 2, wieghts="qint4"), "unknown option"),
        (lambda m: Decoder(m, 1), "need at least 2"),
        (lambda m: Decoder(m, 4, batch=0), "at least 1"),
        (lambda m: Decoder(m, 4).prompt(torch.zeros(1, 5, dtype=torch.long)), "do not fit a cache of 4"),
        (lambda m: Decoder(m, 4).prompt(torch.zeros(1, 2, dtype=torch.long), (0,)), "positive lengths"),
        (lambda m: Decoder(m, 4).feed(torch.zeros(2, 1, dtype=torch.long)), "allowed is"),
    ],
)
def test_refusals(call: Any, message: str) -> None:
    torch._dynamo.reset()
    with pytest.raises(ValueError, match=message):
        call(tiny())
