"""Names of losses, each declared once: for the losses and for settings. No PyTorch."""

from typing import Literal

PairLoss = Literal[
    "sigmoid",
    "sigmoid_norm",
    "hinge",
    "ipo",
    "robust",
    "exo_pair",
    "nca_pair",
    "bco_pair",
    "sppo_hard",
    "apo_zero",
    "apo_down",
    "discopop",
]
"""Losses of a pair by itself."""

SortedLoss = Literal["aot", "aot_unpaired"]
"""Losses of all pairs of a batch, sorted."""

DPOLoss = Literal[PairLoss, SortedLoss, "sft"]
"""What DPO may mix: these, and cross entropy of the chosen completion."""

MEANS_OVER_TOKENS: frozenset[PairLoss] = frozenset({"ipo", "sigmoid_norm"})
"""Losses whose ratios are means over tokens by definition."""

LOSSES_OF_DIFFERENCES: frozenset[DPOLoss] = frozenset(
    {"sigmoid", "sigmoid_norm", "hinge", "ipo", "robust", "exo_pair", "discopop", "sft"}
)
"""Losses that see the difference between chosen and rejected alone, in which the unknown constant
of an f-divergence falls out."""

FDivergence = Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]
"""What may hold a policy near to its reference, named as in TRL."""

PolicyLoss = Literal["clipped", "cispo", "sapo"]
"""Surrogates of a policy gradient."""
