"""Tiny mixtures of experts, their routers far from uniform."""

from pathlib import Path
from typing import Any

import torch
from cases import V
from tiny import tiny_tokenizer
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    MiniMaxM2Config,
    MiniMaxM2ForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from samestep.kernels import packed_attention

FAMILIES = ["mixtral", "qwen3_moe", "deepseek_v3", "minimax_m2"]

SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 256,
}


def config_of(family: str, vocabulary: int = V) -> Any:
    """Two layers, six or eight experts of which two are chosen."""
    shape = {**SHAPE, "vocab_size": vocabulary}
    grouped = {"num_key_value_heads": 2, "head_dim": 8}
    if family == "mixtral":
        return MixtralConfig(**shape, **grouped, intermediate_size=16, num_local_experts=6)
    if family == "qwen3_moe":
        experts = {"moe_intermediate_size": 16, "num_experts": 6, "norm_topk_prob": True}
        return Qwen3MoeConfig(**shape, **grouped, intermediate_size=48, **experts)
    if family == "minimax_m2":
        return MiniMaxM2Config(**shape, **grouped, intermediate_size=16, num_local_experts=6)
    latent = {"q_lora_rank": 16, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4}
    groups = {"n_group": 2, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 0}
    return DeepseekV3Config(
        **shape,
        **latent,
        **groups,
        v_head_dim=8,
        num_key_value_heads=4,
        intermediate_size=48,
        moe_intermediate_size=16,
        n_routed_experts=8,
    )


CLASSES: dict[str, Any] = {
    "mixtral": MixtralForCausalLM,
    "qwen3_moe": Qwen3MoeForCausalLM,
    "deepseek_v3": DeepseekV3ForCausalLM,
    "minimax_m2": MiniMaxM2ForCausalLM,
}


def build_experts(
    family: str, dtype: torch.dtype = torch.float64, *, vocabulary: int = V, skew: float = 0.5
) -> Any:
    """A tiny model; ``skew`` is the spread of the routers' weights."""
    packed_attention.register()
    torch.manual_seed(0)
    model = CLASSES[family](config_of(family, vocabulary))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("gate.weight"):
                weight.normal_(std=skew)
    model = model.to(dtype).train()
    if dtype == torch.float64:
        model.set_experts_implementation("eager")
    return model


def experts_folder(folder: Path, family: str = "qwen3_moe") -> Path:
    """A folder with a tiny mixture of experts and its tokenizer."""
    tokenizer = tiny_tokenizer(chat=True)
    build_experts(family, torch.float32, vocabulary=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
