"""Trainers that generate what they train on: their rollouts are made once, then cut like rows."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import Trainer

from samestep.audit.subject import Facts
from samestep.errors import CheckError

SKIPPED = {
    "padding": "rollouts are padded when they are generated, for all micro-batches alike",
    "zero-target": "every rollout has a completion",
    "short-window": "a generation is always cut into equal micro-batches",
    "evaluation-batch": "an evaluation generates anew, which is random",
    "evaluation-first": "an evaluation generates anew, which is random",
}
"""Axes that have no meaning for rollouts."""

TOTAL = "num_items_in_batch"
"""The entry that counts the tokens of all rollouts of an effective batch."""


def generates(trainer: Any) -> bool:
    """Whether a trainer makes its rows itself, as those of GRPO, RLOO and distillation in TRL."""
    return any("_generate_and_score_completions" in vars(kind) for kind in type(trainer).__mro__)


class Rollouts:
    """What a trainer generated from its own prompts, with its own rewards.

    Two things are changed where they would hide everything. Completions that are all of one length
    become ragged; advantages that are all zero, since an untrained model's rollouts are all as
    bad, become 1 and -1 in turn.

    Args:
        trainer: Gives the rollouts; its model is not changed.
        most: Rollouts to keep.

    Raises:
        CheckError: The rollouts are not a mapping of tensors with a row each.
    """

    def __init__(self, trainer: Any, most: int) -> None:
        repeats = vars(trainer).get("num_generations", 1)
        prompts = max(2, -(-most // repeats))
        held = [trainer.train_dataset[at % len(trainer.train_dataset)] for at in range(prompts)]
        trainer.model.train()
        with torch.no_grad():
            found = trainer._generate_and_score_completions(
                [dict(row) for row in held for _ in range(repeats)]
            )
        rows = prompts * repeats
        kept = torch.arange(0, rows, max(1, rows // most))[:most]
        odd = [
            key
            for key, value in found.items()
            if value is not None and key != TOTAL and _length(value) != rows
        ]
        if odd:
            raise CheckError(f"rollouts cannot be cut: {', '.join(odd)} has no entry for each row")
        self.columns = {
            key: value.detach()[kept].clone()
            for key, value in found.items()
            if isinstance(value, Tensor) and key != TOTAL
        }
        self.counted = TOTAL in found
        self.size = len(kept)
        self._make_ragged()
        advantages = self.columns.get("advantages")
        if advantages is not None and not advantages.any():
            advantages[::2], advantages[1::2] = 1.0, -1.0

    def _make_ragged(self) -> None:
        """Cut completions that are all of one length to different ones."""
        mask = self.columns["completion_mask"]
        lengths = mask.sum(1)
        if len(set(lengths.tolist())) > 1:
            return
        places = torch.arange(mask.shape[1])
        for row, length in enumerate(lengths.tolist()):
            mask[row] *= (places < 1 + (5 * row + 2) % length).to(mask.dtype)

    def facts(self) -> list[Facts]:
        """Each rollout's tokens; all of its completion are targets."""
        targets = self.columns["completion_mask"].sum(1).tolist()
        prompts = self.columns["prompt_mask"].sum(1).tolist()
        return [Facts(int(a), int(a), int(a + b)) for a, b in zip(targets, prompts, strict=True)]

    def data(self) -> Dataset:
        """As many rows as there are rollouts, for a data loader to count."""
        return Dataset.from_dict({"prompt": [""] * self.size})

    def batch(self, rows: Sequence[int], everything: Sequence[int]) -> dict[str, Tensor]:
        """A micro-batch.

        Args:
            rows: Its rollouts.
            everything: Those of the effective batch, on all ranks.
        """
        chosen = torch.tensor(list(rows))
        made = {key: value[chosen] for key, value in self.columns.items()}
        if self.counted:
            mask = self.columns["completion_mask"] * self.columns.get("tool_mask", 1)
            made[TOTAL] = mask[torch.tensor(list(everything))].sum()
        return made

    def feed(self, trainer: Any, accumulation: int) -> None:
        """Let a trainer take micro-batches from its data loader in place of its own generation."""
        trainer.get_train_dataloader = partial(Trainer.get_train_dataloader, trainer)
        trainer._prepare_inputs = partial(Trainer._prepare_inputs, trainer)
        for name, value in (("steps_per_generation", accumulation), ("num_iterations", 1)):
            if name in vars(trainer.args):
                setattr(trainer.args, name, value)
        if "log_completions" in vars(trainer):
            trainer.log_completions = False


def _length(value: Any) -> int | None:
    if isinstance(value, Tensor):
        return value.shape[0] if value.dim() else None
    return len(value) if isinstance(value, Sequence | Mapping) else None
