"""Settings of adapters, all of them PEFT's: LoRA, and what may be done otherwise in it."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from samestep.train.settings.optimization import check_patterns


def _one_or_several(value: Any) -> Any:
    """A name by itself is a list of one."""
    return (value,) if isinstance(value, str) else value


Names = Annotated[tuple[str, ...], BeforeValidator(_one_or_several)]
Patterns = Annotated[
    tuple[str, ...], BeforeValidator(_one_or_several), AfterValidator(check_patterns)
]


class AdapterFields(BaseModel):
    """Which adapters train in the place of all weights."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    lora_rank: int | None = Field(default=None, ge=1)
    """Train LoRA adapters of this rank instead of all weights."""
    lora_alpha: float | None = Field(default=None, gt=0)
    """LoRA's scale; by default twice the rank."""
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout before the adapters; its masks belong to the examples, so the step stays exact."""
    lora_targets: Patterns = ("all-linear",)
    """Modules that get adapters: ends of their names, or regular expressions of the whole name."""
    target_parameters: Names = ()
    """Parameters that get adapters, such as the stacked weights of experts: ends of their names."""
    use_rslora: bool = False
    """Scale adapters by alpha / sqrt(rank) (rsLoRA)."""
    use_dora: bool = False
    """Learn the length of the weights' columns apart from their direction (DoRA)."""
    loraplus_lr_ratio: float | None = Field(default=None, gt=0)
    """How many times the learning rate of A that of B is (LoRA+); by default both are the same."""
    modules_to_save: Names = ()
    """Modules that train entirely beside the adapters, such as lm_head: ends of their names."""
    trainable_token_indices: tuple[int, ...] = ()
    """Tokens whose embeddings train beside the adapters, by their ids."""
    quantization: Literal["4bit", "8bit"] | None = None
    """Hold the weights under the adapters in 4 bits (NF4) or 8, by bitsandbytes (QLoRA)."""
    merge: bool = False
    """Fold the adapters into the saved model."""


ADAPTERS = tuple(AdapterFields.model_fields)
"""The names of these settings."""


def adapter_problems(settings: AdapterFields) -> list[str]:
    """Contradictions between these settings, a line each.

    Args:
        settings: Each field right by itself.
    """
    defaults = AdapterFields.model_fields
    if settings.lora_rank is None:
        given = [name for name in ADAPTERS if getattr(settings, name) != defaults[name].default]
        return [f"{name} is given without lora_rank" for name in given]
    problems = []
    if settings.target_parameters and settings.lora_dropout:
        problems.append("target_parameters: PEFT has no dropout there; leave lora_dropout out")
    if settings.target_parameters and settings.use_dora:
        problems.append("target_parameters: PEFT has no DoRA there; leave use_dora out")
    if settings.modules_to_save and settings.trainable_token_indices:
        embeddings = [name for name in settings.modules_to_save if "embed" in name]
        problems += [
            f"trainable_token_indices and modules_to_save {name} train the same: keep one"
            for name in embeddings
        ]
    return problems
