"""Tiny models of images and text, their processors, and rows with pictures of digits and words.

transformers builds the processors of models that also take videos only where torchvision is
installed, which PyTorch's CPU build does not go with. Here such a processor is put together without
its video part: texts and images go through the real code.
"""

import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from PIL import Image, ImageDraw
from tiny import CHAT, build_tokenizer
from transformers import (
    AutoModelForImageTextToText,
    Ernie4_5_VLMoeConfig,
    Ernie4_5_VLMoeProcessor,
    GotOcr2Config,
    GotOcr2Processor,
    Kimi_K25Config,
    Kimi_K25Processor,
    MiniCPMV4_6Config,
    MiniCPMV4_6Processor,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen3VLConfig,
    Qwen3VLProcessor,
    SmolVLMConfig,
    SmolVLMProcessor,
)
from transformers.models.ernie4_5_vl_moe.image_processing_pil_ernie4_5_vl_moe import (
    Ernie4_5_VLMoeImageProcessorPil,
)
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.minicpmv4_6.image_processing_pil_minicpmv4_6 import (
    MiniCPMV4_6ImageProcessorPil,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.smolvlm import processing_smolvlm
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

FAMILIES = ["qwen3_vl", "got_ocr2", "smolvlm", "ernie4_5_vl_moe", "minicpmv4_6"]

WRAPPED = "kimi_k25"
"""Kimi-K2.5, DeepSeek-V3 with images: its image processor is torchvision's alone, so that of
Qwen3-VL, which cuts patches too, stands in."""

FULL = "minicpmv4_6 with full attention"
"""MiniCPM without the linear attention, which is in float32 whatever the weights are."""

TOKENS: dict[str, dict[str, str]] = {
    "qwen3_vl": {
        "image_token": "<|image_pad|>",
        "video_token": "<|video_pad|>",
        "vision_start_token": "<|vision_start|>",
        "vision_end_token": "<|vision_end|>",
    },
    "got_ocr2": {"start": "<img>", "end": "</img>", "image_token": "<imgpad>"},
    "kimi_k25": {
        "image_token": "<|media_pad|>",
        "video_token": "<|kimi_k25_video_placeholder|>",
        "start": "<|media_begin|>",
        "end": "<|media_end|>",
    },
    "smolvlm": {
        "image_token": "<image>",
        "fake_image_token": "<fake_token_around_image>",
        "global_image_token": "<global-img>",
        "end_of_utterance_token": "<end_of_utterance>",
        **{f"at{row}{column}": f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)},
    },
    "ernie4_5_vl_moe": {
        "image_token": "<|IMAGE_PLACEHOLDER|>",
        "image_start_token": "<|IMAGE_START|>",
        "image_end_token": "<|IMAGE_END|>",
        "video_token": "<|VIDEO_PLACEHOLDER|>",
        "video_start_token": "<|VIDEO_START|>",
        "video_end_token": "<|VIDEO_END|>",
    },
    "minicpmv4_6": {
        "image_token": "<|image_pad|>",
        "video_token": "<|video_pad|>",
        "image_start_token": "<image>",
        "image_end_token": "</image>",
        "slice_start_token": "<slice>",
        "slice_end_token": "</slice>",
        "image_id_start_token": "<image_id>",
        "image_id_end_token": "</image_id>",
    },
}

AROUND = {
    "kimi_k25": ("<|media_begin|>", "<|media_end|>"),
    "qwen3_vl": ("<|vision_start|>", "<|vision_end|>"),
    "got_ocr2": ("<img>", "</img>"),
    "ernie4_5_vl_moe": ("<|IMAGE_START|>", "<|IMAGE_END|>"),
}
"""What the template writes around an image, where the processor does not."""


def tokenizer_of(family: str) -> PreTrainedTokenizerFast:
    """The byte-level tokenizer with the family's special tokens."""
    plain = build_tokenizer()
    plain.add_tokens(list(TOKENS[family].values()), special_tokens=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=plain.backend_tokenizer,
        bos_token="<|bos|>",
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        extra_special_tokens=TOKENS[family],
    )


def template_of(family: str) -> str:
    """ChatML over parts."""
    start, end = AROUND.get(family, ("", ""))
    image = start + TOKENS[family]["image_token"] + end
    parts = (
        "{% for p in m['content'] %}{% if p['type'] == 'image' %}" + image + "{% else %}"
        "{{ p['text'] }}{% endif %}{% endfor %}"
    )
    return CHAT.replace("{{ m['content'] + '<|im_end|>' }}", parts + "<|im_end|>")


class SquarePatches(Qwen2VLImageProcessorPil):
    """The patches of Qwen's processor as pictures [patches, 3, side, side]."""

    def __call__(self, images: Any, **options: Any) -> Any:
        outputs = super().__call__(images, **options)
        outputs["pixel_values"] = outputs["pixel_values"].reshape(-1, 3, 4, 4)
        return outputs


def build_processor(family: str) -> Any:
    """The family's processor for images of a few patches."""
    family = family.split()[0]
    tokenizer, template = tokenizer_of(family), template_of(family)
    few = {"size": {"shortest_edge": 256, "longest_edge": 1024}, "patch_size": 4, "merge_size": 2}
    videos = SimpleNamespace(slice_mode=False, downsample_mode="16x", num_frames=1, fps=1)
    unchecked = patch.object(ProcessorMixin, "check_argument_for_proper_class", lambda *_: None)
    numbers = patch.object(processing_smolvlm, "num2words", str)
    with unchecked, numbers:
        if family == "qwen3_vl":
            images = Qwen2VLImageProcessorPil(**few, temporal_patch_size=2)
            return Qwen3VLProcessor(images, tokenizer, videos, chat_template=template)
        if family == WRAPPED:
            return Kimi_K25Processor(
                SquarePatches(**few, temporal_patch_size=1),
                tokenizer,
                videos,
                chat_template=template,
            )
        if family == "got_ocr2":
            images = GotOcr2ImageProcessorPil(size={"height": 64, "width": 64})
            got = GotOcr2Processor(images, tokenizer, chat_template=template)
            got.num_image_tokens = 16
            return got
        if family == "smolvlm":
            edges = {"size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 16}}
            images = SmolVLMImageProcessorPil(**edges)
            return SmolVLMProcessor(
                images, tokenizer, videos, image_seq_len=4, chat_template=template
            )
        if family == "ernie4_5_vl_moe":
            images = Ernie4_5_VLMoeImageProcessorPil(**few)
            return Ernie4_5_VLMoeProcessor(images, tokenizer, videos, chat_template=template)
        images = MiniCPMV4_6ImageProcessorPil(patch_size=4, scale_resolution=32)
        return MiniCPMV4_6Processor(images, videos, tokenizer, chat_template=template)


def config_of(family: str, tokenizer: Any) -> Any:
    """Two layers of width 32 for text, and a small tower for images."""
    text: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": 0,
        "eos_token_id": 3,
        "pad_token_id": 1,
    }
    mixed, family = family != FULL, family.split()[0]
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in TOKENS[family].items()}
    image = {"image_token_id": ids["image_token"]}
    tower = {"hidden_size": 16, "num_channels": 3, "intermediate_size": 32}
    if family == "qwen3_vl":
        rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
        vision = {
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_heads": 2,
            "patch_size": 4,
            "out_hidden_size": 32,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        }
        del text["bos_token_id"], text["eos_token_id"]
        return Qwen3VLConfig(
            text_config={**text, "head_dim": 8, "rope_parameters": rope},
            vision_config=vision,
            video_token_id=ids["video_token"],
            vision_start_token_id=ids["vision_start_token"],
            vision_end_token_id=ids["vision_end_token"],
            **image,
        )
    if family == WRAPPED:
        latent = {"q_lora_rank": 16, "kv_lora_rank": 8, "qk_rope_head_dim": 4}
        heads = {"qk_nope_head_dim": 4, "v_head_dim": 8, "num_key_value_heads": 4}
        experts = {"moe_intermediate_size": 16, "n_routed_experts": 8, "num_experts_per_tok": 2}
        experts |= {"n_group": 2, "topk_group": 1, "n_shared_experts": 1}
        vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
        vision |= {"num_attention_heads": 2, "patch_size": 4, "pos_emb_height": 8}
        return Kimi_K25Config(
            text_config={**text, **latent, **heads, **experts, "first_k_dense_replace": 1},
            vision_config={**vision, "pos_emb_width": 8},
            projection_hidden_size=16,
            tie_word_embeddings=False,
            video_token_id=ids["video_token"],
            vision_start_token_id=ids["start"],
            vision_end_token_id=ids["end"],
            **image,
        )
    if family == "got_ocr2":
        vision = {
            "hidden_size": 16,
            "output_channels": 8,
            "num_hidden_layers": 2,
            "mlp_dim": 32,
            "num_attention_heads": 2,
            "image_size": 64,
            "patch_size": 4,
            "window_size": 4,
            "global_attn_indexes": [1],
            "initializer_range": 0.02,
        }
        return GotOcr2Config(
            text_config={**text, "model_type": "qwen2"},
            vision_config=vision,
            image_token_index=ids["image_token"],
        )
    if family == "smolvlm":
        vision = {**tower, "num_hidden_layers": 2, "num_attention_heads": 2}
        vision |= {"image_size": 16, "patch_size": 4}
        return SmolVLMConfig(
            text_config={**text, "model_type": "llama"}, vision_config=vision, **image
        )
    if family == "ernie4_5_vl_moe":
        rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
        experts = {"moe_intermediate_size": [16, 8], "moe_k": 2, "moe_num_experts": 4}
        vision = {"depth": 2, "hidden_size": 16, "num_heads": 2, "patch_size": 4}
        return Ernie4_5_VLMoeConfig(
            text_config={**text, **experts, "rope_parameters": rope},
            vision_config={**vision, "intermediate_size": 32},
            **{f"{name}_id": number for name, number in ids.items()},
        )
    linear = {f"linear_num_{name}_heads": 2 for name in ("key", "value")}
    linear |= {f"linear_{name}_head_dim": 8 for name in ("key", "value")}
    layers = ["linear_attention" if mixed else "full_attention", "full_attention"]
    kinds = {"model_type": "qwen3_5_text", "layer_types": layers}
    vision = {**tower, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"image_size": 32, "patch_size": 4, "insert_layer_id": 0}
    return MiniCPMV4_6Config(
        text_config={**text, **linear, **kinds, "head_dim": 8},
        vision_config=vision,
        insert_layer_id=0,
        image_size=32,
        video_token_id=ids["video_token"],
        **image,
    )


def build_vision(family: str, dtype: torch.dtype = torch.float64) -> tuple[Any, Any]:
    """A tiny model from random weights, and its processor."""
    processor = build_processor(family)
    torch.manual_seed(0)
    config = config_of(family, processor.tokenizer)
    model = AutoModelForImageTextToText.from_config(config).to(dtype).train()
    if dtype == torch.float64:
        model.set_experts_implementation("eager")
    return model, processor


def got_folder(folder: Path) -> Path:
    """A folder with a tiny GOT-OCR2, the family whose processor needs no video part."""
    model, processor = build_vision("got_ocr2", torch.float32)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def draw_text(text: str, size: tuple[int, int]) -> Image.Image:
    """Black on white."""
    image = Image.new("RGB", size, "white")
    ImageDraw.Draw(image).text((2, 2), text, fill="black")
    return image


def write_illustrated_rows(folder: Path, number: int, *, seed: int = 0, plain: int = 0) -> Path:
    """Rows that ask for the number in a picture; every ``plain``-th row has no picture at all."""
    draw = random.Random(seed)
    rows = []
    for at in range(number):
        digit = draw.randint(0, 9)
        size = draw.choice([(24, 16), (16, 16), (32, 24)])
        draw_text(str(digit), size).save(folder / f"{seed}-{at}.png")
        question = "How many?" + " Answer." * draw.randint(0, 3)
        parts: list[dict[str, str]] = [{"type": "text", "text": question}]
        if not plain or at % plain:
            parts.insert(0, {"type": "image", "image": f"{seed}-{at}.png"})
        answer = f"{digit}" + " Yes." * draw.randint(0, 4)
        messages = [
            {"role": "user", "content": parts},
            {"role": "assistant", "content": answer},
        ]
        rows.append({"messages": messages})
    path = folder / f"rows-{seed}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
