"""Architectures that people use are quantized with no code for any of them."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from architectures import ARCHITECTURES, Architecture, model_of
from harness import without_inductor
from specimen import Specimen, compiled, eager, exported, traced

from qcompile import trace
from qcompile.generation import Decoder


def _check(found: Specimen) -> None:
    assert found.quantized > 0
    assert all(row.quantized or row.reason for row in found.rows)
    whole = {row.weight.partition("[")[0] for row in found.rows if row.quantized}
    assert set(found.experts) <= whole
    assert found.left == []
    assert found.close, f"cosine {found.cosine:.4f}, with noise {found.noise}"


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=str)
def test_exported(architecture: Architecture) -> None:
    found = exported(architecture)
    _check(found)
    assert found.matmuls is not None
    assert len(found.rows) >= found.matmuls


#: Of each family one or two: the way through Dynamo takes longer.
COMPILED = (
    "llama", "gemma2", "gpt2", "bloom", "opt", "mixtral", "gpt_oss", "recurrent_gemma", "mamba", "bert", "albert",
    "deberta-v2", "t5", "bart", "vit", "swin", "convnext", "resnet", "wav2vec2", "whisper",
)  # fmt: skip


@pytest.mark.parametrize("architecture", [a for a in ARCHITECTURES if a.name in COMPILED], ids=str)
def test_compiled(architecture: Architecture) -> None:
    _check(compiled(architecture))


#: What a call on fake tensors does not show: a scan, and state that is no tensor.
FOLLOWED = {"mamba": "cannot call it", "falcon_mamba": "cannot call it", "recurrent_gemma": "leaves something else"}


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=str)
def test_traced(architecture: Architecture, caplog: pytest.LogCaptureFixture) -> None:
    _check(traced(architecture))
    said = " ".join(r.getMessage() for r in caplog.records if r.name == "qcompile.traced")
    assert FOLLOWED[architecture.name] in said if architecture.name in FOLLOWED else said == ""


#: Full and sliding attention, states of other kinds, experts. What counts in Python is followed by Dynamo.
GENERATING = {
    "llama": False, "gpt2": False, "bloom": False, "falcon": False, "mixtral": False, "deepseek_v3": False, "lfm2": False,
    "mamba2": False, "mistral": True, "gpt_oss": True, "cohere2": True, "bamba": True,
}  # fmt: skip


@pytest.mark.parametrize("architecture", [a for a in ARCHITECTURES if a.name in GENERATING], ids=str)
def test_generating(architecture: Architecture, caplog: pytest.LogCaptureFixture) -> None:
    model, tokens = model_of(architecture).inner, torch.tensor([[7, 44, 3, 60, 21, 5, 9]])
    for p in model.parameters():
        if p.dim() > 1:  # the usual small initialisation makes every answer the same token
            torch.nn.init.normal_(p, std=0.3)
    want = list(Decoder(model, 40).stream(tokens, 24, (4,)))  # beyond the sliding window, which is 16
    with without_inductor():
        decoder = Decoder(model, 40, lambda step: trace(step, weights="qint8", min_elements=10**9))
        for _ in range(2):
            assert torch.equal(torch.cat(list(decoder.stream(tokens, 24, (4,))), 1), torch.cat(want, 1))
    assert len(want) == 24 and ("torch.compile follows" in caplog.text) == GENERATING[architecture.name]


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=str)
def test_eager(architecture: Architecture) -> None:
    _check(eager(architecture))
