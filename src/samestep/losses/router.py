"""Losses on the routers of a mixture of experts: load balance, and the z-loss of their logits.

A token's row of a router holds its logits over the experts and the k experts that it was sent to.
Rows of padding get the weight 0.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from samestep.utils.agreement import FACTOR, perturb, relative_differences


def probabilities(logits: Tensor, scores: Tensor, choices: Tensor) -> Tensor | None:
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
    wide = logits if logits.dtype == torch.float64 else logits.float()
    rules = wide.softmax(-1), wide.sigmoid()
    given = _shares(scores.detach().double())
    found = [_shares(rule.detach().double().gather(1, choices)) for rule in rules]
    errors = relative_differences(found, [given, given]).tolist()
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
    taken = perturb(rule(perturb(logits, draw).float(), *axis), draw)
    found = perturb(taken.gather(1, choices).to(scores.dtype), draw)
    exact = rule(logits.double(), *axis).gather(1, choices)
    return float(relative_differences([_shares(exact)], [_shares(found.double())]))


def _shares(values: Tensor) -> Tensor:
    return values / values.sum(-1, keepdim=True)


def choices_by_group(choices: Tensor, weights: Tensor, groups: Tensor, shape: Tensor) -> Tensor:
    """How often each expert was chosen, in each group of tokens.

    Args:
        choices: The chosen experts [tokens, k].
        weights: How much each token counts [tokens].
        groups: The group of each token [tokens].
        shape: Zeros [groups, experts] of the type of the result.

    Returns:
        [groups, experts].
    """
    experts = shape.shape[1]
    cells = (groups[:, None] * experts + choices).flatten()
    counted = weights.to(shape)[:, None].expand_as(choices).flatten()
    return torch.zeros_like(shape).flatten().index_add(0, cells, counted).view_as(shape)


def load_statistic(shares: Tensor, choices: Tensor, weights: Tensor) -> Tensor:
    """What `window_balance` needs of one router on a part of the batch; parts add up.

    Args:
        shares: [tokens, experts], of `probabilities`.
        choices: The chosen experts [tokens, k].
        weights: How much each token counts [tokens].

    Returns:
        [2, experts]: how often each expert was chosen, and the sum of its shares (with a graph).
    """
    everything = shares.new_zeros(1, shares.shape[1])
    chosen = choices_by_group(choices, weights, torch.zeros_like(choices[:, 0]), everything)
    return torch.cat([chosen, (shares * weights.to(shares)[:, None]).sum(0, keepdim=True)])


def window_balance(statistic: Tensor, top_k: int) -> Tensor:
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
    chosen, shares = statistic[:, 0], statistic[:, 1]
    tokens = (chosen.sum(-1, keepdim=True) / top_k).clamp(min=torch.finfo(chosen.dtype).tiny)
    return (chosen / tokens * (shares / tokens)).sum(-1).mean() * statistic.shape[-1]


def sequence_balance(shares: Tensor, choices: Tensor, groups: Tensor, sequences: int) -> Tensor:
    """Load balance within each sequence: experts / k x sum of f P.

    DeepSeek-V3 (arXiv:2412.19437), equations 17 to 20, without the factor alpha: the least value
    is 1.

    Args:
        shares: [tokens, experts], of `probabilities`; no padding.
        choices: The chosen experts [tokens, k].
        groups: The sequence of each token [tokens].
        sequences: How many there are.

    Returns:
        [sequences].
    """
    experts, top_k = shares.shape[1], choices.shape[1]
    empty = shares.new_zeros(sequences, experts)
    chosen = choices_by_group(choices, torch.ones_like(shares[:, 0]), groups, empty)
    sums = empty.index_add(0, groups, shares)
    tokens = torch.bincount(groups, minlength=sequences).clamp(min=1).to(shares)[:, None]
    return (chosen / tokens * (sums / tokens)).sum(1) * (experts / top_k)


def z_totals(logits: Tensor, weights: Tensor) -> Tensor:
    """Sum over tokens of logsumexp², the router z-loss of ST-MoE (arXiv:2202.08906), equation 5.

    Args:
        logits: [tokens, experts].
        weights: How much each token counts [tokens].

    Returns:
        0-d.
    """
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return (wide.logsumexp(-1).square() * weights.to(wide)).sum()
