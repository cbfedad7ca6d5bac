"""Losses of preferences between completions, one number a pair, and of tokens by their chance.

All take log ratios r = log p(y) - log p_reference(y) of the chosen (w) and the rejected (l)
completion; d = r_w - r_l. They return a loss for each pair [pairs] and never divide by a count.
Where a completion's log likelihood is divided by its length, r is that mean already.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from samestep.losses.names import FDivergence, PairLoss


@dataclass(frozen=True)
class LogRatios:
    """Log ratios of policy to reference of pairs.

    Attributes:
        chosen: r_w [pairs].
        rejected: r_l [pairs].
    """

    chosen: Tensor
    rejected: Tensor

    @property
    def difference(self) -> Tensor:
        """D = r_w - r_l [pairs]."""
        return self.chosen - self.rejected


def pair_loss(
    kind: PairLoss,
    ratios: LogRatios,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    tau: float = 0.05,
) -> Tensor:
    """The loss of each pair.

    - "sigmoid": DPO, -log s(beta d), arXiv:2305.18290; with smoothing e cDPO:
      -(1 - e) log s(beta d) - e log s(-beta d).
    - "sigmoid_norm": the same of length-normalised ratios, arXiv:2411.15124.
    - "hinge": SLiC, max(0, 1 - beta d), arXiv:2309.06657.
    - "ipo": (d - 1 / (2 beta))², arXiv:2310.12036 eq. 17, of length-normalised ratios.
    - "robust": (-(1 - e) log s(beta d) + e log s(-beta d)) / (1 - 2e), arXiv:2403.00409.
    - "exo_pair": KL(s(beta d) || 1 - e), arXiv:2402.00856 eq. 16; e above 0.
    - "nca_pair": -log s(beta r_w) - (log s(-beta r_w) + log s(-beta r_l)) / 2, arXiv:2402.05369.
    - "bco_pair": -log s(beta r_w) - log s(-beta r_l), arXiv:2404.04656.
    - "sppo_hard": (r_w - 1/(2 beta))² + (r_l + 1/(2 beta))², arXiv:2405.00675 eq. 4.7.
    - "apo_zero": 1 - s(beta r_w) + s(beta r_l), arXiv:2408.06266 eq. 7.
    - "apo_down": s(beta r_w) + 1 - s(beta d), arXiv:2408.06266 eq. 8.
    - "discopop": a blend of -log s(beta d) and exp(-beta d) by s(beta d / tau), arXiv:2406.08414
      eq. 5.

    Args:
        kind: Which loss.
        ratios: The log ratios.
        beta: Strength of the reference; above 0.
        label_smoothing: e, the share of labels that are wrong, below 1/2.
        tau: Temperature of "discopop".

    Returns:
        [pairs].
    """
    return _LOSSES[kind](ratios, _Options(beta, label_smoothing, tau))


def sorted_loss(
    first: Tensor, second: Tensor, *, beta: float, label_smoothing: float = 0.0
) -> Tensor:
    """AOT, arXiv:2406.05882: a logistic loss between two sorted lists of all pairs.

    -log s(beta (sort(first) - sort(second))). "aot" (paired): margins log p(y_w) - log p(y_l) of
    the policy and of the reference. "aot_unpaired": log ratios of the chosen and of the rejected.
    Sorting couples all pairs of a batch: this is a function of the whole batch, not a sum over its
    parts.

    Args:
        first: What is to be the larger [pairs].
        second: What it is compared with [pairs].
        beta: Strength of the reference.
        label_smoothing: As for `pair_loss`.

    Returns:
        [pairs], in sorted order.
    """
    return _smoothed(beta * (first.sort().values - second.sort().values), label_smoothing)


def divergence_scores(log_ratios: Tensor, kind: FDivergence, *, coefficient: float = 0.5) -> Tensor:
    """What takes the place of r where an f-divergence holds the policy: f'(u), u = exp(r).

    f-DPO, arXiv:2309.16240: the KL of policy to reference is one of several f-divergences; a reward
    is beta f'(u) plus a constant of the prompt, which falls out of differences.

    - "reverse_kl": r, which is DPO.
    - "forward_kl": 1 - 1 / u.
    - "js_divergence" (Jensen-Shannon): log(2 u / (1 + u)).
    - "alpha_divergence": (u^(a - 1) - 1) / (a - 1), as in TRL; the paper's alpha is 1 - a. a = 1 is
      "reverse_kl", a = 0 "forward_kl".

    Args:
        log_ratios: r [any].
        kind: Which divergence.
        coefficient: a, for "alpha_divergence".

    Returns:
        [any]; not finite where u^-1 is too large for the type.
    """
    if kind == "forward_kl":
        return -torch.expm1(-log_ratios)
    if kind == "js_divergence":
        return math.log(2) + logsigmoid(log_ratios)
    if kind == "alpha_divergence" and coefficient != 1:
        return torch.expm1((coefficient - 1) * log_ratios) / (coefficient - 1)
    return log_ratios


def reference_free_loss(
    kind: Literal["sigmoid", "hinge", "ipo"],
    margin: Tensor,
    *,
    beta: float,
    gamma: float = 0.0,
    label_smoothing: float = 0.0,
) -> Tensor:
    """SimPO and CPO: losses of the policy's own margin.

    CPO, arXiv:2401.08417: margin = log p(y_w) - log p(y_l), sums over tokens. SimPO,
    arXiv:2405.14734: means over tokens, and a target margin: -log s(beta margin - gamma).

    Args:
        kind: "sigmoid"; "hinge": max(0, 1 - beta margin); "ipo": (margin - 1/(2 beta))².
        margin: [pairs].
        beta: Above 0.
        gamma: SimPO's target margin, for "sigmoid".
        label_smoothing: As for `pair_loss`, for "sigmoid".

    Returns:
        [pairs].
    """
    if kind == "hinge":
        return torch.relu(1 - beta * margin)
    if kind == "ipo":
        return (margin - 1 / (2 * beta)).square()
    return _smoothed(beta * margin - gamma, label_smoothing)


def odds_ratio_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """ORPO, arXiv:2403.07691 eq. 7: -log s(log odds(y_w) - log odds(y_l)).

    Args:
        chosen: Mean log likelihood of a token of y_w [pairs]; below 0.
        rejected: That of y_l [pairs].

    Returns:
        [pairs].
    """
    return -logsigmoid(_log_odds(chosen) - _log_odds(rejected))


def reward_loss(chosen: Tensor, rejected: Tensor, *, margin: Tensor | None = None) -> Tensor:
    """Bradley-Terry: -log s(reward_w - reward_l - margin), arXiv:2307.09288 eq. 2.

    Args:
        chosen: Rewards of the chosen [pairs].
        rejected: Rewards of the rejected [pairs].
        margin: By how much they should differ [pairs], or None.

    Returns:
        [pairs].
    """
    difference = chosen - rejected
    return -logsigmoid(difference if margin is None else difference - margin)


def unpaired_loss(
    ratios: Tensor,
    is_desirable: Tensor,
    *,
    reference_point: Tensor,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """KTO, arXiv:2402.01306 eq. 8: weight x (1 - s(+-beta (r - z))), + for desirable examples.

    Args:
        ratios: r of every example [examples].
        is_desirable: Whether the example is desirable [examples], bool.
        reference_point: z, the KL of policy to reference, at least 0; 0-d and without a graph.
        beta: Above 0.
        desirable_weight: Weight of desirable examples.
        undesirable_weight: Weight of undesirable examples.

    Returns:
        [examples].
    """
    gain = torch.where(is_desirable, ratios - reference_point, reference_point - ratios)
    # Tensors, not numbers: torch.where of two numbers would be float32.
    weights = torch.where(
        is_desirable, ratios.new_tensor(desirable_weight), ratios.new_tensor(undesirable_weight)
    )
    return weights * (1 - torch.sigmoid(beta * gain))


def _log_odds(log_p: Tensor) -> Tensor:
    # log(p / (1 - p)); log1p(-p) would lose digits near p = 1, so take log(-expm1(log p)). The
    # bound keeps a token that is certain (p rounds to 1) finite.
    log_p = log_p.clamp(max=-torch.finfo(log_p.dtype).eps)
    return log_p - torch.log(-torch.expm1(log_p))


def _smoothed(margin: Tensor, label_smoothing: float) -> Tensor:
    e = label_smoothing
    if not e:
        return -logsigmoid(margin)
    return -(1 - e) * logsigmoid(margin) - e * logsigmoid(-margin)


def _robust(margin: Tensor, label_smoothing: float) -> Tensor:
    e = label_smoothing
    return (-(1 - e) * logsigmoid(margin) + e * logsigmoid(-margin)) / (1 - 2 * e)


def _exo(margin: Tensor, label_smoothing: float) -> Tensor:
    e = margin.new_tensor(label_smoothing)
    preferred = margin.sigmoid() * (logsigmoid(margin) - torch.log1p(-e))
    return preferred + (-margin).sigmoid() * (logsigmoid(-margin) - e.log())


def _nca(ratios: LogRatios, beta: float) -> Tensor:
    negatives = logsigmoid(-beta * ratios.chosen) + logsigmoid(-beta * ratios.rejected)
    return -logsigmoid(beta * ratios.chosen) - 0.5 * negatives


def _discopop(margin: Tensor, tau: float) -> Tensor:
    blend = (margin / tau).sigmoid()
    return -logsigmoid(margin) * (1 - blend) + (-margin).exp() * blend


class _Options(NamedTuple):
    beta: float
    label_smoothing: float
    tau: float


_LOSSES: dict[PairLoss, Callable[[LogRatios, _Options], Tensor]] = {
    "sigmoid": lambda r, o: _smoothed(o.beta * r.difference, o.label_smoothing),
    "sigmoid_norm": lambda r, o: _smoothed(o.beta * r.difference, o.label_smoothing),
    "hinge": lambda r, o: torch.relu(1 - o.beta * r.difference),
    "ipo": lambda r, o: (r.difference - 1 / (2 * o.beta)).square(),
    "robust": lambda r, o: _robust(o.beta * r.difference, o.label_smoothing),
    "exo_pair": lambda r, o: _exo(o.beta * r.difference, o.label_smoothing),
    "nca_pair": lambda r, o: _nca(r, o.beta),
    "bco_pair": lambda r, o: -logsigmoid(o.beta * r.chosen) - logsigmoid(-o.beta * r.rejected),
    "sppo_hard": lambda r, o: (
        (r.chosen - 0.5 / o.beta).square() + (r.rejected + 0.5 / o.beta).square()
    ),
    "apo_zero": lambda r, o: 1 - (o.beta * r.chosen).sigmoid() + (o.beta * r.rejected).sigmoid(),
    "apo_down": lambda r, o: (o.beta * r.chosen).sigmoid() + 1 - (o.beta * r.difference).sigmoid(),
    "discopop": lambda r, o: _discopop(o.beta * r.difference, o.tau),
}

assert set(_LOSSES) == set(get_args(PairLoss))


def dft_losses(nll: Tensor) -> Tensor:
    """Dynamic fine-tuning, arXiv:2508.05629: p x nll of each target, p without a gradient.

    Args:
        nll: Negative log likelihood of each target [any].

    Returns:
        [any].
    """
    return (-nll).exp().detach() * nll
