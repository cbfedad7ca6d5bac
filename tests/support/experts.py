"""Tiny mixtures of experts: two layers, four experts, two of them a token."""

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

MIXTURES = ("mixtral", "qwen3_moe", "deepseek_v3", "minimax_m2")


def config_of(name: str, vocabulary: int = V) -> Any:
    """The configuration of a model of this architecture."""
    shape: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 256,
        "bos_token_id": 0,
        "eos_token_id": 3,
        "pad_token_id": 1,
    }
    if name == "mixtral":
        return MixtralConfig(**shape, num_local_experts=4)
    if name == "qwen3_moe":
        return Qwen3MoeConfig(**shape, num_experts=4, moe_intermediate_size=24, head_dim=8)
    if name == "minimax_m2":
        return MiniMaxM2Config(**shape, num_local_experts=4, head_dim=8)
    return DeepseekV3Config(
        **{**shape, "num_key_value_heads": 4},
        n_routed_experts=4,
        n_shared_experts=1,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        moe_intermediate_size=24,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
    )


CLASSES = {
    "mixtral": MixtralForCausalLM,
    "qwen3_moe": Qwen3MoeForCausalLM,
    "deepseek_v3": DeepseekV3ForCausalLM,
    "minimax_m2": MiniMaxM2ForCausalLM,
}


def build_mixture(name: str, dtype: torch.dtype = torch.float64) -> Any:
    """The model, with routers that are not balanced."""
    torch.manual_seed(0)
    model = CLASSES[name](config_of(name)).to(dtype).train()
    if dtype == torch.float64:  # grouped products have no float64
        model.set_experts_implementation("eager")
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if key.endswith("gate.weight"):
                weight.normal_(std=0.5)
    return model


def mixture_folder(folder: Path, name: str) -> Path:
    """A folder with such a model and its tokenizer."""
    tokenizer = tiny_tokenizer(chat=True)
    torch.manual_seed(0)
    CLASSES[name](config_of(name, len(tokenizer))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
