"""Log-probabilities of whole sequences, under a policy and under its frozen reference."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from samestep.engine.counts import targets_per_sequence
from samestep.engine.modes import eval_mode
from samestep.engine.targets import sequence_ids, target_positions
from samestep.losses.likelihood import Extras
from samestep.models.lm_head import UpToHead


@dataclass(frozen=True)
class SequenceLogProbs:
    """Sums over the targets of each sequence [sequences].

    Attributes:
        log_p: Log-probability, with a graph.
        weighted_log_p: The same of weighted targets, with a graph; ``log_p`` without weights.
        correct: Targets that are the most likely token.
        targets: How many there are; float64.
        on_policy: Log of the chance of the targets less that of a collision
            (`samestep.losses.likelihood.Likelihoods`), detached; means nothing unless asked for.
    """

    log_p: Tensor
    weighted_log_p: Tensor
    correct: Tensor
    targets: Tensor
    on_policy: Tensor


def sequence_log_probs(
    model: nn.Module,
    micro_batch: Mapping[str, Any],
    *,
    up_to_head: UpToHead,
    weights: Tensor | None = None,
    collision: bool = False,
) -> SequenceLogProbs:
    """Run a model and add up the log-probabilities of each sequence's targets.

    Args:
        model: A causal language model of transformers, plain or wrapped by PEFT.
        micro_batch: A micro-batch of `samestep.data.collate.collate_examples`.
        up_to_head: Runs it.
        weights: Of the targets in ``weighted_log_p`` [targets], in reading order; None: all 1.
        collision: Whether ``on_policy`` is wanted.

    Returns:
        The sums.

    Examples:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1)
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=1))
        >>> ids = torch.tensor([[1, 2, 3], [1, 4, 5]])
        >>> labels = torch.tensor([[-100, 2, 3], [-100, -100, 5]])
        >>> micro_batch = {"input_ids": ids, "labels": labels}
        >>> log_probs = sequence_log_probs(model, micro_batch, up_to_head=UpToHead())
        >>> log_probs.log_p.shape, log_probs.targets.tolist()
        (torch.Size([2]), [2.0, 1.0])
    """
    likelihoods = up_to_head.target_likelihoods(
        model, micro_batch, extras=Extras(collision=collision)
    )
    targets, _ = targets_per_sequence(micro_batch)
    ids = sequence_ids(micro_batch).flatten()[target_positions(micro_batch)]
    zeros = likelihoods.nll.new_zeros(len(targets))
    log_p = zeros.index_add(0, ids, -likelihoods.nll)
    weighted = log_p
    if weights is not None:
        weighted = zeros.index_add(0, ids, -likelihoods.nll * weights.to(log_p))
    return SequenceLogProbs(
        log_p=log_p,
        weighted_log_p=weighted,
        correct=zeros.index_add(0, ids, likelihoods.correct),
        targets=targets,
        on_policy=log_p.detach() - zeros.index_add(0, ids, likelihoods.collision),
    )


def shared_length_weights(micro_batch: Mapping[str, Any], tail: float) -> Tensor:
    """The weights of LD-DPO, arXiv:2409.06411: less for what one side has more than the other.

    Args:
        micro_batch: Of pairs, the chosen and the rejected sequence of each side by side.
        tail: The weight of targets beyond the number that both sides have.

    Returns:
        [targets], float64, in reading order: 1 for the others.
    """
    ids = sequence_ids(micro_batch).flatten()[target_positions(micro_batch)]
    counts = torch.bincount(ids, minlength=len(micro_batch["example_ids"]))
    shared = torch.minimum(counts[::2], counts[1::2]).repeat_interleave(2)
    # The targets of a sequence stand side by side, those of one sequence after another's.
    place = torch.arange(len(ids), device=ids.device) - (counts.cumsum(0) - counts)[ids]
    beyond = (place >= shared[ids]).double()
    return 1 - (1 - tail) * beyond


class Reference:
    """The frozen model that log ratios are taken to, and a policy is held near to.

    Args:
        model: A frozen model of its own; None: the trained model with its adapters off.
    """

    def __init__(self, model: nn.Module | None) -> None:
        self._model = model
        if model is not None:
            model.eval().requires_grad_(False)

    def log_p(
        self,
        policy: nn.Module,
        micro_batch: Mapping[str, Any],
        *,
        up_to_head: UpToHead,
        weights: Tensor | None = None,
    ) -> Tensor:
        """The log-probability of each sequence's targets under the reference.

        Args:
            policy: The model that trains.
            micro_batch: As for `sequence_log_probs`.
            up_to_head: Runs either.
            weights: As for `sequence_log_probs`.

        Returns:
            [sequences], without a graph.
        """
        with self._in_place_of(policy) as model:
            return sequence_log_probs(
                model, micro_batch, up_to_head=up_to_head, weights=weights
            ).weighted_log_p

    def targets_log_p(
        self,
        policy: nn.Module,
        micro_batch: Mapping[str, Any],
        *,
        up_to_head: UpToHead,
        temperature: float = 1.0,
    ) -> Tensor:
        """The log-probability of each target under the reference.

        Args:
            policy: The model that trains.
            micro_batch: As for `sequence_log_probs`.
            up_to_head: Runs either.
            temperature: What logits are divided by.

        Returns:
            [targets], without a graph, in reading order.
        """
        with self._in_place_of(policy) as model:
            return -up_to_head.target_likelihoods(model, micro_batch, temperature=temperature).nll

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
