"""Flow matching: the velocity from data to noise, as a sum of squared errors."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from samestep.engine.terms import Counter, Term
from samestep.losses.logits import at_least_float32

_NUM_TIMESTEPS = 1000
"""What models of diffusers call time 1."""


@dataclass(frozen=True)
class TimestepSampler:
    """Draws times between 0 (data) and 1 (noise).

    Attributes:
        distribution: "uniform", or "logit_normal": the logistic function of a standard normal
            number (arXiv:2403.03206, section 3.1).
        shift: s maps t to s t / (1 + (s - 1) t): above 1, more of the noisy times (the same paper,
            section 5.3.2).

    Examples:
        >>> times = [TimestepSampler(shift=s)(torch.Generator().manual_seed(0)) for s in (1, 3)]
        >>> bool(0 <= times[0] < times[1] < 1)
        True
    """

    distribution: Literal["uniform", "logit_normal"] = "uniform"
    shift: float = 1.0

    def __call__(self, generator: torch.Generator) -> Tensor:
        """One time, 0-d, float64."""
        if self.distribution == "uniform":
            time = torch.rand((), generator=generator, dtype=torch.float64)
        else:
            time = torch.randn((), generator=generator, dtype=torch.float64).sigmoid()
        return self.shift * time / (1 + (self.shift - 1) * time)


def _elements(micro_batch: Mapping[str, Any]) -> float:
    """The numbers in the latents, each weighted as its example."""
    groups = micro_batch["groups"].values()
    return math.fsum(
        float(group["weights"].sum()) * group["latents"][0].numel() for group in groups
    )


FLOW_MATCHING_COUNTERS: dict[str, Counter] = {
    "example": lambda micro_batch: float(micro_batch["example_weights"].sum()),
    "element": _elements,
}
"""Of `FlowMatching`. An example of weight w counts w times."""


@dataclass(frozen=True)
class FlowMatching:
    """Squared error of the velocity on the straight path from latents to noise.

    Flow matching (arXiv:2210.02747), rectified flow (arXiv:2209.03003): at time t the model gets
    x = (1 - t) latents + t noise and is to predict noise - latents. Term "velocity": by "example"
    the sum over examples of their mean squared error; by "element" the sum of squared errors, so
    that an example weighs as much as its latents are large.

    Attributes:
        normalize: The unit.
    """

    normalize: Literal["example", "element"] = "example"
    counters: ClassVar[Mapping[str, Counter]] = FLOW_MATCHING_COUNTERS

    def __call__(self, model: nn.Module, micro_batch: Mapping[str, Any]) -> dict[str, Term]:
        """Sums over one micro-batch of `samestep.data.readers.latents.collate_latents`."""
        totals = [self._total(model, group) for group in micro_batch["groups"].values()]
        return {"velocity": Term(torch.stack(totals).sum(), self.normalize)}

    def _total(self, model: nn.Module, group: Mapping[str, Any]) -> Tensor:
        """The sum over a group of latents of one shape [examples, channels, ...]."""
        dtype = next(model.parameters()).dtype
        latents, noise = group["latents"].to(dtype), group["noise"].to(dtype)
        time = group["time"].to(dtype).view(-1, *[1] * (latents.dim() - 1))
        noisy = (1 - time) * latents + time * noise
        velocity = model(
            hidden_states=_concat_channels(model, noisy, condition=group.get("condition")),
            timestep=group["time"].to(dtype) * _NUM_TIMESTEPS,
            return_dict=False,
            **_model_kwargs(model, group["model_kwargs"], examples=len(latents), dtype=dtype),
        )[0]
        velocity = at_least_float32(velocity)
        errors = (velocity - (noise - latents).to(velocity)).square().flatten(1)
        by_example = errors.mean(1) if self.normalize == "example" else errors.sum(1)
        total: Tensor = (by_example * group["weights"].to(by_example)).sum()
        return total


def _concat_channels(model: Any, noisy: Tensor, *, condition: Tensor | None) -> Tensor:
    """The channels that the model takes: noisy latents, the condition, and zeros for the rest."""
    parts = [noisy] if condition is None else [noisy, condition.to(noisy)]
    missing = model.config["in_channels"] - sum(part.shape[1] for part in parts)
    if missing > 0:
        parts.append(noisy.new_zeros(len(noisy), missing, *noisy.shape[2:]))
    return torch.cat(parts, dim=1)


def _model_kwargs(
    model: Any, conditioning: Mapping[str, Tensor], *, examples: int, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The model's conditioning [examples, ...] by argument, masks of text as they are.

    HunyuanVideo-1.5 requires arguments that the data may lack. Its pipeline gives zeros for an
    image that is not there, and masks a second text out; so does this.
    """
    kwargs = {
        name: value if name.startswith("encoder_attention") else value.to(dtype)
        for name, value in conditioning.items()
    }
    if type(model).__name__ != "HunyuanVideo15Transformer3DModel":
        return kwargs
    text = kwargs["encoder_hidden_states"]
    shapes = {
        "encoder_hidden_states_2": (1, model.config["text_embed_2_dim"]),
        "image_embeds": (1, model.config["image_embed_dim"]),
    }
    for name, shape in shapes.items():
        kwargs.setdefault(name, text.new_zeros(examples, *shape))
    mask = torch.zeros(examples, 1, dtype=torch.long, device=text.device)
    kwargs.setdefault("encoder_attention_mask_2", mask)
    return kwargs
