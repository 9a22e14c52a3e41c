"""Loading a transformers model from a local folder, with nothing printed and no hub asked."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["load", "missing", "own_memory", "quiet_transformers"]


def missing() -> str | None:
    """Why the language model and the encoder cannot run here: the packages that are not installed, or None."""
    import importlib.util

    names = ("transformers", "gguf", "accelerate")
    absent = [name for name in names if importlib.util.find_spec(name) is None]
    return f"needs {', '.join(absent)}: pip install 'qcompile[demo]'" if absent else None


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """transformers without progress bars, advice and look-ups at the hub, inside the block."""
    before = os.environ.get("HF_HUB_OFFLINE")
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported, hence before transformers
    from transformers.utils import logging

    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
        if before is None:
            del os.environ["HF_HUB_OFFLINE"]
        else:
            os.environ["HF_HUB_OFFLINE"] = before


def load(folder: Path, auto_class: str = "AutoModelForCausalLM") -> tuple[Any, Any]:
    """The float32 model, in eval mode, and the tokenizer of a folder. ``auto_class`` names transformers' loader."""
    with quiet_transformers():
        import torch
        import transformers

        model = getattr(transformers, auto_class).from_pretrained(folder, dtype=torch.float32, local_files_only=True)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    own_memory(model)
    return model.eval(), tokenizer


def own_memory(model: Any) -> None:
    """Move the parameters out of the file that they are mapped from, so that each one's memory can be given back.

    Left as they come, all of them lie in one mapping, which counts as resident for as long as any of them is left.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
