"""What every contender does: a model, rows, and an effective batch."""

import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "support"))

SHAPES: dict[str, dict[str, Any]] = {
    "mini-49k": {
        "model_type": "llama",
        "hidden_size": 96,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "qwen2-reduced": {
        "model_type": "qwen2",
        "hidden_size": 448,
        "intermediate_size": 2432,
        "num_hidden_layers": 6,
        "num_attention_heads": 7,
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
    },
    "llama32-reduced": {
        "model_type": "llama",
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
}
"""Models from random weights, with SmolLM2's tokenizer (49,152 tokens)."""


@dataclass(frozen=True)
class Work:
    """A benchmark's task.

    Attributes:
        model: Makes the model folder, or finds it.
        rows: "gsm" (prompt and completion) or "tools" (long prompts, short answers).
        batch: Examples a step.
        lora_rank: Of adapters; None: all weights train.
        mixed: Products in bfloat16: samestep's ``precision: mixed``, the peers under autocast.
    """

    model: Callable[[], Path]
    rows: str
    batch: int
    lora_rank: int | None = None
    mixed: bool = False

    def write_rows(self, steps: int) -> Path:
        """The rows of so many steps: every contender sees exactly these, once."""
        path = Path(tempfile.mkdtemp()) / "rows.jsonl"
        wanted = _rows(self.rows)[: steps * self.batch]
        path.write_text("".join(json.dumps(row) + "\n" for row in wanted), encoding="utf-8")
        return path


def smollm2() -> Path:
    """The packaged SmolLM2-135M-Instruct in float32."""
    from runs import packaged_model

    from samestep.models.gguf import convert_gguf

    return convert_gguf(packaged_model())


def shaped(name: str) -> Path:
    """A model folder of one of `SHAPES`, made once."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from samestep.utils.files import cache_folder

    folder = cache_folder() / "benchmarks" / name
    if not (folder / "config.json").exists():
        tokenizer = AutoTokenizer.from_pretrained(smollm2())
        shape = dict(SHAPES[name])
        config = AutoConfig.for_model(
            shape.pop("model_type"), **shape, vocab_size=49152, max_position_embeddings=8192
        )
        torch.manual_seed(0)
        tokenizer.save_pretrained(folder)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def _tiny() -> Path:
    from runs import llama_folder

    return llama_folder(Path(tempfile.mkdtemp()) / "tiny")


def _rows(name: str) -> list[dict[str, Any]]:
    file = {"gsm": "gsm_train.jsonl", "tools": "tools_chat.jsonl", "short": "gsm_train.jsonl"}[name]
    lines = (ROOT / "data" / file).read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    if name == "tools":
        return [{"prompt": r["messages"][:-1], "completion": r["messages"][-1:]} for r in rows]
    if name == "short":  # rows that fit a tiny model's positions
        return [{key: text[:60] for key, text in row.items()} for row in rows]
    return rows


WORKS = {
    "gsm": Work(smollm2, "gsm", 32),
    "gsm-mixed": Work(smollm2, "gsm", 32, mixed=True),
    "gsm-lora": Work(smollm2, "gsm", 32, lora_rank=16),
    "tools": Work(smollm2, "tools", 16),
    "tools-lora": Work(smollm2, "tools", 16, lora_rank=16),
    **{name: Work(lambda name=name: shaped(name), "gsm", 32) for name in SHAPES},  # type: ignore[misc]
    "smoke": Work(_tiny, "short", 8),
}
