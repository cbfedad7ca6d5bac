"""Tiny models, ragged examples, a plain reference, and a comparison weight by weight."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from samestep.data.collate import Padding, collate_examples
from samestep.data.examples import Example
from samestep.kernels import packed_attention

V = 97


def build(name: str, dtype: torch.dtype = torch.float64) -> Any:
    """A two-layer model: "llama" (untied), "llama-tied", "qwen2" or "gpt2" (tied)."""
    packed_attention.register()
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "vocab_size": V,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    if name == "gpt2":
        zero = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
        size = {"vocab_size": V, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
        model: Any = GPT2LMHeadModel(GPT2Config(**size, **zero, bos_token_id=0, eos_token_id=1))
    elif name == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**shape))
    else:
        model = LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=name == "llama-tied"))
    return model.to(dtype).train()


def ragged(
    number: int, *, seed: int = 0, weighted: bool = False, by_token: bool = False
) -> list[Example]:
    """Examples of 3 to 30 tokens with masked prompts; every seventh has no target at all."""
    draw = torch.Generator().manual_seed(seed)
    examples = []
    for row in range(number):
        length = int(torch.randint(3, 31, (), generator=draw))
        ids = torch.randint(2, V, (length,), generator=draw)
        labels = ids.clone()
        labels[: int(torch.randint(0, length, (), generator=draw))] = -100
        if row % 7 == 3:
            labels[:] = -100
        weight = 0.5 + float(torch.rand((), generator=draw)) if weighted else 1.0
        tokens = torch.rand(length, generator=draw) if by_token and row % 2 else None
        examples.append(Example(ids, labels, weight, row, tokens))
    return examples


def plain_attention(model: Any) -> str:
    """PyTorch's attention, or, where a model cannot use it, the one written out."""
    return "eager" if model.config.model_type == "gemma2" else "sdpa"


def cut(
    model: Any, examples: Sequence[Example], sizes: Sequence[int], padding: Padding
) -> list[dict[str, Any]]:
    """Micro-batches of these sizes, again and again, until the examples end."""
    model.set_attn_implementation(
        packed_attention.NAME if padding == "none" else plain_attention(model)
    )
    micros, at, turn = [], 0, 0
    while at < len(examples):
        size = sizes[turn % len(sizes)]
        micros.append(collate_examples(examples[at : at + size], padding=padding))
        at, turn = at + size, turn + 1
    return micros


def plain_objective(
    model: Any,
    examples: Sequence[Example],
    *,
    normalize: str | float = "token",
    smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """The objective from whole logits, each example alone, straight from its formula."""
    model.set_attn_implementation(plain_attention(model))
    total, count = torch.zeros((), dtype=model.dtype), 0.0
    for example in examples:
        targets = example.labels[1:]
        given = example.token_weights
        weights = (torch.ones(len(targets)) if given is None else given[1:]).to(model.dtype)
        weights = weights[targets != -100]
        number = float(weights.sum())
        if not number:
            continue
        logits = model(input_ids=example.input_ids[None]).logits[0, :-1][targets != -100]
        losses = (
            functional.cross_entropy(
                logits, targets[targets != -100], reduction="none", label_smoothing=smoothing
            )
            + z_loss * logits.logsumexp(-1).square()
        )
        if normalize == "sequence":
            total = total + example.weight * (weights @ losses) / number
            count += example.weight
        else:
            total = total + example.weight * (weights @ losses)
            count += example.weight * number
    return total / (count if isinstance(normalize, str) else normalize)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """The gradient of every weight that trains; zeros where there is none."""
    return {
        name: torch.zeros_like(weight) if weight.grad is None else weight.grad.clone()
        for name, weight in model.named_parameters()
        if weight.requires_grad
    }


def worst(found: dict[str, Tensor], reference: dict[str, Tensor]) -> float:
    """The largest relative difference of any weight, each to its own norm."""
    assert found.keys() == reference.keys()
    differences = []
    for name, wanted in reference.items():
        norm = float(wanted.double().norm())
        error = float((found[name].double() - wanted.double()).norm())
        differences.append(error / norm if norm else error)
    return max(differences)
