"""What a model says of whole completions: sums over each sequence, and the reference's."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from samestep.engine.counts import targets_per_sequence
from samestep.engine.targets import sequence_ids, shifted_targets, target_positions
from samestep.models.lm_head import UpToHead
from samestep.utils.modules import eval_mode


@dataclass(frozen=True)
class Completions:
    """Sums over the targets of each sequence [sequences].

    Attributes:
        log_p: Log likelihood, with a graph.
        correct: Targets that are the most likely token.
        targets: How many there are; float64.
    """

    log_p: Tensor
    correct: Tensor
    targets: Tensor


def completions(up_to_head: UpToHead, model: nn.Module, micro: Mapping[str, Any]) -> Completions:
    """Run a model and add up the log likelihood of each sequence's targets.

    Args:
        up_to_head: Runs it.
        model: A causal language model.
        micro: A micro-batch of `samestep.data.collate.collate_examples`.

    Returns:
        The sums.
    """
    positions = target_positions(micro)
    states = up_to_head(model, micro, at=positions)
    found = states.likelihoods(shifted_targets(micro), positions)
    ids = sequence_ids(micro).flatten()[positions]
    number, _ = targets_per_sequence(micro)
    zeros = found.nll.new_zeros(len(number))
    return Completions(
        log_p=zeros.index_add(0, ids, -found.nll),
        correct=zeros.index_add(0, ids, found.correct),
        targets=number,
    )


class Reference:
    """The frozen policy that log ratios are taken to.

    Args:
        model: A frozen model of its own; None: the trained model with its adapters off.
    """

    def __init__(self, model: nn.Module | None) -> None:
        self._model = model
        if model is not None:
            model.eval().requires_grad_(False)

    def log_p(self, up_to_head: UpToHead, policy: nn.Module, micro: Mapping[str, Any]) -> Tensor:
        """Log likelihood of each sequence's targets under the reference [sequences]."""
        with self._in_place_of(policy) as model:
            return completions(up_to_head, model, micro).log_p

    def targets_log_p(
        self, up_to_head: UpToHead, policy: nn.Module, micro: Mapping[str, Any]
    ) -> Tensor:
        """Log likelihood of each target under the reference [targets]."""
        with self._in_place_of(policy) as model:
            positions = target_positions(micro)
            states = up_to_head(model, micro, at=positions)
            return -states.likelihoods(shifted_targets(micro), positions).nll

    @contextmanager
    def _in_place_of(self, policy: nn.Module) -> Iterator[nn.Module]:
        """The model that is the reference, without gradients and dropout."""
        with torch.no_grad():
            if self._model is not None:
                yield self._model
            else:
                adapters: Any = policy
                with eval_mode(policy), adapters.disable_adapter():
                    yield policy
