"""The examples with real weights, a little of each; skipped where those were not fetched before. Nothing is downloaded."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from qcompile.demo.folders import whole

Load = Callable[[str], ModuleType]
pytestmark = pytest.mark.slow


def fetched(*names: str) -> None:
    """Skip unless these folders of the cache are there and whole."""
    root = os.environ.get("QCOMPILE_CACHE_DIR")
    cache = (Path(root) if root else Path.home() / ".cache" / "qcompile") / "demo"
    absent = [name for name in names if not whole(cache / name)]
    if absent:
        pytest.skip(f"not in {cache}: {', '.join(absent)}; run the example once, which fetches them")


def test_whisper_hears_what_is_said(example: Load) -> None:
    fetched("whisper-base-float32", "asterisk-sounds-en", "asterisk-texts-en")
    transformers = pytest.importorskip("transformers")
    import qcompile
    from qcompile.demo.speech import RATE, prompts, whisper_folder

    speech = example("speech_recognition")
    model = transformers.WhisperForConditionalGeneration.from_pretrained(whisper_folder(), dtype=torch.float32).eval()
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(whisper_folder())
    vocabulary = speech.vocabulary_of(model, tokenizer)
    found = prompts(2)
    mel = transformers.WhisperFeatureExtractor()([p.samples for p in found], sampling_rate=RATE, return_tensors="pt")
    for each in (model, qcompile.freeze(qcompile.quantize(speech.working_copy(model), weights="qint8"))):
        heard = [tokenizer.decode(t) for t in speech.transcribe(each, mel.input_features, vocabulary)]
        assert speech.word_error_rate([p.text for p in found], heard) <= 0.1


def test_silero_tells_speech_from_noise(example: Load) -> None:
    fetched("silero-vad", "asterisk-sounds-en", "asterisk-texts-en")
    from qcompile.demo.speech import prompts, silero_weights

    voice = example("voice_activity")
    (sound,) = (torch.from_numpy(p.samples.copy()) for p in prompts(1))
    noise = voice.as_loud_noise(sound, 0)
    models = voice.detectors(voice.load(silero_weights()), [sound, noise])
    for name, model in models.items():
        assert float((voice.listen(model, sound) > 0.5).float().mean()) > 0.75, name
        assert float((voice.listen(model, noise) > 0.5).float().mean()) < 0.05, name


def test_mtcnn_finds_the_astronaut(example: Load) -> None:
    fetched("facenet-pytorch", "photos")
    pytest.importorskip("PIL")
    from qcompile.demo.faces import load_mtcnn, photo

    faces = example("face_detection")
    portrait = photo("astronaut")
    detector = load_mtcnn(keep_all=True)
    assert faces.why_not_exported(detector, portrait) != ""
    eight = faces.quantize(detector, [faces.scaled(portrait, 0.8)])
    assert faces.left_in_float(eight) == []
    (before, _), (after, sure) = faces.find(detector, portrait), faces.find(eight, portrait)
    assert faces.compare([before], [after])[:3] == (1, 1, 0)
    assert sure[0] > 0.95
