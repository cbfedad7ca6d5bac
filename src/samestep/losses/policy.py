"""Surrogates of policy gradients, one number a target, from ratios of the new to the old policy.

They return a loss for each target or sequence and never divide by a count.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class ClipRange(NamedTuple):
    """How far the ratio of new to old policy may go from 1 before its gradient is cut off.

    Attributes:
        low: The ratio is clipped below 1 - low.
        high: The ratio is clipped above 1 + high.
    """

    low: float = 0.2
    high: float = 0.2


def clipped_losses(
    log_ratio: Tensor, advantages: Tensor, *, clip: ClipRange
) -> tuple[Tensor, Tensor]:
    """PPO's surrogate, arXiv:1707.06347 eq. 7: -min(q A, clip(q, 1 - low, 1 + high) A).

    Args:
        log_ratio: log q = log p - log p_old, of tokens or of sequences [any].
        advantages: A [any].
        clip: The range of the ratio.

    Returns:
        Losses [any], and whether the clipped term was the minimum [any]: 1 or 0, detached.
    """
    ratio = log_ratio.exp()
    surrogate = ratio * advantages
    clipped = ratio.clamp(1 - clip.low, 1 + clip.high) * advantages
    losses = -torch.minimum(surrogate, clipped)
    return losses, (clipped < surrogate).to(losses).detach()


def capped_losses(
    log_ratio: Tensor, advantages: Tensor, *, log_p: Tensor, high: float
) -> tuple[Tensor, Tensor]:
    """CISPO, arXiv:2506.13585: -sg(min(q, 1 + high)) A log p.

    The weight of a target is bounded, and without a gradient; every target keeps its own. As in the
    paper's runs there is no bound from below.

    Args:
        log_ratio: log q = log p - log p_old, of tokens or of sequences [any].
        advantages: A [any].
        log_p: Of the targets [any], with a graph.
        high: The ratio counts 1 + high at most.

    Returns:
        Losses [any], and whether the bound was reached [any]: 1 or 0, detached.
    """
    ratio = log_ratio.detach().exp()
    return -ratio.clamp(max=1 + high) * advantages * log_p, (ratio > 1 + high).to(log_p)


class Temperatures(NamedTuple):
    """How fast SAPO's gate closes as the ratio leaves 1.

    Attributes:
        positive: Of targets whose advantage is above 0.
        negative: Of the others.
    """

    positive: float = 1.0
    negative: float = 1.05


def gated_losses(log_ratio: Tensor, advantages: Tensor, *, temperatures: Temperatures) -> Tensor:
    """SAPO, arXiv:2511.20347: -s(t (q - 1)) 4 / t A, s the logistic function.

    Args:
        log_ratio: log q = log p - log p_old, of tokens or of sequences [any].
        advantages: A [any].
        temperatures: t by the sign of A.

    Returns:
        Losses [any]. At q = 1 their gradient is that of -q A.
    """
    # Tensors, not numbers: torch.where of two numbers would be float32.
    positive, negative = (log_ratio.new_tensor(value) for value in temperatures)
    t = torch.where(advantages > 0, positive, negative)
    return -(t * (log_ratio.exp() - 1)).sigmoid() * 4 / t * advantages


def kl_estimates(log_p: Tensor, log_p_reference: Tensor) -> Tensor:
    """KL of policy to reference at sampled tokens, never below 0 ("k3"): exp(d) - d - 1.

    http://joschu.net/blog/kl-approx.html, with d = log p_reference - log p.

    Args:
        log_p: Log probabilities of the tokens under the policy [any].
        log_p_reference: Those under the reference [any].

    Returns:
        [any].
    """
    difference = log_p_reference - log_p
    return difference.exp() - difference - 1
