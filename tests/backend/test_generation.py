"""A language model of transformers' own code, tiny and random, with its static cache: prefill, then decode."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from small import distance
from torch import Tensor, nn

from qcompile import history
from qcompile.compiling import cache
from qcompile.kernels import QTensor, Scheme
from qcompile.weight_cache import ids_in

transformers = pytest.importorskip("transformers")

WORDS = 128


@pytest.fixture
def model() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=WORDS, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    made = transformers.LlamaForCausalLM(config).eval()
    # Random models of this size give nearly uniform words; larger weights make the results depend on every layer.
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4)
    return made


def rounded(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.copy_(QTensor.quantize(parameter, Scheme.parse("qint8/group=32/symmetric/float16")).dequantize())
    return model


def decode(model: nn.Module, call: Any, words: Tensor, steps: int) -> Tensor:
    """Logits of the prompt's last word and of ``steps`` greedy ones, through a static cache."""
    held = transformers.StaticCache(config=model.config, max_cache_len=32)
    found = []
    position = 0
    for _ in range(steps + 1):
        count = words.shape[1]
        place = torch.arange(position, position + count)
        result = call(input_ids=words, past_key_values=held, position_ids=place[None], use_cache=True)
        found.append(result.logits[:, -1].clone())
        words, position = found[-1].argmax(-1, keepdim=True), position + count
    return torch.stack(found)


@pytest.mark.slow
def test_prefill_and_decode_share_their_weights(model: nn.Module) -> None:
    words = torch.arange(10)[None] * 7 % WORDS
    reference = rounded(model)
    options = {"weights": "qint8", "exact": True, "min_elements": 0}
    with torch.no_grad():
        want = decode(reference, reference, words, 4)
        model.compile(backend="qcompile", options=options, fullgraph=True)
        assert distance(decode(model, model, words, 4), want) < 1e-4
        assert distance(decode(model, model, words, 4), want) < 1e-4
    graphs = history.graphs(model)
    assert len(graphs) >= 2
    assert all(d.quantized for g in graphs for d in g.decisions if d.weight)
    weights = [p for p in model.parameters() if p.dim() == 2]
    assert all(p.isnan().all() for p in weights)
    for parameter in weights:
        ours = ids_in(cache.identity(parameter))
        assert len([k for k in cache if k[0] == "weight" and ours <= ids_in(k)]) == 1
        assert len([k for k in cache if k[0] == "packed" and ours <= ids_in(k)]) == 1


@pytest.mark.slow
def test_generate_runs_the_compiled_forward(model: nn.Module) -> None:
    words = torch.arange(10)[None] * 7 % WORDS
    reference = rounded(model)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    want = reference.generate(words, **options)
    model.forward = torch.compile(
        model.forward, backend="qcompile", options={"weights": "qint8", "exact": True, "min_elements": 0}
    )
    assert torch.equal(model.generate(words, **options), want)
    assert history.graphs(model)
