"""Whisper's variables as CTranslate2 names them, as the configuration and the state dict that transformers takes.

CTranslate2 joins the query, key and value projections of self-attention into one, and key and value of cross-attention;
the bias that it gives keys is zero, and the key projections here have none.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["config", "state_dict"]

Variables = dict[str, np.ndarray]
_NORM = {"gamma": "weight", "beta": "bias"}


def config(variables: Variables, settings: dict[str, Any]) -> Any:
    """transformers' ``WhisperConfig`` for the shapes of the variables.

    Args:
        variables: of the ``model.bin``.
        settings: of the ``config.json`` beside it: ``lang_ids``, ``suppress_ids`` and ``suppress_ids_begin``.
    """
    from transformers import WhisperConfig

    start = min(settings["lang_ids"]) - 1  # the vocabulary lists: end of text, start of transcript, the languages

    tokens, width = variables["decoder/embeddings/weight"].shape
    return WhisperConfig(
        vocab_size=tokens,
        d_model=width,
        num_mel_bins=variables["encoder/conv1/weight"].shape[1],
        encoder_layers=_layers(variables, "encoder"),
        decoder_layers=_layers(variables, "decoder"),
        encoder_attention_heads=int(variables["encoder/num_heads"]),
        decoder_attention_heads=int(variables["decoder/num_heads"]),
        encoder_ffn_dim=variables["encoder/layer_0/ffn/linear_0/weight"].shape[0],
        decoder_ffn_dim=variables["decoder/layer_0/ffn/linear_0/weight"].shape[0],
        max_source_positions=variables["encoder/position_encodings/encodings"].shape[0],
        max_target_positions=variables["decoder/position_encodings/encodings"].shape[0],
        pad_token_id=start - 1,
        bos_token_id=start - 1,
        eos_token_id=start - 1,
        decoder_start_token_id=start,
        suppress_tokens=settings.get("suppress_ids"),
        begin_suppress_tokens=settings.get("suppress_ids_begin"),
    )


def state_dict(variables: Variables) -> dict[str, Tensor]:
    """The state dict of ``WhisperForConditionalGeneration``, float32, its tied head included.

    Raises:
        KeyError: a variable is missing.
        ValueError: a joined projection does not divide, keys have a bias, or a variable was left over.
    """
    left = {name: value for name, value in variables.items() if value.ndim and value.dtype.kind == "f"}
    left.pop("decoder/projection/weight", None)
    out: dict[str, Tensor] = {}

    def put(target: str, source: str, names: dict[str, str] | None = None) -> None:
        for theirs, ours in (names or {"weight": "weight", "bias": "bias"}).items():
            out[f"{target}.{ours}"] = _float32(left.pop(f"{source}/{theirs}"))

    def split(target: str, source: str, projections: tuple[str, ...]) -> None:
        for kind in ("weight", "bias"):
            joined = left.pop(f"{source}/{kind}")
            if len(joined) % len(projections):
                raise ValueError(f"{source}/{kind} has {len(joined)} rows, not a multiple of {len(projections)}")
            for name, part in zip(projections, np.split(joined, len(projections)), strict=True):
                if name == "k_proj" and kind == "bias":
                    if part.any():
                        raise ValueError(f"{source}: the bias of the keys is not zero, and there is no place for it")
                    continue
                out[f"{target}.{name}.{kind}"] = _float32(part)

    out["model.decoder.embed_tokens.weight"] = _float32(left.pop("decoder/embeddings/weight"))
    out["proj_out.weight"] = out["model.decoder.embed_tokens.weight"]
    put("model.encoder.conv1", "encoder/conv1")
    put("model.encoder.conv2", "encoder/conv2")
    for side in ("encoder", "decoder"):
        out[f"model.{side}.embed_positions.weight"] = _float32(left.pop(f"{side}/position_encodings/encodings"))
        put(f"model.{side}.layer_norm", f"{side}/layer_norm", _NORM)
        for index in range(_layers(variables, side)):
            theirs, ours = f"{side}/layer_{index}", f"model.{side}.layers.{index}"
            put(f"{ours}.self_attn_layer_norm", f"{theirs}/self_attention/layer_norm", _NORM)
            split(f"{ours}.self_attn", f"{theirs}/self_attention/linear_0", ("q_proj", "k_proj", "v_proj"))
            put(f"{ours}.self_attn.out_proj", f"{theirs}/self_attention/linear_1")
            if side == "decoder":
                put(f"{ours}.encoder_attn_layer_norm", f"{theirs}/attention/layer_norm", _NORM)
                put(f"{ours}.encoder_attn.q_proj", f"{theirs}/attention/linear_0")
                split(f"{ours}.encoder_attn", f"{theirs}/attention/linear_1", ("k_proj", "v_proj"))
                put(f"{ours}.encoder_attn.out_proj", f"{theirs}/attention/linear_2")
            put(f"{ours}.final_layer_norm", f"{theirs}/ffn/layer_norm", _NORM)
            put(f"{ours}.fc1", f"{theirs}/ffn/linear_0")
            put(f"{ours}.fc2", f"{theirs}/ffn/linear_1")
    if left:
        raise ValueError(f"{len(left)} variables have no place in the model, among them {sorted(left)[0]!r}")
    return out


def _layers(variables: Variables, side: str) -> int:
    count = 0
    while f"{side}/layer_{count}/ffn/linear_0/weight" in variables:
        count += 1
    return count


def _float32(value: np.ndarray) -> Tensor:
    return torch.from_numpy(value.astype(np.float32))
