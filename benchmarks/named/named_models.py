"""The models that people ask for by name: the class of each, and its published size."""

from dataclasses import dataclass, field
from typing import Any

KIMI: dict[str, Any] = {
    "vocab_size": 163840,
    "hidden_size": 7168,
    "num_hidden_layers": 61,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "intermediate_size": 18432,
    "n_routed_experts": 384,
    "num_experts_per_tok": 8,
    "n_shared_experts": 1,
    "moe_intermediate_size": 2048,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
"""Kimi-K2: DeepSeek-V3 with more experts and fewer heads."""


def llama(width: int, layers: int, heads: int, kv: int, forward: int, words: int) -> dict[str, Any]:
    """The sizes of a dense decoder."""
    return {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "intermediate_size": forward,
        "vocab_size": words,
    }


@dataclass(frozen=True)
class Named:
    """One row of docs/models.md.

    Attributes:
        name: As people say it.
        kind: The class, of transformers unless it is of diffusers.
        reduced: Which tiny model stands in for it: "llama", "qwen2", the name of a mixture of
            experts, "vision FAMILY" or "video".
        hub: What --model is given for the full-size weights.
        objective: Of `samestep train`.
        size: Changes of the class's own default configuration that give the full size.
        text: The same, of the configuration of the text model inside.
        settings: Further flags of the command.
        note: What else is to be known.
    """

    name: str
    kind: str
    reduced: str
    hub: str
    objective: str = "causal_lm"
    size: dict[str, Any] = field(default_factory=dict)
    text: dict[str, Any] = field(default_factory=dict)
    settings: str = ""
    note: str = ""


TIED = {"tie_word_embeddings": True}

NAMED = [
    Named(
        "SmolLM-135M",
        "LlamaForCausalLM",
        "llama-tied",
        "HuggingFaceTB/SmolLM-135M",
        size={**llama(576, 30, 9, 3, 1536, 49152), **TIED},
    ),
    Named(
        "SmolLM2-135M",
        "LlamaForCausalLM",
        "llama-tied",
        "HuggingFaceTB/SmolLM2-135M",
        size={**llama(576, 30, 9, 3, 1536, 49152), **TIED},
        note="its real weights are trained by `make demo` and `tests/test_smollm2.py`",
    ),
    Named(
        "Llama 3.2 1B",
        "LlamaForCausalLM",
        "llama-tied",
        "meta-llama/Llama-3.2-1B",
        size={**llama(2048, 16, 32, 8, 8192, 128256), **TIED},
    ),
    Named(
        "Qwen2 7B",
        "Qwen2ForCausalLM",
        "qwen2",
        "Qwen/Qwen2-7B",
        size=llama(3584, 28, 28, 4, 18944, 152064),
    ),
    Named(
        "Kimi-K2-Thinking",
        "DeepseekV3ForCausalLM",
        "deepseek_v3",
        "moonshotai/Kimi-K2-Thinking",
        size=KIMI,
        settings="--router-loss sequence --router-loss-weight 0.0001",
        note="published in int4; sizes are those of the weights in bfloat16",
    ),
    Named(
        "Kimi-K2.5 (kimi_k25)",
        "Kimi_K25ForConditionalGeneration",
        "vision kimi_k25",
        "moonshotai/Kimi-K2.5",
        "vision_language",
        text=KIMI,
        note="its image processor needs torchvision; here another one cut the patches",
    ),
    Named(
        "MiniMax-M2",
        "MiniMaxM2ForCausalLM",
        "minimax_m2",
        "MiniMaxAI/MiniMax-M2",
        settings="--router-loss window",
    ),
    Named(
        "ERNIE-4.5-VL-28B-A3B-Thinking",
        "Ernie4_5_VLMoeForConditionalGeneration",
        "vision ernie4_5_vl_moe",
        "baidu/ERNIE-4.5-VL-28B-A3B-Thinking",
        "vision_language",
    ),
    Named(
        "MiniCPM-V 4.6",
        "MiniCPMV4_6ForConditionalGeneration",
        "vision minicpmv4_6",
        "openbmb/MiniCPM-V-4.6",
        "vision_language",
        note="the size is that of the class's default configuration; MiniCPM-V 4.5 has no class "
        "in transformers and needs its own remote code",
    ),
    Named(
        "GOT-OCR-2.0-hf",
        "GotOcr2ForConditionalGeneration",
        "vision got_ocr2",
        "stepfun-ai/GOT-OCR-2.0-hf",
        "vision_language",
    ),
    Named(
        "Spark-Formalizer-X1-7B",
        "LlamaForCausalLM",
        "llama",
        "./spark-formalizer-x1-7b",
        size=llama(4096, 32, 32, 32, 11008, 32000),
        note="no configuration of it is published in transformers: the size is that of a dense "
        "Llama of 7 B",
    ),
    Named(
        "HunyuanVideo-1.5",
        "HunyuanVideo15Transformer3DModel",
        "video",
        "./hunyuanvideo-1.5/transformer",
        "flow_matching",
        note="of diffusers; a loop that averages the means of micro-batches stands for Trainer",
    ),
]
