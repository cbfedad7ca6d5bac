"""Losses that spread tokens over experts: load balance and z-loss of a router.

A router gives each token logits over E experts, and the k experts that it goes to. Its scores are
the softmax of the logits, or (DeepSeek-V3, MiniMax-M2) their sigmoid; here always divided by their
sum over the experts.
"""

import torch
from torch import Tensor


def router_scores(logits: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    """The normalised scores of a router, whose kind is read off the weights that it gave.

    Args:
        logits: [tokens, experts].
        weights: The factors of the chosen experts [tokens, k].
        chosen: Their numbers [tokens, k].

    Returns:
        [tokens, experts], float64; each row adds up to 1.
    """
    wide = logits.double()  # small beside the experts' own work, and summed over many tokens
    soft, sigmoid = wide.softmax(dim=-1), wide.sigmoid()
    given = _shares(weights.detach().to(wide))
    error = {
        name: float((_shares(scores.detach().gather(1, chosen)) - given).abs().sum())
        for name, scores in (("softmax", soft), ("sigmoid", sigmoid))
    }
    return soft if error["softmax"] <= error["sigmoid"] else _shares(sigmoid)


def _shares(scores: Tensor) -> Tensor:
    return scores / scores.sum(dim=-1, keepdim=True)


def load_statistic(scores: Tensor, chosen: Tensor, token_weights: Tensor) -> Tensor:
    """What load balance needs to know of a layer; it adds up over parts of a batch.

    Args:
        scores: [tokens, experts].
        chosen: [tokens, k].
        token_weights: The weight of each token [tokens]; 0 for padding.

    Returns:
        [2 experts + 1]: how often each expert was chosen (no gradient), the sum of its scores,
        the number of tokens.
    """
    weights = token_weights.to(scores)
    loads = scores.new_zeros(scores.shape[1])
    loads.index_add_(0, chosen.flatten(), weights.repeat_interleave(chosen.shape[1]))
    return torch.cat([loads, weights @ scores, weights.sum()[None]])


def load_balance(statistic: Tensor) -> Tensor:
    """Load balance over everything that a statistic was added up over.

    E x sum over experts of (share of tokens that chose it) x (its mean score), arXiv:2101.03961
    eq. 4-6 with shares that add up to k, over all layers together, as transformers has it. Not a
    sum over tokens: the product of two means.

    Args:
        statistic: `load_statistic` of each layer [layers, 2 experts + 1].

    Returns:
        0-d; k where the load is balanced.
    """
    total = statistic.sum(dim=0)
    loads, scores = total[:-1].chunk(2)
    return len(loads) * (loads * scores).sum() / total[-1].square()


def sequence_load_balance(
    scores: Tensor, chosen: Tensor, sequences: Tensor, number: int, real: Tensor
) -> Tensor:
    """Load balance inside each sequence: E / k x sum of share x mean score, arXiv:2412.19437.

    Args:
        scores: [tokens, experts].
        chosen: [tokens, k].
        sequences: Each token's sequence [tokens].
        number: How many sequences there are.
        real: Whether a token is no padding [tokens].

    Returns:
        [sequences]; 1 where the load is balanced.
    """
    experts, k = scores.shape[1], chosen.shape[1]
    shape = (number, experts)
    ones = real.to(scores)
    tokens = scores.new_zeros(number).index_add(0, sequences, ones).clamp(min=1)[:, None]
    loads = scores.new_zeros(shape).view(-1)
    loads.index_add_(
        0, (sequences[:, None] * experts + chosen).flatten(), ones.repeat_interleave(k)
    )
    sums = scores.new_zeros(shape).index_add(0, sequences, scores * ones[:, None])
    return experts / k * (loads.view(shape) / tokens * sums / tokens).sum(dim=1)


def router_z_losses(logits: Tensor) -> Tensor:
    """logsumexp(logits)² of each token [tokens], ST-MoE (arXiv:2202.08906 eq. 5)."""
    return logits.double().logsumexp(dim=-1).square()
