"""Prompts and their words, WAV files, and Whisper's way from CTranslate2's file to transformers' model."""

from __future__ import annotations

import gzip
import struct
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qcompile.demo import ctranslate2, speech, whisper


def text(value: str) -> bytes:
    return struct.pack("<H", len(value.encode()) + 1) + value.encode() + b"\0"


def model_bin(
    path: Path, variables: dict[str, np.ndarray], aliases: dict[str, str] | None = None, version: int = 6, extra: bytes = b""
) -> Path:
    """A file in CTranslate2's layout."""
    kinds = {"float32": 0, "int8": 1, "int16": 2, "int32": 3, "float16": 4}
    content = struct.pack("<I", version) + text("WhisperSpec") + struct.pack("<II", 3, len(variables))
    for name, value in variables.items():
        content += text(name) + struct.pack(f"<B{value.ndim}I", value.ndim, *value.shape)
        content += struct.pack("<BI", kinds[str(value.dtype)], value.nbytes) + value.tobytes()
    content += struct.pack("<I", len(aliases or {}))
    for alias, name in (aliases or {}).items():
        content += text(alias) + text(name)
    path.write_bytes(content + extra)
    return path


def tiny_whisper() -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.WhisperConfig(
        vocab_size=50, d_model=16, encoder_layers=2, decoder_layers=3, encoder_attention_heads=2, decoder_attention_heads=4,
        encoder_ffn_dim=24, decoder_ffn_dim=40, num_mel_bins=8, max_source_positions=12, max_target_positions=10,
        suppress_tokens=[3], begin_suppress_tokens=[4], pad_token_id=2, bos_token_id=2, eos_token_id=2,
        decoder_start_token_id=3,
    )  # fmt: skip
    return transformers.WhisperForConditionalGeneration(config).eval()


def variables_of(model: Any) -> dict[str, np.ndarray]:
    """The inverse of what is tested: a model's weights under CTranslate2's names, as it joins them."""
    state = {name: value.half().numpy() for name, value in model.state_dict().items()}
    out = {
        "decoder/embeddings/weight": state["model.decoder.embed_tokens.weight"],
        "encoder/conv1/weight": state["model.encoder.conv1.weight"],
        "encoder/conv1/bias": state["model.encoder.conv1.bias"],
        "encoder/conv2/weight": state["model.encoder.conv2.weight"],
        "encoder/conv2/bias": state["model.encoder.conv2.bias"],
        "encoder/num_heads": np.int16(model.config.encoder_attention_heads)[()] * np.ones((), np.int16),
        "decoder/num_heads": np.int16(model.config.decoder_attention_heads)[()] * np.ones((), np.int16),
        "decoder/pre_norm": np.ones((), np.int8),
    }

    def norm(target: str, source: str) -> None:
        out[f"{target}/gamma"], out[f"{target}/beta"] = state[f"{source}.weight"], state[f"{source}.bias"]

    def linear(target: str, *sources: str) -> None:
        out[f"{target}/weight"] = np.concatenate([state[f"{s}.weight"] for s in sources])
        biases = [state.get(f"{s}.bias", np.zeros(16, np.float16)) for s in sources]  # keys have none
        out[f"{target}/bias"] = np.concatenate(biases)

    for side, count in (("encoder", 2), ("decoder", 3)):
        out[f"{side}/position_encodings/encodings"] = state[f"model.{side}.embed_positions.weight"]
        norm(f"{side}/layer_norm", f"model.{side}.layer_norm")
        for i in range(count):
            theirs, ours = f"{side}/layer_{i}", f"model.{side}.layers.{i}"
            norm(f"{theirs}/self_attention/layer_norm", f"{ours}.self_attn_layer_norm")
            linear(f"{theirs}/self_attention/linear_0", *(f"{ours}.self_attn.{p}_proj" for p in "qkv"))
            linear(f"{theirs}/self_attention/linear_1", f"{ours}.self_attn.out_proj")
            if side == "decoder":
                norm(f"{theirs}/attention/layer_norm", f"{ours}.encoder_attn_layer_norm")
                linear(f"{theirs}/attention/linear_0", f"{ours}.encoder_attn.q_proj")
                linear(f"{theirs}/attention/linear_1", *(f"{ours}.encoder_attn.{p}_proj" for p in "kv"))
                linear(f"{theirs}/attention/linear_2", f"{ours}.encoder_attn.out_proj")
            norm(f"{theirs}/ffn/layer_norm", f"{ours}.final_layer_norm")
            linear(f"{theirs}/ffn/linear_0", f"{ours}.fc1")
            linear(f"{theirs}/ffn/linear_1", f"{ours}.fc2")
    return out


def test_whisper_comes_back_from_ctranslate2s_file(tmp_path: Path) -> None:
    model = tiny_whisper()
    path = model_bin(tmp_path / "model.bin", variables_of(model), {"decoder/projection/weight": "decoder/embeddings/weight"})
    variables = ctranslate2.read(path, "WhisperSpec")
    config = whisper.config(variables, {"lang_ids": [5, 4], "suppress_ids": [3], "suppress_ids_begin": [4]})
    for name in ("vocab_size", "d_model", "encoder_layers", "decoder_layers", "encoder_attention_heads", "num_mel_bins",
                 "decoder_attention_heads", "encoder_ffn_dim", "decoder_ffn_dim", "max_source_positions",
                 "max_target_positions", "eos_token_id", "decoder_start_token_id",
                 "suppress_tokens", "begin_suppress_tokens"):  # fmt: skip
        assert getattr(config, name) == getattr(model.config, name), name
    loaded = type(model)(config).eval()
    loaded.load_state_dict(whisper.state_dict(variables))
    inputs = {"input_features": torch.randn(2, 8, 24), "decoder_input_ids": torch.tensor([[1, 5], [7, 9]])}
    with torch.no_grad():
        expected, got = model(**inputs).logits, loaded(**inputs).logits
    torch.testing.assert_close(got, expected, rtol=2e-2, atol=5e-4)  # the file holds float16
    assert loaded.proj_out.weight is loaded.model.decoder.embed_tokens.weight


def test_whisper_refuses_what_it_has_no_place_for() -> None:
    variables = variables_of(tiny_whisper())
    with pytest.raises(ValueError, match="no place in the model, among them 'encoder/other'"):
        whisper.state_dict({**variables, "encoder/other": np.ones(3, np.float16)})
    biased = variables["encoder/layer_0/self_attention/linear_0/bias"].copy()
    biased[16] = 1
    with pytest.raises(ValueError, match="bias of the keys"):
        whisper.state_dict({**variables, "encoder/layer_0/self_attention/linear_0/bias": biased})
    with pytest.raises(KeyError, match="decoder/layer_norm/beta"):
        whisper.state_dict({name: value for name, value in variables.items() if name != "decoder/layer_norm/beta"})


def test_ctranslate2_reads_each_type_and_alias(tmp_path: Path) -> None:
    held = {t: np.arange(6).reshape(2, 3).astype(t) for t in ("float32", "int8", "int16", "int32", "float16")}
    read = ctranslate2.read(model_bin(tmp_path / "m", held, {"other": "int8"}), "WhisperSpec")
    assert read["other"] is read["int8"]
    for name, value in held.items():
        assert read[name].dtype == value.dtype
        np.testing.assert_array_equal(read[name], value)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda b: b[:-6], "cut short"),
        (lambda b: b + b"x", "goes on for 1 bytes"),
        (lambda b: b"\x05" + b[1:], "version 5"),
        (lambda b: b.replace(b"WhisperSpec", b"WhisperSpex"), "holds a 'WhisperSpex'"),
        (lambda b: b.replace(b"WhisperSpec\0", b"WhisperSpec!"), "without its closing zero"),
        (lambda b: b.replace(struct.pack("<BIIBI", 2, 2, 3, 0, 24), struct.pack("<BIIBI", 2, 2, 3, 9, 24)), "dtype 9"),
        (
            lambda b: b.replace(struct.pack("<BIIBI", 2, 2, 3, 0, 24), struct.pack("<BIIBI", 2, 2**31, 2**31, 0, 24)),
            "has 24 bytes, shape",
        ),
        (lambda b: b.replace(b"bb\0", b"aa\0"), "'aa' twice"),
        (lambda b: b.replace(b"alias\0\x03\0bb\0", b"alias\0\x03\0cc\0"), "alias 'alias' of 'cc'"),
    ],
)
def test_ctranslate2_refuses_damaged_files(tmp_path: Path, damage: Callable[[bytes], bytes], message: str) -> None:
    whole = {"aa": np.ones((2, 3), np.float32), "bb": np.ones(1, np.float32)}
    content = model_bin(tmp_path / "whole", whole, {"alias": "bb"}).read_bytes()
    (tmp_path / "damaged").write_bytes(damage(content))
    with pytest.raises(ValueError, match=message):
        ctranslate2.read(tmp_path / "damaged", "WhisperSpec")


def sound(path: Path, samples: np.ndarray, rate: int = 8_000, channels: int = 1) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setparams((channels, 2, rate, 0, "NONE", ""))
        file.writeframes((samples * 32767).astype("<i2").tobytes())
    return path


def test_read_wave_doubles_8_khz_and_keeps_16(tmp_path: Path) -> None:
    fast = np.sin(2 * np.pi * 440 * np.arange(1600) / 16_000).astype(np.float32) * 0.5
    np.testing.assert_allclose(speech.read_wave(sound(tmp_path / "a.wav", fast, 16_000)), fast, atol=1e-4)
    doubled = speech.read_wave(sound(tmp_path / "b.wav", fast[::2]))
    assert doubled.dtype == np.float32
    np.testing.assert_allclose(doubled, fast, atol=2e-4)  # 440 Hz is a whole number of periods: no edges
    assert len(speech.read_wave(sound(tmp_path / "c.wav", np.zeros(0)))) == 0
    with pytest.raises(ValueError, match=r"\(2, 2, 8000\)"):
        speech.read_wave(sound(tmp_path / "d.wav", fast, channels=2))


def test_prompts_are_whole_sentences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = {
        "short": "Too short.",
        "one": "This is one of the prompts.",
        "digits": "Please press 1 for more of it.",
        "part": "... and this is only a part.",
        "remark": "A tone follows after this. (tone)",
        "absent": "There is no sound of this text.",
        "long": "This one is too long by far.",
        "sub/two": "So this is two, isn't it?",
    }
    lines = "; a comment: of it\n\n" + "".join(f"{name}: {words}\n" for name, words in listed.items())
    texts = tmp_path / speech._TEXTS
    texts.parent.mkdir(parents=True)
    texts.write_bytes(gzip.compress(lines.encode()))
    for name in listed:
        if name != "absent":
            sound(tmp_path / speech._SOUNDS / f"{name}.wav", np.zeros(8_000 * (31 if name == "long" else 1)))
    monkeypatch.setattr(speech, "unpacked", lambda *_: tmp_path)
    found = speech.prompts(2, least_words=5)
    assert [(p.name, p.text, len(p.samples)) for p in found] == [
        ("one", listed["one"], 16_000), ("sub/two", listed["sub/two"], 16_000),
    ]  # fmt: skip
    assert [p.name for p in speech.prompts(1, 5, without={"one"})] == ["sub/two"]
    with pytest.raises(ValueError, match="count is 3, and there are 2 prompts"):
        speech.prompts(3, 5)
