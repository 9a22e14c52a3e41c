"""The greedy loop on tiny random models against transformers' own generation, and its programs against their count."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from qcompile.demo.generation import GreedyDecoder, negative_log_likelihood

transformers = pytest.importorskip("transformers", reason="the demo's models are transformers models")


def tiny(kind: str) -> Any:
    sizes: dict[str, Any] = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    if kind == "llama":
        config = transformers.LlamaConfig(
            **sizes, intermediate_size=48, num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True
        )
    else:
        config = transformers.GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():  # the usual small initialisation makes every answer the same token
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_answer_is_what_generate_gives(kind: str) -> None:
    model = tiny(kind)
    prompt = [5, 9, 2, 44, 17]
    expected = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)[
        0, len(prompt) :
    ].tolist()
    assert len(set(expected)) > 2
    decoder = GreedyDecoder(model, 32)
    assert list(decoder.answer(prompt, 12, set())) == expected
    assert list(decoder.answer(prompt, 12, set())) == expected  # the cache is empty again
    stop = expected[4]
    assert list(decoder.answer(prompt, 12, {stop})) == expected[: expected.index(stop)]


def test_prefill_and_single_tokens_agree() -> None:
    model = tiny("llama")
    decoder = GreedyDecoder(model, 32)
    tokens = torch.randint(0, 97, (1, 9))
    together = decoder.feed(tokens)
    decoder.reset()
    for column in range(9):
        one = decoder.feed(tokens[:, column : column + 1])
    assert torch.equal(together, one)


def test_two_programs_and_no_recompilation() -> None:
    counter = CompileCounterWithBackend("eager")
    decoder = GreedyDecoder(tiny("llama"), 32, lambda f: torch.compile(f, backend=counter, fullgraph=True, dynamic=False))
    prompt = torch.randint(0, 97, (1, 9))
    token = decoder.feed(prompt)
    assert len(decoder.time_decode(token, 4)) == 4
    seconds, again = decoder.time_prefill(prompt)
    assert seconds > 0
    assert torch.equal(again, token)
    decoder.time_decode(prompt[:, :1], 4)  # a slice, whose strides are not those of a token of its own
    assert list(decoder.answer([1, 2, 3], 4, set()))
    assert counter.frame_count == 2


def test_wrong_tokens_raise() -> None:
    decoder = GreedyDecoder(tiny("llama"), 8)
    with pytest.raises(ValueError, match=r"\[1, n\]"):
        decoder.feed(torch.zeros(2, 3, dtype=torch.long))
    with pytest.raises(ValueError, match=r"\[1, n\]"):
        decoder.feed(torch.zeros(1, 0, dtype=torch.long))
    with pytest.raises(ValueError, match="do not fit a cache of 8"):
        decoder.feed(torch.zeros(1, 9, dtype=torch.long))
    with pytest.raises(ValueError, match="no tokens"):
        list(decoder.answer([], 3, set()))
    with pytest.raises(ValueError, match="max_length"):
        GreedyDecoder(tiny("llama"), 1)


def test_negative_log_likelihood_is_what_transformers_trains_on() -> None:
    model = tiny("llama")
    tokens = torch.randint(0, 97, (1, 11))
    with torch.no_grad():
        out = model(input_ids=tokens, labels=tokens)  # its loss is the mean over the same ten predictions
    assert float(negative_log_likelihood(out.logits, tokens)) == pytest.approx(10 * float(out.loss), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_quantized_loop_answers_like_float_and_compiles_two_programs(kind: str) -> None:
    from qcompile import history

    prompt = torch.randint(0, 97, (1, 9))
    want = list(GreedyDecoder(tiny(kind), 32).answer(prompt[0].tolist(), 12, set()))
    model = tiny(kind)
    options = {"weights": "qint8", "group_size": 32, "exact": True, "min_elements": 0}
    decoder = GreedyDecoder(
        model, 32, lambda f: torch.compile(f, backend="qcompile", fullgraph=True, dynamic=False, options=options)
    )
    token = decoder.feed(prompt)
    decoder.time_decode(token, 3)
    got = list(decoder.answer(prompt[0].tolist(), 12, set()))
    graphs = history.graphs(model)
    assert len(graphs) == 2
    # Greedy choices of a random model are often close calls: once one differs, what follows is another text.
    same = next((i for i, (a, b) in enumerate(zip(got, want, strict=True)) if a != b), 12)
    assert same >= 4
    assert all(row.quantized for graph in graphs for row in graph.decisions if row.weight)
