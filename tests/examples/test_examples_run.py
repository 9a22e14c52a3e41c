"""The core of each example, with tiny models of random weights and nothing fetched; and what the examples measure with."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import qcompile

Load = Callable[[str], ModuleType]
FOLDER = Path(__file__).resolve().parents[2] / "docs" / "examples"
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "common")


@pytest.mark.parametrize("name", SCRIPTS)
def test_each_script_says_how_it_is_run_and_what_was_seen(name: str) -> None:
    source = (FOLDER / f"{name}.py").read_text("utf-8")
    doc = ast.get_docstring(ast.parse(source)) or ""
    assert f"python docs/examples/{name}.py" in doc
    assert re.search(r"^Seen on ", doc, re.M), "no figures"
    assert len(source.splitlines()) < 200
    assert f"`{name}.py`" in (FOLDER / "README.md").read_text("utf-8")


@pytest.mark.parametrize("name", SCRIPTS)
def test_each_script_describes_itself(name: str, example: Load, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr("sys.argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as left:
        example(name).main()
    assert left.value.code == 0
    assert "--quick" in capsys.readouterr().out


def test_words_and_edits(example: Load) -> None:
    speech = example("speech_recognition")
    assert speech.words(" Log-in: I'm HERE, No. 2 — “now”!") == ["log", "in", "i'm", "here", "no", "2", "now"]
    assert speech.edits([], []) == 0
    assert speech.edits(["a", "b", "c"], ["a", "x", "c", "d"]) == 2
    assert speech.edits(["a", "b", "c"], []) == 3
    assert speech.edits([], ["a", "b"]) == 2
    # Other spellings of one thing, on either side; not of another thing.
    assert speech.edits(["please", "login", "now"], ["please", "log", "in", "now"]) == 0
    assert speech.edits(["the", "black", "list"], ["the", "blacklist"]) == 0
    assert speech.edits(["i'm", "sorry"], ["i", "am", "sorry"]) == 0
    assert speech.edits(["you", "are", "here"], ["you're", "here"]) == 0
    assert speech.edits(["your", "name"], ["you're", "name"]) == 1
    assert speech.edits(["we", "cannot"], ["we", "can", "nut"]) == 2


def test_word_error_rate_is_over_all_words_said(example: Load) -> None:
    rate = example("speech_recognition").word_error_rate
    assert rate(["one two three", "four"], ["one two", "five"]) == 0.5
    assert rate(["Yes."], ["yes"]) == 0


def tiny_whisper() -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.WhisperConfig(
        vocab_size=64, d_model=32, encoder_layers=1, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64, num_mel_bins=8, max_source_positions=16,
        max_target_positions=128, pad_token_id=2, bos_token_id=2, eos_token_id=2, decoder_start_token_id=3,
        suppress_tokens=[], begin_suppress_tokens=[],
    )  # fmt: skip
    return transformers.WhisperForConditionalGeneration(config).eval()


def test_speech_recognition(example: Load) -> None:
    speech, model = example("speech_recognition"), tiny_whisper()
    vocabulary = speech.Vocabulary((3, 4), 2, (5, 6))
    mel = torch.randn(3, 8, 32)
    said = speech.transcribe(model, mel, vocabulary, longest=10)
    assert [len(tokens) for tokens in said] == [10, 10, 10] or all(len(tokens) <= 10 for tokens in said)
    # Greedily, with a cache, is what a whole forward says without one.
    tokens = [3, 4, *said[0]]
    with torch.no_grad():
        logits = model(input_features=mel[:1], decoder_input_ids=torch.tensor([tokens])).logits[0]
    logits[:, [5, 6]] = float("-inf")
    assert logits.argmax(-1)[1 : 1 + len(said[0])].tolist() == said[0]
    samples = speech.heard_samples(model, speech.batches(mel, 2), vocabulary)
    assert len(samples) == 3 and samples[0]["decoder_input_ids"][0, : 2 + len(said[0])].tolist() == tokens
    recipes = speech.recipes(samples)
    assert len(recipes) == 4
    for name, recipe in recipes.items():
        each = recipe(speech.working_copy(model))
        if name == "float32":
            assert speech.transcribe(each, mel, vocabulary, 10) == said
            continue
        linear = [m for m in each.modules() if isinstance(m, nn.Linear)]
        assert linear and all(isinstance(m, qcompile.QModuleMixin) for m in linear)
        qcompile.freeze(each)
        assert len(speech.transcribe(each, mel, vocabulary, 10)) == 3
    assert not any(isinstance(m, qcompile.QModuleMixin) for m in model.modules())


def test_voice_activity(example: Load) -> None:
    voice = example("voice_activity")
    torch.manual_seed(0)
    detector = voice.Detector().eval()
    speech = [torch.randn(512 * 4 + 9) * 0.1, torch.randn(512 * 2) * 0.2]
    heard = voice.listen(detector, speech[0])
    assert heard.shape == (4,) and bool(((heard > 0) & (heard < 1)).all())
    # The state goes on from window to window: alone, the last window is heard otherwise.
    assert not torch.allclose(voice.listen(detector, speech[0][-512 - 9 : -9])[-1], heard[-1], atol=1e-6)
    noise = [voice.as_loud_noise(sound, 0) for sound in speech]
    for a, b in zip(speech, noise, strict=True):  # as long and as loud
        assert a.shape == b.shape and abs(float(a.std() / b.std()) - 1) < 0.1
    models = voice.detectors(detector, noise)
    assert type(models["qint8"].stft) is nn.Conv1d
    assert isinstance(models["qint8"].cell, qcompile.QModuleMixin)
    rows = voice.measure(models, speech, noise)
    assert [row[0] for row in rows] == list(models)
    assert rows[0][3:5] == ["100.00%", "0.000"]
    assert float(rows[1][5]) < float(rows[0][5])


def test_voice_activity_loads_the_packages_names(example: Load, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    voice = example("voice_activity")
    detector = voice.Detector()
    theirs = {"stft": "stft_conv", "cell": "lstm_cell", "last": "final_conv"}
    state = {}
    for name, tensor in detector.state_dict().items():
        module, _, rest = name.partition(".")
        state[f"{theirs.get(module, module)}.{rest}"] = tensor
    save_file(state, tmp_path / "m.safetensors")
    loaded = voice.load(tmp_path / "m.safetensors").state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in detector.state_dict().items())


class Cascade(nn.Module):
    """Two networks with Python between them, as MTCNN: the second sees only where the first was sure."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)

    def forward(self, picture: torch.Tensor) -> Any:
        return self.detect(picture)

    @torch.no_grad()
    def detect(self, picture: Any) -> Any:
        """Boxes [n, 4] and scores [n], or (None, [None])."""
        x = torch.as_tensor(picture).permute(2, 0, 1)[None].float() / 255
        found = self.first(x)[0].flatten(1).T
        found = found[found[:, 0] > 0.2]
        if len(found) == 0:
            return None, [None]
        out = self.second(found)
        return out[:, :4].numpy() * 10, out[:, 4].numpy()


def test_face_detection(example: Load) -> None:
    faces = example("face_detection")
    torch.manual_seed(3)
    picture = np.random.default_rng(0).integers(0, 256, (24, 20, 3), dtype=np.uint8)
    assert faces.scaled(picture, 0.5).shape == (12, 10, 3)
    np.testing.assert_array_equal(faces.scaled(picture, 1.0, mirrored=True), picture[:, ::-1])
    assert faces.beside(picture, faces.scaled(picture, 0.5)).shape == (24, 30, 3)
    calibration, test = faces.pictures(picture, [picture, picture])
    assert len(calibration) == 3 and len(test) == 6
    model = Cascade().eval()
    assert len(faces.find(model, picture)[0]) > 0
    assert (
        faces.find(model, np.zeros((5, 5, 3), np.uint8) if float(model.first.bias[0].detach()) <= 0.2 else picture)[0].ndim
        == 2
    )
    assert "data-dependent" in faces.why_not_exported(model, picture) or faces.why_not_exported(model, picture)
    eight = faces.quantize(model, calibration)
    assert faces.left_in_float(eight) == []
    assert faces.left_in_float(model) == ["first", "second"]
    assert faces.find(eight, picture)[0].shape[1] == 4


def test_boxes_are_compared(example: Load) -> None:
    faces = example("face_detection")
    a = np.array([[0.0, 0, 10, 10], [20, 20, 30, 30]])
    b = np.array([[0.0, 0, 10, 8], [50, 50, 60, 60]])
    np.testing.assert_allclose(faces.overlaps(a, b), [[0.8, 0], [0, 0]])
    none = np.zeros((0, 4))
    assert faces.compare([a, none], [b, none]) == (2, 1, 1, pytest.approx(0.8))
    total, again, others, mean = faces.compare([none], [a])
    assert (total, again, others) == (0, 0, 2) and np.isnan(mean)


def test_image_classification(example: Load) -> None:
    classification = example("image_classification")
    torch.manual_seed(0)
    labels = torch.arange(320) % 10
    images = torch.rand(320, 1, 28, 28) * 0.1
    for i, label in enumerate(labels.tolist()):
        images[i, 0, 2 * label : 2 * label + 4] += 0.8  # a bar whose place is the class
    found = classification.classify((images, labels), (images, labels), epochs=8, extra=1, width=4)
    assert list(found) == ["float32", "W8A8, after training", "W4A8, after training", "W4A8, while training"]
    assert found["float32"] > 0.6
    assert abs(found["W8A8, after training"] - found["float32"]) < 0.1


def test_sentence_embedding(example: Load) -> None:
    transformers = pytest.importorskip("transformers")
    embedding = example("sentence_embedding")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=16,
    )  # fmt: skip
    model = transformers.BertModel(config).eval()

    def batch(seed: int) -> dict[str, torch.Tensor]:
        tokens = torch.randint(0, 50, (2, 12), generator=torch.Generator().manual_seed(seed)).repeat(2, 1)
        return {"input_ids": tokens[[0, 2, 1, 3]], "attention_mask": torch.ones(4, 12, dtype=torch.int64)}

    rows = embedding.measure(model, [batch(0)], [batch(1)])
    assert [row[0] for row in rows] == ["float32", "qint8", "qint8, activations qint8", "qint4, hqq"]
    assert rows[0][1:3] == ["100.0%", "1.0000"]  # each half is the same as its partner
    assert all(float(row[2]) > 0.9 for row in rows)


def test_text_generation(example: Load) -> None:
    transformers = pytest.importorskip("transformers")
    generation = example("text_generation")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=60, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()

    class Tokenizer:
        eos_token_id = 0

        def apply_chat_template(self, chat: Any, **_: Any) -> dict[str, torch.Tensor]:
            return {"input_ids": torch.tensor([[1, 2, 3]])}

        def decode(self, tokens: torch.Tensor, **_: Any) -> str:
            return " ".join(map(str, tokens.tolist()))

    text = torch.randint(1, 60, (1, 20))
    base = generation.answer(model, Tokenizer(), "?", text, 5)
    assert 1 <= len(base.text.split()) <= 5
    assert 10 < base.perplexity < 200
    for wanted in generation.VARIANTS.values():
        if wanted is not None:
            each = qcompile.freeze(qcompile.quantize(generation.working_copy(model), **wanted))
            found = generation.answer(each, Tokenizer(), "?", text, 5)
            assert found.size < 0.5 * base.size
            assert abs(found.perplexity / base.perplexity - 1) < 0.1
