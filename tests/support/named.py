"""Models that people fine-tune, in reduced configurations with random weights, and a batch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from experts import config_of
from torch import Tensor

from objectives import ragged_records
from samestep.data.collate import collate
from samestep.data.examples import Example
from samestep.models import attention

V, IMAGE, EXAMPLES = 97, 5, 8
TEXT: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 3,
    "pad_token_id": 1,
}
VISION: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48}
TOKENS = {"image_token_id": IMAGE, "video_token_id": 6}
GRID = torch.tensor([[1, 4, 4]])


@dataclass(frozen=True)
class Named:
    """A model by its name.

    Attributes:
        title: The name that people know.
        kind: The class of transformers.
        config: Makes the reduced configuration.
        image: Makes one image's inputs for the model; None: text alone.
        joined: Along which dimension each of them is joined over a micro-batch.
        image_tokens: How many tokens stand for an image.
        parameters: Of the full-size model, in billions, about; None: it depends on the checkpoint.
        command: Trains the full-size weights.
        in_float32: Parts of it compute in float32, whatever the weights are.
    """

    title: str
    kind: str
    config: Callable[[], Any]
    parameters: float | None
    command: str
    image: Callable[[torch.Generator], dict[str, Tensor]] | None = None
    joined: tuple[tuple[str, int], ...] = ()
    image_tokens: int = 4
    in_float32: bool = False

    def build(self, dtype: torch.dtype) -> Any:
        """The model with random weights, in train mode."""
        attention.register()
        torch.manual_seed(0)
        model = getattr(transformers, self.kind)(self.config()).to(dtype).train()
        if dtype == torch.float64:
            model.set_experts_implementation("eager")  # grouped products have no float64
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if name.endswith("gate.weight"):
                    weight.normal_(std=0.5)
        return model

    def examples(self) -> list["One"]:
        """Sequences of ragged length, each with an image of its own if the model sees any."""
        draw = torch.Generator().manual_seed(7)
        found = []
        for example in ragged_records(EXAMPLES).sequences:
            if self.image is None:
                found.append(One(example, {}))
                continue
            ids = example.input_ids.clamp(min=20)
            head = torch.tensor([7, *[IMAGE] * self.image_tokens, 8])
            labels = torch.cat([torch.full_like(head, -100), ids.where(example.labels > 0, -100)])
            sequence = Example(torch.cat([head, ids]), labels, row=example.row)
            found.append(One(sequence, self.image(draw)))
        return found

    def micro(self, chosen: Sequence["One"], dtype: torch.dtype) -> dict[str, Any]:
        """A micro-batch, padded to the right."""
        micro = collate([one.sequence for one in chosen], padding="right", pad_id=1)
        if self.image is None:
            return micro
        del micro["position_ids"]  # these models make them of the images' shapes
        for name, dim in self.joined:
            joined = torch.cat([one.image[name] for one in chosen], dim=dim)
            micro[name] = joined.to(dtype) if joined.is_floating_point() else joined
        ids = micro["input_ids"]
        if "Qwen3VL" in self.kind or "Ernie" in self.kind:
            micro["mm_token_type_ids"] = (ids == IMAGE).long()
        if "Ernie" in self.kind:
            seen = (ids == IMAGE) | (ids == 7) | (ids == 8)
            micro["moe_mm_token_type_ids"] = seen.long()
        return micro


@dataclass(frozen=True)
class One:
    """A sequence, and its image's inputs."""

    sequence: Example
    image: dict[str, Tensor]


def patches(*shape: int) -> Callable[[torch.Generator], dict[str, Tensor]]:
    """Pixels of this shape, and their grid."""
    return lambda draw: {
        "pixel_values": torch.randn(*shape, generator=draw),
        "image_grid_thw": GRID,
    }


def pixels(*shape: int) -> Callable[[torch.Generator], dict[str, Tensor]]:
    """Pixels of this shape alone."""
    return lambda draw: {"pixel_values": torch.randn(*shape, generator=draw)}


def llama(**changes: Any) -> Callable[[], Any]:
    return lambda: transformers.LlamaConfig(**{**TEXT, **changes})


def qwen3_vl() -> Any:
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}
    text = {**TEXT, "head_dim": 8, "rope_parameters": {**rope, "mrope_interleaved": True}}
    vision = {
        **VISION,
        "depth": 2,
        "num_heads": 4,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": 32,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0],
    }
    ends = {"vision_start_token_id": 7, "vision_end_token_id": 8}
    return transformers.Qwen3VLConfig(text_config=text, vision_config=vision, **TOKENS, **ends)


def got_ocr2() -> Any:
    vision = {
        "hidden_size": 32,
        "output_channels": 16,
        "num_hidden_layers": 2,
        "mlp_dim": 48,
        "num_attention_heads": 4,
        "image_size": 64,
        "patch_size": 8,
        "window_size": 4,
        "global_attn_indexes": [1],
    }
    text = {**TEXT, "model_type": "qwen2"}
    return transformers.GotOcr2Config(text_config=text, vision_config=vision, image_token_id=IMAGE)


def smolvlm() -> Any:
    vision = {**VISION, "num_hidden_layers": 2, "num_attention_heads": 4}
    return transformers.SmolVLMConfig(
        text_config={**TEXT, "model_type": "llama"},
        vision_config={**vision, "image_size": 16, "patch_size": 4},
        image_token_id=IMAGE,
        scale_factor=2,
        pad_token_id=1,
    )


def minicpm() -> Any:
    text = {**TEXT, "model_type": "qwen3_5_text", "head_dim": 8}
    vision = {**VISION, "num_hidden_layers": 2, "num_attention_heads": 4}
    return transformers.MiniCPMV4_6Config(
        text_config={**text, "layer_types": ["full_attention", "full_attention"]},
        vision_config={**vision, "image_size": 32, "patch_size": 4},
        insert_layer_id=0,
        image_size=32,
        **TOKENS,
    )


def minicpm_image(draw: torch.Generator) -> dict[str, Tensor]:
    """8 x 8 patches of 4 x 4 pixels side by side: 4 tokens."""
    return {
        "pixel_values": torch.randn(1, 3, 4, 4 * 64, generator=draw),
        "target_sizes": torch.tensor([[8, 8]], dtype=torch.int32),
    }


def ernie() -> Any:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    text = {
        **TEXT,
        "moe_k": 2,
        "moe_num_experts": 4,
        "moe_num_shared_experts": 1,
        "moe_intermediate_size": [24, 16],
        "mlp_layer_types": ["dense", "sparse"],
        "rope_parameters": rope,
    }
    vision = {**VISION, "depth": 2, "num_heads": 4, "patch_size": 4, "spatial_merge_size": 2}
    ends = {"image_start_token_id": 7, "image_end_token_id": 8}
    video = {"video_start_token_id": 9, "video_end_token_id": 4}
    return transformers.Ernie4_5_VLMoeConfig(
        text_config=text, vision_config=vision, **TOKENS, **ends, **video, tie_word_embeddings=False
    )


def kimi() -> Any:
    vision = {
        **VISION,
        "patch_size": 4,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "pos_emb_height": 4,
        "pos_emb_width": 4,
        "pos_emb_time": 1,
    }
    return transformers.Kimi_K25Config(
        text_config=config_of("deepseek_v3").to_dict(),
        vision_config=vision,
        projection_hidden_size=32,
        vision_start_token_id=7,
        vision_end_token_id=8,
        tie_word_embeddings=False,
        **TOKENS,
    )


GRIDS = (("pixel_values", 0), ("image_grid_thw", 0))
TRAIN = "samestep train --data rows.jsonl --out runs/x --model"

NAMED = [
    Named(
        "SmolLM-135M, SmolLM2-135M",
        "LlamaForCausalLM",
        llama(tie_word_embeddings=True),
        0.135,
        f"{TRAIN} HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
    Named(
        "Llama 3.2 1B",
        "LlamaForCausalLM",
        llama(tie_word_embeddings=True, head_dim=16),
        1.24,
        f"{TRAIN} meta-llama/Llama-3.2-1B --dtype bfloat16",
    ),
    Named(
        "Qwen2-0.5B",
        "Qwen2ForCausalLM",
        lambda: transformers.Qwen2Config(**TEXT),
        0.49,
        f"{TRAIN} Qwen/Qwen2-0.5B",
    ),
    Named(
        "Spark-Formalizer-X1-7B (Llama class)",
        "LlamaForCausalLM",
        llama(),
        7,
        f"{TRAIN} PATH --dtype bfloat16 --lora-rank 16",
    ),
    Named(
        "Kimi-K2-Thinking",
        "DeepseekV3ForCausalLM",
        lambda: config_of("deepseek_v3"),
        1000,
        f"{TRAIN} moonshotai/Kimi-K2-Thinking --dtype bfloat16 --lora-rank 16",
        in_float32=True,
    ),
    Named(
        "Kimi-K2.5 (kimi_k25)",
        "Kimi_K25ForConditionalGeneration",
        kimi,
        1000,
        "your own loop with samestep.step",
        patches(16, 3, 4, 4),
        GRIDS,
        in_float32=True,
    ),
    Named(
        "MiniMax-M2",
        "MiniMaxM2ForCausalLM",
        lambda: config_of("minimax_m2"),
        230,
        f"{TRAIN} MiniMaxAI/MiniMax-M2 --dtype bfloat16 --lora-rank 16",
        in_float32=True,
    ),
    Named(
        "ERNIE-4.5-VL-28B-A3B-Thinking",
        "Ernie4_5_VLMoeForConditionalGeneration",
        ernie,
        28,
        "your own loop with samestep.step",
        patches(16, 3 * 4 * 4),
        GRIDS,
        in_float32=True,
    ),
    Named(
        "MiniCPM-V 4.6",
        "MiniCPMV4_6ForConditionalGeneration",
        minicpm,
        None,
        "your own loop with samestep.step",
        minicpm_image,
        (("pixel_values", -1), ("target_sizes", 0)),
        in_float32=True,
    ),
    Named(
        "GOT-OCR-2.0-hf",
        "GotOcr2ForConditionalGeneration",
        got_ocr2,
        0.58,
        "your own loop with samestep.step",
        pixels(1, 3, 64, 64),
        (("pixel_values", 0),),
    ),
    Named(
        "Qwen3-VL-8B",
        "Qwen3VLForConditionalGeneration",
        qwen3_vl,
        8.8,
        "your own loop with samestep.step",
        patches(16, 3 * 2 * 4 * 4),
        GRIDS,
    ),
    Named(
        "SmolVLM-2.2B",
        "SmolVLMForConditionalGeneration",
        smolvlm,
        2.2,
        "your own loop with samestep.step",
        pixels(1, 1, 3, 16, 16),
        (("pixel_values", 0),),
    ),
]
