"""samestep's own training as a subject of `samestep check`, packed and padded, dropout and all.

samestep check examples/check_samestep.py
samestep check examples/check_samestep.py --axes dropout,micro-batch
"""

from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import samestep
from samestep.data.collate import collate_examples as collated
from samestep.data.examples import Example
from samestep.kernels import packed_attention
from samestep.models.dropout import key_dropout, replace_dropout

VOCABULARY = 50

packed_attention.register()
loss_fn = samestep.CausalLMLoss()


def model() -> Any:
    """A small GPT-2 with dropout in the residual stream, as `samestep train` prepares it."""
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=64, attn_pdrop=0.0,
        bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    made = GPT2LMHeadModel(config).train()
    replace_dropout(made)
    return made


def examples() -> list[Example]:
    """Ragged rows of which the first third is a prompt, and no target."""
    made = []
    for row, length in enumerate((5, 17, 3, 9, 12, 4, 21, 7)):
        ids = torch.arange(length) * 7 % VOCABULARY
        labels = ids.clone()
        labels[: length // 3] = -100
        made.append(Example(ids, labels, row=row))
    return made


def collate(rows: list[Example]) -> dict[str, Any]:
    """Padded on the right."""
    return collated(rows, padding="right")


def pack(rows: list[Example]) -> dict[str, Any]:
    """Side by side, without padding."""
    return collated(rows, padding="none")


def prepared(model: Any, micro_batches: list[dict[str, Any]]) -> None:
    """The attention that fits the layout of these micro-batches."""
    packed = "cu_seq_lens_q" in micro_batches[0]
    model.set_attn_implementation(packed_attention.NAME if packed else "sdpa")


def train(model: Any, micro_batches: list[dict[str, Any]]) -> dict[str, float]:
    """One step as `samestep train` takes it, and what it reports."""

    def keyed(model: Any, micro: dict[str, Any]) -> dict[str, samestep.Term]:
        key_dropout(model, micro, seed=0, step=0)
        return loss_fn(model, micro)

    prepared(model, micro_batches)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    report = samestep.step(model, optimizer, micro_batches, keyed)
    return {"loss": report.loss, **report.terms}


def evaluate(model: Any, batches: list[dict[str, Any]]) -> dict[str, float]:
    """The same objective without gradients."""
    prepared(model, batches)
    report = samestep.evaluate(model, batches, loss_fn)
    return {"loss": report.loss, **report.terms}
