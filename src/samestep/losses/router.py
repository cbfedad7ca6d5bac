"""Losses on the routers of a mixture of experts: load balance, and the z-loss of their logits.

A token's row of a router holds its logits over the experts and the k experts that it was sent to.
Rows of padding get the weight 0.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from samestep.losses.logits import at_least_float32
from samestep.utils.agreement import FACTOR, perturb, relative_differences


def routing_probabilities(logits: Tensor, scores: Tensor, choices: Tensor) -> Tensor | None:
    """What share of a token each expert would get, by the rule that the router itself follows.

    Routers take the softmax of their logits (Mixtral, Qwen3-MoE) or divide sigmoids by their sum
    (DeepSeek-V3, MiniMax-M2). Which of the two is told from the scores that it gave.

    Args:
        logits: [tokens, experts].
        scores: Of the chosen experts [tokens, k], up to a factor for each token.
        choices: The chosen experts [tokens, k].

    Returns:
        Shares [tokens, experts] that sum to 1, in float32 at least; None if it is neither rule.
    """
    wide = at_least_float32(logits)
    rules = wide.softmax(-1), wide.sigmoid()
    expected = _shares(scores.detach().double())
    shares = [_shares(rule.detach().double().gather(1, choices)) for rule in rules]
    errors = relative_differences(shares, [expected, expected]).tolist()
    best = int(errors[1] < errors[0])
    # A rounding of the scores needs no measuring.
    if errors[best] <= torch.finfo(scores.dtype).eps:
        return _shares(rules[best])
    bound = FACTOR * _noise((torch.softmax, torch.sigmoid)[best], logits, scores, choices)
    return _shares(rules[best]) if errors[best] <= bound else None


@torch.no_grad()
def _noise(rule: Callable[..., Tensor], logits: Tensor, scores: Tensor, choices: Tensor) -> float:
    """How far the shares of the chosen experts move when what goes into them rounds otherwise.

    A router takes its scores in float32, whatever its logits are, and rounds them to their type.
    """
    draw = torch.Generator(logits.device).manual_seed(0)
    axis = (-1,) if rule is torch.softmax else ()
    rounded = perturb(rule(perturb(logits, draw).float(), *axis), draw)
    rounded = perturb(rounded.gather(1, choices).to(scores.dtype), draw)
    exact = rule(logits.double(), *axis).gather(1, choices)
    return float(relative_differences([_shares(exact)], [_shares(rounded.double())]))


def _shares(values: Tensor) -> Tensor:
    return values / values.sum(-1, keepdim=True)


def count_choices(choices: Tensor, groups: Tensor, *, weights: Tensor, zeros: Tensor) -> Tensor:
    """How often each expert was chosen, in each group of tokens.

    Args:
        choices: The chosen experts [tokens, k].
        groups: The group of each token [tokens].
        weights: How much each token counts [tokens].
        zeros: [groups, experts], of the type of the result; not changed.

    Returns:
        [groups, experts].
    """
    experts = zeros.shape[1]
    cells = (groups[:, None] * experts + choices).flatten()
    cell_weights = weights.to(zeros)[:, None].expand_as(choices).flatten()
    return zeros.flatten().index_add(0, cells, cell_weights).view_as(zeros)


def load_statistic(shares: Tensor, choices: Tensor, *, weights: Tensor) -> Tensor:
    """What `batch_balance` needs of one router, over a part of the batch; the parts add up.

    Args:
        shares: Routing probabilities [tokens, experts], of `routing_probabilities`.
        choices: The chosen experts [tokens, k].
        weights: How much each token counts [tokens].

    Returns:
        [2, experts]: how often each expert was chosen, and the sum of its shares (with a graph).
    """
    counts = count_choices(
        choices,
        torch.zeros_like(choices[:, 0]),  # all tokens are one group
        weights=weights,
        zeros=shares.new_zeros(1, shares.shape[1]),
    )
    return torch.cat([counts, (shares * weights.to(shares)[:, None]).sum(0, keepdim=True)])


def batch_balance(statistic: Tensor, top_k: int) -> Tensor:
    """Load balance over all tokens: experts x sum of f P, the mean over the routers.

    f is how often an expert was chosen by a token, P its mean share. Switch Transformers
    (arXiv:2101.03961), equations 4 to 6, with k choices a token counted as transformers counts
    them: the least value is k.

    Args:
        statistic: [routers, 2, experts], `load_statistic` added up over the batch.
        top_k: Choices a token.

    Returns:
        0-d; 0 without tokens.
    """
    counts, shares = statistic[:, 0], statistic[:, 1]
    tokens = (counts.sum(-1, keepdim=True) / top_k).clamp(min=torch.finfo(counts.dtype).tiny)
    return (counts / tokens * (shares / tokens)).sum(-1).mean() * statistic.shape[-1]


def sequence_balance(
    shares: Tensor, choices: Tensor, *, sequence_ids: Tensor, num_sequences: int
) -> Tensor:
    """Load balance within each sequence: experts / k x sum of f P.

    DeepSeek-V3 (arXiv:2412.19437), equations 17 to 20, without the factor alpha: the least value
    is 1.

    Args:
        shares: Routing probabilities [tokens, experts], of `routing_probabilities`; no padding.
        choices: The chosen experts [tokens, k].
        sequence_ids: The sequence of each token [tokens], from 0.
        num_sequences: How many sequences there are.

    Returns:
        [sequences].
    """
    experts, top_k = shares.shape[1], choices.shape[1]
    zeros = shares.new_zeros(num_sequences, experts)
    counts = count_choices(
        choices, sequence_ids, weights=torch.ones_like(shares[:, 0]), zeros=zeros
    )
    sums = zeros.index_add(0, sequence_ids, shares)
    tokens = torch.bincount(sequence_ids, minlength=num_sequences).clamp(min=1).to(shares)[:, None]
    return (counts / tokens * (sums / tokens)).sum(1) * (experts / top_k)


def z_loss_sum(logits: Tensor, weights: Tensor) -> Tensor:
    """Sum over tokens of logsumexp², the router z-loss of ST-MoE (arXiv:2202.08906), equation 5.

    Args:
        logits: [tokens, experts].
        weights: How much each token counts [tokens].

    Returns:
        0-d.
    """
    squares = at_least_float32(logits).logsumexp(-1).square()
    return (squares * weights.to(squares)).sum()
