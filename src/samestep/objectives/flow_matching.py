"""Flow matching: the velocity from data to noise, as a sum of squared errors."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from samestep.engine.terms import Counter, Term

TIMESTEPS = 1000
"""What models of diffusers call time 1."""


@dataclass(frozen=True)
class Times:
    """How times are drawn, between 0 (data) and 1 (noise).

    Attributes:
        policy: "uniform", or "logit_normal": the logistic function of a standard normal number
            (arXiv:2403.03206, section 3.1).
        shift: s maps t to s t / (1 + (s - 1) t): above 1, more of the noisy times (the same paper,
            section 5.3.2).
    """

    policy: Literal["uniform", "logit_normal"] = "uniform"
    shift: float = 1.0

    def __call__(self, generator: torch.Generator) -> Tensor:
        """One time, 0-d, float64."""
        if self.policy == "uniform":
            time = torch.rand((), generator=generator, dtype=torch.float64)
        else:
            time = torch.randn((), generator=generator, dtype=torch.float64).sigmoid()
        return self.shift * time / (1 + (self.shift - 1) * time)


@dataclass(frozen=True)
class FlowMatching:
    """Squared error of the velocity on the straight path from latents to noise.

    Flow matching (arXiv:2210.02747), rectified flow (arXiv:2209.03003): at time t the model sees
    x = (1 - t) latents + t noise and is to answer noise - latents. Term "velocity": by "example"
    the sum over examples of their mean squared error; by "element" the sum of squared errors, so
    that an example weighs as much as its latents are large.

    Attributes:
        normalize: The unit.
    """

    normalize: Literal["example", "element"] = "example"

    def __call__(self, model: nn.Module, micro: Mapping[str, Any]) -> dict[str, Term]:
        """Sums over one micro-batch of `samestep.data.readers.latents.collate_latents`."""
        totals = [self._total(model, group) for group in micro["groups"].values()]
        return {"velocity": Term(torch.stack(totals).sum(), self.normalize)}

    def _total(self, model: nn.Module, group: Mapping[str, Any]) -> Tensor:
        dtype = next(model.parameters()).dtype
        latents, noise = group["latents"].to(dtype), group["noise"].to(dtype)
        time = group["time"].to(dtype).view(-1, *[1] * (latents.dim() - 1))
        seen = (1 - time) * latents + time * noise
        velocity = model(
            hidden_states=_with_condition(model, seen, group.get("condition")),
            timestep=group["time"].to(dtype) * TIMESTEPS,
            return_dict=False,
            **_told(model, group["model_kwargs"], len(latents), dtype),
        )[0]
        wide = velocity if dtype == torch.float64 else velocity.float()
        errors = (wide - (noise - latents).to(wide)).square().flatten(1)
        by_example = errors.mean(1) if self.normalize == "example" else errors.sum(1)
        total: Tensor = (by_example * group["weights"].to(by_example)).sum()
        return total


def _elements(micro: Mapping[str, Any]) -> float:
    groups = micro["groups"].values()
    return math.fsum(float(g["weights"].sum()) * g["latents"][0].numel() for g in groups)


COUNTERS: dict[str, Counter] = {
    "example": lambda micro: float(micro["example_weights"].sum()),
    "element": _elements,
}
"""Counters of the units of this module. An example of weight w counts w times."""


def _with_condition(model: Any, seen: Tensor, condition: Tensor | None) -> Tensor:
    """The channels that the model takes: noisy latents, the condition, and zeros for the rest."""
    parts = [seen] if condition is None else [seen, condition.to(seen)]
    missing = model.config["in_channels"] - sum(part.shape[1] for part in parts)
    if missing > 0:
        parts.append(seen.new_zeros(len(seen), missing, *seen.shape[2:]))
    return torch.cat(parts, dim=1)


def _told(
    model: Any, told: Mapping[str, Tensor], examples: int, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The model's further arguments; of those that HunyuanVideo-1.5 insists on, none where absent.

    Its pipeline gives zeros for an image that is not there, and masks a second text out.
    """
    given = {n: v if n.startswith("encoder_attention") else v.to(dtype) for n, v in told.items()}
    if type(model).__name__ != "HunyuanVideo15Transformer3DModel":
        return given
    first = given["encoder_hidden_states"]
    absent = {
        "encoder_hidden_states_2": (1, model.config["text_embed_2_dim"]),
        "image_embeds": (1, model.config["image_embed_dim"]),
    }
    for name, shape in absent.items():
        given.setdefault(name, first.new_zeros(examples, *shape))
    mask = torch.zeros(examples, 1, dtype=torch.long, device=first.device)
    given.setdefault("encoder_attention_mask_2", mask)
    return given
