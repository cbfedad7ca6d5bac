"""LoRA adapters, by PEFT."""

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import nn

from samestep.errors import ConfigError
from samestep.models.quantized import quantized_layers, quiet_bitsandbytes

_TASK_HEADS = {"TOKEN_CLS": ["classifier", "score"], "QUESTION_ANS": ["qa_outputs"]}
"""Heads by PEFT's task type. PEFT trains them entirely; given adapters as well, it would fail."""


_MARKS = frozenset(r"\^$*+?{}[]()|")
"""Characters that a regular expression has, and the name of a module has not."""


@dataclass(frozen=True)
class LoraVariant:
    """What is done otherwise than in LoRA as its paper has it; each is PEFT's.

    Attributes:
        rslora: Scale by alpha / sqrt(rank) instead of alpha / rank (rsLoRA, arXiv:2312.03732).
        dora: Learn the length of each weight's columns apart from their direction (DoRA,
            arXiv:2402.09353).
        modules_to_save: Names of modules that train entirely, and are saved beside the adapters.
        tokens: Ids of tokens whose embeddings train, or by the name of a module those whose rows
            in it do.
        parameters: Names of parameters that get an adapter, such as the stacked weights of experts,
            which are no modules.
    """

    rslora: bool = False
    dora: bool = False
    modules_to_save: tuple[str, ...] = ()
    tokens: tuple[int, ...] | Mapping[str, Sequence[int]] = ()
    parameters: tuple[str, ...] = ()


def load_peft() -> Any:
    """The package peft: heavy, and needed for adapters alone; with it comes bitsandbytes."""
    with quiet_bitsandbytes():
        return import_module("peft")


def add_lora(
    model: Any,
    rank: int,
    *,
    alpha: float,
    dropout: float,
    targets: Sequence[str],
    seed: int,
    task: str = "CAUSAL_LM",
    variant: LoraVariant | None = None,
) -> Any:
    """Add LoRA adapters (arXiv:2106.09685) to a model; only they train, and a classifier's head.

    Args:
        model: A transformers model; changed in place.
        rank: Of the adapters.
        alpha: The adapters' output is scaled by alpha / rank.
        dropout: Probability of dropout before the adapters.
        targets: Names of the modules that get an adapter, or regular expressions of which one is
            the whole of a name; ("all-linear",) means every linear layer but the head.
        seed: Of the adapters' random weights.
        task: PEFT's task type; the heads of classifiers train too.
        variant: What is done otherwise.

    Returns:
        A PEFT model around it.

    Raises:
        ConfigError: No module has such a name, or no token such an id.
    """
    peft = load_peft()
    torch.manual_seed(seed)
    variant = variant or LoraVariant()
    _check_variant(model, variant)
    tied = bool(getattr(model.config, "tie_word_embeddings", False))
    try:
        with quiet_peft():
            return peft.get_peft_model(
                model,
                peft.LoraConfig(
                    r=rank,
                    lora_alpha=alpha,
                    lora_dropout=dropout,
                    target_modules=_target_modules(targets),
                    exclude_modules=_TASK_HEADS.get(task),
                    task_type=task,
                    use_rslora=variant.rslora,
                    use_dora=variant.dora,
                    modules_to_save=list(variant.modules_to_save) or None,
                    trainable_token_indices=_token_rows(variant),
                    target_parameters=list(variant.parameters) or None,
                    # An embedding that trains entirely stays one with the head.
                    ensure_weight_tying=tied and bool(variant.modules_to_save),
                ),
            )
    except ValueError as error:
        raise ConfigError(f"lora_targets: {error}") from error


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Without warnings of PEFT's of no use to users.

    It asks for gradient checkpointing by a former name, and says that it saves new rows.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Setting `save_embedding_layers`")
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`")
        yield


def _token_rows(variant: LoraVariant) -> list[int] | dict[str, list[int]] | None:
    """PEFT's ``trainable_token_indices``."""
    if isinstance(variant.tokens, Mapping):
        return {name: sorted(set(rows)) for name, rows in variant.tokens.items()} or None
    return sorted(set(variant.tokens)) or None


def _target_modules(targets: Sequence[str]) -> str | list[str]:
    """PEFT's ``target_modules``: names, or one regular expression for all if there is any."""
    if tuple(targets) == ("all-linear",):
        return "all-linear"
    if not any(_MARKS & set(target) for target in targets):
        return list(targets)
    patterns = [
        target if _MARKS & set(target) else rf"(?:.*\.)?{re.escape(target)}" for target in targets
    ]
    return "|".join(f"(?:{pattern})" for pattern in patterns)


def _check_variant(model: Any, variant: LoraVariant) -> None:
    """Refuse names of modules and parameters that are not there, and tokens beyond the vocabulary.

    PEFT leaves such names out in silence.
    """
    named = {
        "modules_to_save": (variant.modules_to_save, [name for name, _ in model.named_modules()]),
        "target_parameters": (variant.parameters, [name for name, _ in model.named_parameters()]),
    }
    problems = [
        f"{setting}: nothing is called {name!r} (names are such as "
        f"{', '.join(known[1 :: max(1, len(known) // 6)])})"
        for setting, (wanted, known) in named.items()
        for name in wanted
        if not any(f".{each}".endswith(f".{name}") for each in known)
    ]
    size = num_embeddings(model) if variant.tokens else 0
    rows = _token_rows(variant) or []
    tokens = {row for each in rows.values() for row in each} if isinstance(rows, dict) else rows
    beyond = sorted(token for token in tokens if not 0 <= token < size)
    if beyond:
        problems.append(
            f"trainable_token_indices: {', '.join(map(str, beyond))}: the model has {size} "
            f"embeddings, 0 to {size - 1}"
        )
    few_bits = list(quantized_layers(model)) if variant.modules_to_save else []
    problems += [
        f"modules_to_save: {name!r} holds quantised weights ({layer}), which cannot train"
        for name in variant.modules_to_save
        for layer in [n for n in few_bits if f".{name}." in f".{n}."][:1]
    ]
    if problems:
        raise ConfigError("\n".join(problems))


def num_embeddings(model: Any) -> int:
    """The number of input embeddings of a model, also where adapters have wrapped them.

    Args:
        model: A model of transformers, plain or wrapped by PEFT.

    Returns:
        How many tokens it can read.
    """
    embeddings = model.get_input_embeddings()
    inner = getattr(embeddings, "original_module", embeddings)
    return int(inner.num_embeddings)


def unwrap_peft(model: nn.Module) -> Any:
    """The model of transformers inside a PEFT model; its adapters stay active.

    Args:
        model: A model of transformers, plain or wrapped by PEFT.

    Returns:
        The model of transformers; ``model`` itself if it is not wrapped.
    """
    wrapped = dict(model.named_children()).get("base_model")
    return model if wrapped is None else wrapped.model
