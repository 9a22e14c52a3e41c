"""Tiny models with random weights of many architectures, made from their own configuration classes.

One table of small sizes serves all: a size is set where the architecture's configuration has a field of that name.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

#: Field of a configuration → its size in a tiny model.
SIZES: dict[str, Any] = {
    # width and depth
    "hidden_size": 32, "d_model": 32, "n_embd": 32, "dim": 32, "embed_dim": 32, "emb_dim": 32, "word_embed_proj_dim": 32,
    "embedding_size": 32, "num_hidden_layers": 2, "num_layers": 2, "n_layer": 2, "n_layers": 2, "encoder_layers": 2,
    "decoder_layers": 2, "num_decoder_layers": 2,
    # feed forward
    "intermediate_size": 48, "ffn_dim": 48, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "d_ff": 48, "n_inner": 48,
    "hidden_dim": 48,
    # attention
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "d_kv": 8, "rotary_dim": 4,
    "sliding_window": 16,
    # vocabulary and positions
    "vocab_size": 99, "max_position_embeddings": 64, "n_positions": 64, "n_ctx": 64, "max_seq_len": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "type_vocab_size": 2,
    # experts
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24, "n_shared_experts": 1, "n_group": 1, "topk_group": 1,
    # images
    "image_size": 32, "patch_size": 8, "num_channels": 3,
    # latent attention
    "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8,
    # state spaces
    "state_size": 4, "conv_kernel": 4, "time_step_rank": 4,
}  # fmt: skip


@dataclass(frozen=True)
class Architecture:
    """One architecture.

    Attributes:
        kind: ``decoder``, ``encoder``, ``seq2seq``, ``vision``, ``audio`` or ``features`` (of speech).
        name: of the configuration, as the automatic classes know it.
        sizes: fields besides, or other than, :data:`SIZES`.
    """

    kind: str
    name: str
    sizes: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name


def _all(kind: str, names: str) -> list[Architecture]:
    return [Architecture(kind, name) for name in names.split()]


def _takes(config: Any, name: str, size: Any) -> bool:
    """Whether a configuration has a field of that name that holds a number."""
    held = getattr(config, name, None)
    return name in type(config).__dataclass_fields__ and isinstance(held, int) and not isinstance(held, bool)


def model_of(architecture: Architecture) -> nn.Module:
    """The model, with random weights, in evaluation mode, wrapped so that it returns one tensor."""
    import transformers
    from transformers import CONFIG_MAPPING

    config_class = CONFIG_MAPPING[architecture.name]
    config = config_class()
    sizes = {k: v for k, v in SIZES.items() if _takes(config, k, v)}
    config = config_class(**{**sizes, **architecture.sizes})
    config.use_cache = False
    auto = {
        "decoder": transformers.AutoModelForCausalLM,
        "encoder": transformers.AutoModel,
        "seq2seq": transformers.AutoModelForSeq2SeqLM,
        "vision": transformers.AutoModel,
        "audio": transformers.AutoModel,
        "features": transformers.AutoModel,
    }[architecture.kind]
    torch.manual_seed(0)
    model = auto.from_config(config).eval().requires_grad_(False)
    whole = OneResult(model, architecture.kind)
    _settle(whole, architecture.kind)
    return whole


def _settle(model: nn.Module, kind: str) -> None:
    """Let batch norms see data, without which what a deep stack of random weights computes fades to nothing."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if norms:
        for module in model.modules():
            if isinstance(module, nn.modules.conv._ConvNd):
                nn.init.kaiming_normal_(module.weight)
        for norm in norms:
            norm.momentum = 1.0
            norm.train()
        with torch.no_grad():
            (x,) = inputs_of(model, kind)
            model(torch.randn(8, *x.shape[1:], generator=torch.Generator().manual_seed(2)))
        model.eval()


def inputs_of(model: nn.Module, kind: str) -> tuple[Tensor, ...]:
    """Random inputs."""
    generator = torch.Generator().manual_seed(1)
    config = model.inner.config
    if kind == "vision":
        size = getattr(config, "image_size", 32)
        size = size if isinstance(size, (list, tuple)) else (size, size)
        return (torch.randn(1, getattr(config, "num_channels", 3), *size, generator=generator),)
    if kind == "features":
        return (torch.randn(1, config.num_mel_bins, 2 * config.max_source_positions, generator=generator),)
    if kind == "audio":
        return (torch.randn(1, 1000, generator=generator),)
    return (torch.randint(3, min(99, config.vocab_size), (1, 8), generator=generator),)


class OneResult(nn.Module):
    """A model that takes one tensor and gives one."""

    def __init__(self, inner: nn.Module, kind: str) -> None:
        super().__init__()
        self.inner = inner
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "vision":
            out = self.inner(pixel_values=x)
        elif self.kind == "features":
            out = self.inner(x, decoder_input_ids=torch.ones(1, 4, dtype=torch.int64), use_cache=False)
        elif self.kind == "audio":
            out = self.inner(x)
        elif self.kind == "seq2seq":
            out = self.inner(input_ids=x, decoder_input_ids=x, use_cache=False)
        elif self.kind == "decoder":
            out = self.inner(input_ids=x, use_cache=False)
        else:
            out = self.inner(input_ids=x)
        logits = getattr(out, "logits", None)
        return logits if logits is not None else out.last_hidden_state


_STAGES = {"hidden_sizes": [16, 24], "depths": [1, 1]}
_MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8}
_LATENT = {"num_key_value_heads": 4, "head_dim": 4, "first_k_dense_replace": 1}
_SPEECH = {
    "conv_dim": [16, 16], "conv_kernel": [10, 3], "conv_stride": [5, 2], "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2,
}  # fmt: skip

ARCHITECTURES = [
    *_all("decoder", """llama mistral qwen2 qwen3 gemma gemma2 gemma3_text phi phi3 gpt2 gpt_neox gptj gpt_bigcode bloom
        falcon mpt opt stablelm starcoder2 olmo olmo2 olmo3 cohere cohere2 granite glm glm4 persimmon codegen smollm3 helium
        exaone4 biogpt xglm ctrl bitnet apertus ernie4_5 seed_oss nanochat arcee
        jetmoe mamba falcon_mamba recurrent_gemma rwkv lfm2"""),
    Architecture("decoder", "gpt_neo", {"attention_types": [[["global", "local"], 1]]}),
    *_all("decoder", "mixtral qwen2_moe qwen3_moe olmoe granitemoe gpt_oss phimoe glm4_moe minimax qwen3_next"),
    Architecture("decoder", "deepseek_v2", {**_LATENT, "num_experts_per_tok": 2}),
    Architecture("decoder", "deepseek_v3", _LATENT),
    Architecture("decoder", "mamba2", {"num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8}),
    Architecture("decoder", "bamba", {**_MAMBA2, "attn_layer_indices": [1]}),
    *_all("encoder", """bert roberta albert distilbert electra mpnet deberta-v2 modernbert roformer camembert xlm-roberta
        ernie nystromformer squeezebert mobilebert convbert fnet nomic_bert eurobert"""),
    Architecture("encoder", "esm", {"vocab_size": 99, "pad_token_id": 0, "mask_token_id": 3}),
    *_all("seq2seq", "t5 mt5 umt5 bart mbart pegasus marian blenderbot m2m_100"),
    *_all("vision", """vit deit beit dinov2 dinov3_vit mobilenet_v1 mobilenet_v2 poolformer siglip_vision_model
        clip_vision_model ijepa data2vec-vision"""),
    *(Architecture("vision", name, {"depths": [1, 1], "num_heads": [2, 4], "window_size": 4, "patch_size": 4})
        for name in ("swin", "swinv2")),
    *(Architecture("vision", name, {"hidden_sizes": [16, 24], "depths": [1, 1], "num_stages": 2, "patch_size": 4})
        for name in ("convnext", "convnextv2")),
    Architecture("vision", "resnet", {**_STAGES, "embedding_size": 8}),
    Architecture("vision", "regnet", {**_STAGES, "embedding_size": 8, "groups_width": 8}),
    Architecture("vision", "focalnet", {
        "depths": [1, 1], "focal_levels": [2, 2], "focal_windows": [3, 3], "embed_dim": 16, "hidden_sizes": [16, 32],
        "patch_size": 4,
    }),
    Architecture("vision", "efficientnet", {
        "in_channels": [32, 16], "out_channels": [16, 32], "kernel_sizes": [3, 5], "strides": [1, 2],
        "expand_ratios": [1, 4], "num_block_repeats": [1, 1], "hidden_dim": 1280, "width_coefficient": 1.0,
        "depth_coefficient": 1.0,
    }),
    Architecture("vision", "mobilevit", {
        "hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 16, 16, 24, 24, 32], "patch_size": 2, "image_size": 64,
    }),
    Architecture("vision", "segformer", {
        "num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [4, 1], "hidden_sizes": [16, 32], "patch_sizes": [7, 3],
        "strides": [4, 2], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2],
    }),
    Architecture("vision", "pvt", {
        "image_size": 32, "num_encoder_blocks": 2, "depths": [1, 1], "sequence_reduction_ratios": [4, 1],
        "hidden_sizes": [16, 32], "patch_sizes": [4, 2], "strides": [4, 2], "num_attention_heads": [1, 2],
        "mlp_ratios": [2, 2],
    }),
    Architecture("vision", "hiera", {
        "image_size": [32, 32], "patch_size": [7, 7], "embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2],
        "query_stride": [2, 2], "num_query_pool": 1, "masked_unit_size": [4, 4], "masked_unit_attention": [True, False],
    }),
    Architecture("vision", "levit", {
        "image_size": 64, "hidden_sizes": [16, 32, 48], "num_attention_heads": [2, 2, 2], "depths": [1, 1, 1],
        "key_dim": [8, 8, 8], "patch_size": 16,
    }),
    *(Architecture("audio", name, _SPEECH) for name in ("wav2vec2", "hubert", "wavlm")),
    Architecture("features", "whisper", {"num_mel_bins": 8, "max_source_positions": 32, "max_target_positions": 16}),
]  # fmt: skip
