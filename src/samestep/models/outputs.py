"""What a model of transformers outputs for a micro-batch, by token or by sequence, in any layout.

Losses and the choice of a layout (`samestep.models.probes.choose_padding`) read the same outputs.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from samestep.engine.targets import sequence_spans
from samestep.models.lora import unwrap_peft

Pooling = Literal["mean", "last", "first"]
"""How the hidden states of a sequence become one vector."""

_known_configs: WeakKeyDictionary[nn.Module, list[Any]] = WeakKeyDictionary()

_NOT_MODEL_INPUTS = (
    "labels", "example_ids", "example_weights", "token_weights", "fields", "mismatched", "spans",
    "target_positions",
)  # fmt: skip
"""What a micro-batch holds beside the model's inputs."""


def model_inputs(micro_batch: Mapping[str, Any]) -> dict[str, Any]:
    """What of a micro-batch goes into the model: all but labels, weights, ids and fields.

    Args:
        micro_batch: A micro-batch of `samestep.data.collate.collate_examples`, or another mapping.

    Returns:
        The tensors that the model is called with.

    Examples:
        >>> from samestep import model_inputs
        >>> micro_batch = {"input_ids": [[5, 6, 7]], "labels": [[-100, 6, 7]], "example_ids": [0]}
        >>> model_inputs(micro_batch)
        {'input_ids': [[5, 6, 7]]}
    """
    return {key: micro_batch[key] for key in micro_batch if key not in _NOT_MODEL_INPUTS}


@contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """A context in which a model keeps no keys and values for a next token, unless it is asked to.

    The configs of decoders ask for them by default. Nothing reads them unless it generates; each
    layer copies its keys and values into them, and compiled layers would be compiled one by one,
    since each looks at its own part of them.

    Args:
        model: A model of transformers, plain or wrapped; others stay as they are.

    Examples:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1)
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=1))
        >>> with without_cache(model):
        ...     outputs = model(input_ids=torch.tensor([[1, 2]]))
        >>> list(outputs), model.config.use_cache
        (['logits'], True)
    """
    asking = [config for config in _configs(model) if config.use_cache]
    for config in asking:
        config.use_cache = False
    try:
        yield
    finally:
        for config in asking:
            config.use_cache = True


def _configs(model: nn.Module) -> list[Any]:
    """The configs of a model and its parts that say whether there is a cache, looked for once."""
    if model not in _known_configs:
        parts = (module.__dict__.get("config") for module in model.modules())
        found = {id(one): one for one in parts if hasattr(one, "use_cache")}
        _known_configs[model] = list(found.values())
    return _known_configs[model]


def run_model(model: nn.Module, micro_batch: Mapping[str, Any], **more: Any) -> Any:
    """What a model of transformers gives for a micro-batch, without the cache of generation.

    Args:
        model: The model.
        micro_batch: As for `model_inputs`.
        **more: Further arguments of the model.

    Returns:
        Its outputs.
    """
    with without_cache(model):
        return model(**model_inputs(micro_batch), **more)


def sequence_logits(model: Any, micro_batch: Mapping[str, Any]) -> Tensor:
    """The class scores of each sequence.

    Decoders of transformers score a sequence at its last token, which they find by the pad id. Here
    the layout of the micro-batch says where it is, so packs work, and a pad token that is also the
    end-of-sequence token does no harm. Encoders are run as they are, a row a sequence.

    Args:
        model: A ``...ForSequenceClassification`` of transformers, plain or wrapped by PEFT.
        micro_batch: Of `samestep.data.collate.collate_examples`, or ``input_ids`` alone.

    Returns:
        Logits [sequences, classes], with a graph.

    Examples:
        >>> from transformers import LlamaConfig, LlamaForSequenceClassification
        >>> sizes = dict(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1)
        >>> config = LlamaConfig(**sizes, num_attention_heads=1, num_labels=3)
        >>> model = LlamaForSequenceClassification(config)
        >>> sequence_logits(model, {"input_ids": torch.tensor([[1, 2], [3, 4]])}).shape
        torch.Size([2, 3])
    """
    unwrapped = unwrap_peft(model)
    head = dict(unwrapped.named_children()).get("score")
    if head is None:
        logits: Tensor = run_model(model, micro_batch).logits
        return logits
    states = _backbone_states(unwrapped, micro_batch)
    scores: Tensor = head(states.flatten(0, 1)[_last_positions(micro_batch)])
    return scores


def span_logits(model: nn.Module, micro_batch: Mapping[str, Any]) -> Tensor:
    """The scores of each token as the start and as the end of an answer.

    Args:
        model: A ``...ForQuestionAnswering`` of transformers, plain or wrapped by PEFT.
        micro_batch: Of `samestep.data.collate.collate_examples`, or ``input_ids`` alone.

    Returns:
        Logits [rows, length, 2], with a graph.
    """
    outputs = run_model(model, micro_batch)
    return torch.stack([outputs.start_logits, outputs.end_logits], dim=-1)


def sequence_embeddings(
    model: nn.Module, micro_batch: Mapping[str, Any], *, pooling: Pooling
) -> Tensor:
    """One vector a sequence, pooled from the last hidden states.

    Args:
        model: A model of transformers without a head, plain or wrapped by PEFT.
        micro_batch: Of `samestep.data.collate.collate_examples`, or ``input_ids`` alone.
        pooling: "mean" over the sequence's tokens, or the state of its "last" or "first" token.

    Returns:
        Vectors [sequences, width], with a graph.
    """
    states = _backbone_states(unwrap_peft(model), micro_batch)
    if pooling == "last":
        return states.flatten(0, 1)[_last_positions(micro_batch)]
    if pooling == "first":
        return torch.stack([states[row, span.start] for row, span in sequence_spans(micro_batch)])
    return torch.stack([states[row, span].mean(dim=0) for row, span in sequence_spans(micro_batch)])


def _backbone_states(unwrapped: Any, micro_batch: Mapping[str, Any]) -> Tensor:
    """The last hidden states of a model without its head [rows, length, width]."""
    prefix: str = unwrapped.base_model_prefix
    # AutoModel gives the backbone itself, which has no child of its own prefix.
    backbone = dict(unwrapped.named_children()).get(prefix, unwrapped)
    states: Tensor = run_model(backbone, micro_batch).last_hidden_state
    return states


def _last_positions(micro_batch: Mapping[str, Any]) -> Tensor:
    """Where each sequence ends, in the flattened rows [sequences]."""
    ids: Tensor = micro_batch["input_ids"]
    length = ids.shape[1]
    ends = [row * length + span.stop - 1 for row, span in sequence_spans(micro_batch)]
    return torch.tensor(ends).to(ids.device, non_blocking=True)
