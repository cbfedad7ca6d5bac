"""The models and rows of the GPU benchmark: full shapes, random weights, ids made beforehand.

Speed and exactness do not depend on the values of weights and ids. So nothing is downloaded:
shapes are written out here, and rows are random ids whose lengths are those of the project's own
rows under SmolLM2's tokenizer (`lengths.json`).
"""

import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests" / "support")]

_LLAMA32 = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}

SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.2-1b": {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 2048,
        "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True,
        "max_position_embeddings": 131072,
        "rope_parameters": {
            **_LLAMA32, "rope_theta": 500000.0, "original_max_position_embeddings": 8192
        },
    },
    "qwen2-0.5b": {
        "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 896,
        "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
        "num_key_value_heads": 2, "tie_word_embeddings": True, "max_position_embeddings": 32768,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    },
    "smollm2-135m": {
        "model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
        "tie_word_embeddings": True, "max_position_embeddings": 8192,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
    },
    "llama-3.1-8b": {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096,
        "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "tie_word_embeddings": False, "max_position_embeddings": 131072,
        "rope_parameters": {
            **_LLAMA32, "factor": 8.0, "rope_theta": 500000.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "tiny": {
        "model_type": "llama", "vocab_size": 512, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "tie_word_embeddings": True, "max_position_embeddings": 8192,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Work:
    """A model, rows, and how many of them a step takes.

    Attributes:
        shape: A name of `SHAPES`.
        rows: "gsm", "tools", or "long" (8,192 tokens each).
        batch: Rows a step.
        lora_rank: Of adapters; None: all weights train.
    """

    shape: str
    rows: str = "gsm"
    batch: int = 128
    lora_rank: int | None = None


WORKS = {
    "llama-1b-gsm": Work("llama-3.2-1b"),
    "smollm2-gsm": Work("smollm2-135m"),
    "qwen2-gsm": Work("qwen2-0.5b"),
    "llama-1b-tools": Work("llama-3.2-1b", "tools", 64),
    "llama-1b-long": Work("llama-3.2-1b", "long", 8),
    "llama-8b-lora": Work("llama-3.1-8b", batch=64, lora_rank=16),
    "tiny": Work("tiny", batch=8),
}


def config_of(shape: str) -> Any:
    """The config of a shape."""
    from transformers import AutoConfig

    values = dict(SHAPES[shape])
    special = {"bos_token_id": 0, "eos_token_id": 3, "pad_token_id": 1}
    return AutoConfig.for_model(values.pop("model_type"), **values, **special)


def model_folder(shape: str, folder: Path) -> Path:
    """A folder with a config, and a tokenizer that nothing but its pad token is read of."""
    from tiny import build_tokenizer

    config_of(shape).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


def rows_of(work: Work, steps: int) -> list[dict[str, list[int]]]:
    """So many steps of rows: ids and labels, the same whenever they are made."""
    draw = random.Random(0)
    number, vocabulary = steps * work.batch, SHAPES[work.shape]["vocab_size"]
    if work.rows == "long":
        lengths = [[0, 8192]] * number
    else:
        known = json.loads((HERE / "lengths.json").read_text(encoding="ascii"))[work.rows]
        lengths = [known[at % len(known)] for at in range(number)]
    if work.shape == "tiny":
        lengths = [[prompt // 8 + 1, completion // 8 + 1] for prompt, completion in lengths]
    rows = []
    for prompt, completion in lengths:
        ids = [draw.randrange(4, vocabulary) for _ in range(prompt + completion)]
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return rows


def flops(
    work: Work, rows: list[dict[str, list[int]]], weights: dict[str, int]
) -> dict[str, float]:
    """Floating-point operations of products over rows, forward and backward.

    Args:
        work: What is trained.
        rows: The rows.
        weights: Elements of the matrices: ``body``, and ``head``.

    Returns:
        ``model``: all positions through the head, as shares are usually told. ``executed``: the
        head at the targets alone, which is what samestep computes. Attention counts the half that
        a causal mask leaves. Frozen weights have no gradient of their own.
    """
    shape = SHAPES[work.shape]
    width = shape.get("head_dim", shape["hidden_size"] // shape["num_attention_heads"])
    inner = width * shape["num_attention_heads"] * shape["num_hidden_layers"]
    tokens = sum(len(row["input_ids"]) for row in rows)
    targets = sum(sum(label != -100 for label in row["labels"][1:]) for row in rows)
    attention = 6.0 * inner * sum(len(row["input_ids"]) ** 2 for row in rows)
    passes = 6.0 if work.lora_rank is None else 4.0
    body = passes * weights["body"] * tokens + attention
    return {
        "model": body + passes * weights["head"] * tokens,
        "executed": body + passes * weights["head"] * targets,
    }
