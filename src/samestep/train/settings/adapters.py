"""Settings of adapters, all of them PEFT's: LoRA, and what may be done otherwise in it."""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from samestep.errors import ConfigError
from samestep.train.settings.optimization import check_patterns
from samestep.utils.adapter_folder import is_adapter, read_adapter


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

    model_adapter: Literal["continue", "merge"] = "continue"
    """Where --model is a folder of adapters: they train on, on their base; or they are folded into
    it first, and what trains begins from there."""
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


AnySettings = TypeVar("AnySettings", bound=AdapterFields)

_OF_PEFT = {
    "lora_rank": "r",
    "lora_alpha": "lora_alpha",
    "lora_targets": "target_modules",
    "target_parameters": "target_parameters",
    "use_rslora": "use_rslora",
    "use_dora": "use_dora",
    "modules_to_save": "modules_to_save",
    "trainable_token_indices": "trainable_token_indices",
}
"""Settings that a saved adapter has already, and what PEFT calls them."""


def continued_adapter(settings: AdapterFields, model: str) -> str | None:
    """The folder of the adapters that train on.

    Args:
        settings: ``model_adapter``.
        model: The setting of this name.

    Returns:
        The folder; None where the model is none, or is merged first.
    """
    return model if settings.model_adapter == "continue" and is_adapter(model) else None


def with_saved_adapter(
    settings: AnySettings, model: str, init: str
) -> tuple[AnySettings, list[str]]:
    """The settings with what a saved adapter that trains on says of itself.

    Args:
        settings: Each field right by itself.
        model: The setting of this name.
        init: The setting of this name.

    Returns:
        The settings; and lines of what contradicts the adapter, or cannot be read of it.
    """
    if not is_adapter(model):
        given = settings.model_adapter != "continue"
        return settings, [f"model_adapter: {model} is no folder of adapters"] if given else []
    problems = ["init: random, where adapters need the base that they were trained on"]
    problems = problems if init == "random" else []
    try:
        saved = read_adapter(model)
    except ConfigError as error:
        return settings, [*problems, str(error)]
    if settings.model_adapter == "merge":
        return settings, problems
    known = {name: _setting(name, saved.get(key)) for name, key in _OF_PEFT.items()}
    for name in known.keys() & settings.model_fields_set:
        given, has = _setting(name, getattr(settings, name)), known[name]
        if given != has:
            problems.append(
                f"{name}: {_shown(given)}, but the adapter in {model} has {_shown(has)}: leave it "
                "out, or fold that adapter in and train a new one (model_adapter merge)"
            )
    if "lora_dropout" not in settings.model_fields_set:
        known["lora_dropout"] = float(saved.get("lora_dropout") or 0)
    return settings.model_copy(update=known), sorted(problems)


def _setting(name: str, value: Any) -> Any:
    """A value of PEFT's as the setting has it; lists whose order says nothing are sorted."""
    default = AdapterFields.model_fields[name].default
    if isinstance(default, tuple):
        if isinstance(value, dict):  # tokens by the module whose rows they are
            value = {token for tokens in value.values() for token in tokens}
        given = (value,) if isinstance(value, str) else value or ()
        return tuple(sorted(given))
    if name == "lora_alpha":
        return None if value is None else float(value)
    return default if value is None else value


def _shown(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


ADAPTERS = tuple(AdapterFields.model_fields)
"""The names of these settings."""


def adapter_problems(settings: AdapterFields) -> list[str]:
    """Contradictions between these settings, a line each.

    Args:
        settings: Each field right by itself.
    """
    defaults = AdapterFields.model_fields
    if settings.lora_rank is None:
        names = [name for name in ADAPTERS if name != "model_adapter"]
        given = [name for name in names if getattr(settings, name) != defaults[name].default]
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
