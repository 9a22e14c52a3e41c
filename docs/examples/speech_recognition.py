"""Speech recognition with Whisper-base: the word error rate of the float model, in 8 bits and in 4.

    python docs/examples/speech_recognition.py [--quick]

Thirty recordings with known words are transcribed, greedily, by

- the float model;
- weights in qint8;
- weights in qint8 and activations in qint8, whose fixed scales come from twelve other recordings (``calibrate``), all but
  the input of the head;
- weights in qint4, groups of 64, ranges found by half-quadratic optimization (``optimizer="hqq"``).

The model is a module of transformers and stays one: its own ``forward`` with its cache runs, on quantized layers.

Seen on an AMD EPYC (Zen 5, AVX-512 and VNNI; one thread of two busy cores): 30 recordings, 545 words; word error rate
1.47 % float (8 words wrong), 1.65 % qint8 (9), 2.02 % with activations in qint8 (11; 17 with the head's input in qint8, too,
and 15 with ``percentile=99.999`` instead of ``minmax``, chosen on the same 30), 1.83 % qint4 (10).
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from common import need, stage, working_copy
from torch import Tensor, nn

import qcompile
from qcompile.demo.table import table

START = ("<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|notimestamps|>")
END = "<|endoftext|>"
SHORT = {"'m": " am", "'re": " are", "'ve": " have", "'ll": " will", "'d": " would", "n't": " not", "'s": " is"}


def words(text: str) -> list[str]:
    """The words of a text, as is usual for word error rates: lower case, punctuation off but in contractions."""
    return re.sub(r"[^a-z0-9' ]", " ", text.lower().replace("’", "'")).split()


def same(one: str, two: Sequence[str]) -> bool:
    """Whether a word is only another spelling of two: ``login`` of ``log in``, ``I'm`` of ``I am``."""
    written_out = next((one.removesuffix(s) + long for s, long in SHORT.items() if one.endswith(s)), one)
    return one == "".join(two) or written_out == " ".join(two)


def edits(said: Sequence[str], heard: Sequence[str]) -> int:
    """The fewest insertions, deletions and substitutions of words (Levenshtein); spellings of one thing are the same."""
    best = [[i + j for j in range(len(heard) + 1)] for i in range(len(said) + 1)]
    for i in range(1, len(said) + 1):
        for j in range(1, len(heard) + 1):
            changed = best[i - 1][j - 1] + (said[i - 1] != heard[j - 1])
            best[i][j] = min(changed, best[i - 1][j] + 1, best[i][j - 1] + 1)
            if j > 1 and same(said[i - 1], heard[j - 2 : j]):
                best[i][j] = min(best[i][j], best[i - 1][j - 2])
            if i > 1 and same(heard[j - 1], said[i - 2 : i]):
                best[i][j] = min(best[i][j], best[i - 2][j - 1])
    return best[-1][-1]


def word_error_rate(said: Sequence[str], heard: Sequence[str]) -> float:
    """The edits of all texts over the words that were said."""
    pairs = [(words(a), words(b)) for a, b in zip(said, heard, strict=True)]
    return sum(edits(a, b) for a, b in pairs) / sum(len(a) for a, _ in pairs)


@dataclass(frozen=True)
class Vocabulary:
    """The tokens that decoding starts with, the one that ends it, and those that are never said."""

    start: tuple[int, ...]
    end: int
    suppressed: tuple[int, ...]


def vocabulary_of(model: Any, tokenizer: Any) -> Vocabulary:
    """Whisper's, for English without time stamps."""
    start, (end,) = tokenizer.convert_tokens_to_ids(list(START)), tokenizer.convert_tokens_to_ids([END])
    return Vocabulary(tuple(start), end, tuple(token for token in model.config.suppress_tokens if token != end))


@torch.no_grad()
def transcribe(model: nn.Module, mel: Tensor, vocabulary: Vocabulary, longest: int = 120) -> list[list[int]]:
    """Greedy decoding of log-mel spectrograms, float ``[n, bands, frames]``, all at once: the tokens of each."""
    encoded = model.get_encoder()(mel)
    tokens = torch.tensor([vocabulary.start] * len(mel))
    said: list[list[int]] = [[] for _ in range(len(mel))]
    done = torch.zeros(len(mel), dtype=torch.bool)
    cache: Any = None
    for _ in range(longest):
        out = model(encoder_outputs=encoded, decoder_input_ids=tokens, past_key_values=cache, use_cache=True)
        cache, logits = out.past_key_values, out.logits[:, -1]
        logits[:, list(vocabulary.suppressed)] = float("-inf")
        best = logits.argmax(-1)
        done |= best == vocabulary.end
        if done.all():
            break
        for row, token in enumerate(best.tolist()):
            if not done[row]:
                said[row].append(token)
        tokens = best[:, None]
    return said


def batches(mel: Tensor, size: int = 6) -> list[Tensor]:
    """The spectrograms in parts of ``size``."""
    return list(mel.split(size))


def heard_samples(model: nn.Module, mel: Sequence[Tensor], vocabulary: Vocabulary) -> list[dict[str, Tensor]]:
    """For calibration: each recording with what the model hears in it, as the arguments of one forward."""
    samples = []
    for part in mel:
        for one, tokens in zip(part, transcribe(model, part, vocabulary), strict=True):
            said = torch.tensor([[*vocabulary.start, *tokens]])
            samples.append({"input_features": one[None], "decoder_input_ids": said})
    return samples


def recipes(samples: Sequence[dict[str, Tensor]]) -> dict[str, Callable[[nn.Module], nn.Module]]:
    """By name, what makes a quantized model of a copy of the float one."""

    def both(model: nn.Module) -> nn.Module:
        # The head reads the largest activations of all, and what is lost there is lost in the words: its input stays float.
        model = qcompile.quantize(model, weights=qcompile.qint8, activations=qcompile.qint8, exclude="proj_out")
        model = qcompile.quantize(model, weights=qcompile.qint8, include="proj_out")
        return qcompile.calibrate(model, samples, method="minmax")

    return {
        "float32": lambda model: model,
        "qint8": lambda model: qcompile.quantize(model, weights=qcompile.qint8),
        "qint8, activations qint8": both,
        "qint4, groups of 64, hqq": lambda model: qcompile.quantize(
            model, weights=qcompile.qint4, group_size=64, optimizer="hqq"
        ),
    }


def main() -> None:
    """Transcribe with each model and print the table."""
    parser = argparse.ArgumentParser(description="Whisper-base: word error rates, float and quantized")
    parser.add_argument("--quick", action="store_true", help="10 recordings instead of 30")
    parser.add_argument("--show", action="store_true", help="print what was heard wrongly")
    options = parser.parse_args()
    need("transformers")
    from transformers import PreTrainedTokenizerFast, WhisperFeatureExtractor, WhisperForConditionalGeneration

    from qcompile.demo.loading import quiet_transformers
    from qcompile.demo.speech import RATE, prompts, whisper_folder

    tested = prompts(10 if options.quick else 30)
    others = prompts(12, least_words=6, without={prompt.name for prompt in tested})
    folder = whisper_folder()
    with quiet_transformers():
        model = WhisperForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    vocabulary = vocabulary_of(model, tokenizer)
    listen = WhisperFeatureExtractor(feature_size=model.config.num_mel_bins)

    def spectrograms(sounds: list[Any]) -> list[Tensor]:
        return batches(listen(sounds, sampling_rate=RATE, return_tensors="pt").input_features)

    mel, said, rows, rates = spectrograms([p.samples for p in tested]), [p.text for p in tested], [], []
    with stage("samples for calibration"):
        samples = heard_samples(model, spectrograms([p.samples for p in others]), vocabulary)
    for name, recipe in recipes(samples).items():
        with stage(f"{name}: quantize"):
            each = recipe(working_copy(model))
            if name != "float32":
                qcompile.freeze(each)
        with stage(f"{name}: transcribe"):
            heard = [tokenizer.decode(tokens) for part in mel for tokens in transcribe(each, part, vocabulary)]
        rates.append(100 * word_error_rate(said, heard))
        wrong = sum(edits(words(a), words(b)) for a, b in zip(said, heard, strict=True))
        rows.append([name, f"{rates[-1]:.2f} %", f"{rates[-1] - rates[0]:+.2f}", str(wrong)])
        if options.show:
            for a, b in zip(said, heard, strict=True):
                if words(a) != words(b):
                    print(f"    said  {a}\n    heard {b.strip()}")
    print(f"{len(said)} recordings, {sum(len(words(text)) for text in said)} words")
    print(table(["Whisper-base", "word error rate", "to float, points", "wrong words"], rows))


if __name__ == "__main__":
    main()
