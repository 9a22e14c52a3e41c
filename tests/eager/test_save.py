"""``qcompile.save`` and ``load`` of modules: one folder, the same bits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import qcompile


class Tagger(nn.Module):
    """A table that is also the head, and a layer between."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(97, 64)
        self.middle = nn.Linear(64, 64)
        self.head = nn.Linear(64, 97, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.relu(self.middle(self.table(tokens))))


TOKENS = torch.arange(12).view(3, 4)


def made(frozen: bool = True) -> Tagger:
    torch.manual_seed(0)
    model = qcompile.quantize(Tagger(), weights="qint4", activations="qint8")
    with torch.no_grad():
        qcompile.calibrate(model, [TOKENS, TOKENS + 7])
    return qcompile.freeze(model) if frozen else model


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("on_meta", [True, False])
def test_the_same_bits_come_back(tmp_path: Path, frozen: bool, on_meta: bool) -> None:
    model = made(frozen)
    qcompile.save(model, tmp_path / "model")
    with torch.device("meta" if on_meta else "cpu"):
        new = Tagger()
    new = qcompile.load(tmp_path / "model", new)
    assert isinstance(new.middle, qcompile.QLinear)
    assert new.middle.frozen is frozen
    assert torch.equal(new(TOKENS), model(TOKENS))
    assert qcompile.quantization_map(new) == qcompile.quantization_map(model)


def test_a_shared_weight_is_stored_and_held_once(tmp_path: Path) -> None:
    model = made()
    qcompile.save(model, tmp_path / "model")
    names = set(load_file(tmp_path / "model" / "tensors.safetensors"))
    assert sum(n.endswith("_data") for n in names) == 2
    new = qcompile.load(tmp_path / "model", Tagger())
    assert new.head.q_weight is new.table.q_weight


def test_a_module_needs_a_model_and_a_program_none(tmp_path: Path) -> None:
    qcompile.save(made(), tmp_path / "model")
    with pytest.raises(ValueError, match="load\\(folder, model\\)"):
        qcompile.load(tmp_path / "model")
    program = torch.export.export(nn.Linear(64, 64), (torch.randn(2, 64),))
    qcompile.save(qcompile.quantize(program), tmp_path / "program")
    with pytest.raises(ValueError, match="holds a program"):
        qcompile.load(tmp_path / "program", Tagger())


def test_a_changed_map_is_refused(tmp_path: Path) -> None:
    qcompile.save(made(), tmp_path / "model")
    path = tmp_path / "model" / "qcompile.json"
    document = json.loads(path.read_text())
    document["map"]["modules"]["middle"]["weights"]["weight"]["scheme"] = "qint4/group=64/affine/float16"
    path.write_text(json.dumps(document))
    with pytest.raises(ValueError, match="checksum"):
        qcompile.load(tmp_path / "model", Tagger())


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    qcompile.save(made(), tmp_path / "model")
    with pytest.raises(ValueError, match="no modules"):
        qcompile.load(tmp_path / "model", nn.Sequential(nn.Linear(64, 64)))


def test_the_files_of_the_quanto_workflow(tmp_path: Path) -> None:
    model = made()
    # safetensors refuses tensors that share memory, and a state dict of ours has none
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "map.json").write_text(json.dumps(qcompile.quantization_map(model)))
    with torch.device("meta"):
        new = Tagger()
    new = qcompile.requantize(
        new, load_file(tmp_path / "model.safetensors"), json.loads((tmp_path / "map.json").read_text()), device="cpu"
    )
    assert torch.equal(new(TOKENS), model(TOKENS))
