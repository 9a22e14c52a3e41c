"""Architectures that people use are quantized with no code for any of them."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")

from architectures import ARCHITECTURES, Architecture
from specimen import Specimen, compiled, eager, exported, traced


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


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=str)
def test_eager(architecture: Architecture) -> None:
    _check(eager(architecture))
