"""Can a model's sequences share a micro-batch without seeing each other? Asked of the model."""

import logging
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from samestep.data.collate import Padding, collate_examples, to_device
from samestep.data.examples import Example
from samestep.engine.modes import eval_mode
from samestep.errors import ConfigError
from samestep.kernels import packed_attention
from samestep.models import lm_head
from samestep.models.dropout import ExampleDropout
from samestep.models.lora import num_embeddings
from samestep.models.outputs import run_model
from samestep.models.routers import routers
from samestep.utils.agreement import compare_outputs, compare_ways

log = logging.getLogger("samestep")

_LONGEST_PROBE = 520
"""Tokens of a sequence that is run to ask about a sliding window, at most."""

Outputs = Callable[[Any, dict[str, Any]], Tensor]
"""What a model makes of a micro-batch: [rows, length, ...] by token, or [sequences, width]."""


def logits_of(model: Any, micro: dict[str, Any]) -> Tensor:
    """The logits that a model gives by itself."""
    logits: Tensor = run_model(model, micro).logits
    return logits


def choose_padding(
    model: Any, wanted: Literal["auto"] | Padding, outputs: Outputs = logits_of
) -> Padding:
    """The layout of micro-batches for a model, and the model's attention set to serve it.

    Two short sequences are run together and each alone. Only a layout in which they agree up to
    the model's own rounding noise is taken (`samestep.utils.agreement`), so a model that leaks
    between sequences is never trained in that layout.

    Args:
        model: A transformers model; its attention implementation is changed.
        wanted: The layout asked for; "auto" prefers none to right.
        outputs: What must agree.

    Returns:
        The layout.

    Raises:
        ConfigError: The layout asked for, or every one, lets sequences see each other.
    """
    candidates: tuple[Padding, ...] = ("none", "right") if wanted == "auto" else (wanted,)
    reasons: list[str] = []
    found = model.config._attn_implementation
    plain = "sdpa" if found == packed_attention.NAME else found
    for padding in candidates:
        reason = _why_not(model, padding, plain, outputs)
        if reason is None:
            if reasons:
                log.warning("padding to the right, which is slower: %s", "; ".join(reasons))
            return padding
        what = "cannot take packs" if padding == "none" else f"cannot be padded to the {padding}"
        reasons.append(f"{type(model).__name__} {what} ({reason})")
    raise ConfigError(
        f"{type(model).__name__} cannot hold several sequences in a micro-batch exactly: "
        + "; ".join(reasons)
        + (". Try padding 'auto'" if wanted != "auto" else ". Use micro_batch 1")
    )


@torch.no_grad()
def _why_not(model: Any, padding: Padding, plain: str, outputs: Outputs) -> str | None:
    vocabulary = num_embeddings(model)
    lengths = 3, _beyond_the_window(model)
    sequences = [(torch.arange(length) * 7 + 3) % vocabulary for length in lengths]
    micro = collate_examples([Example(ids, ids) for ids in sequences], padding=padding)
    training = model.training

    def alone() -> list[Tensor]:
        if model.config._attn_implementation != plain:
            model.set_attn_implementation(plain)
        return [outputs(model, {"input_ids": one[None].to(model.device)})[0] for one in sequences]

    def together() -> list[Tensor]:
        if padding == "none":
            packed_attention.register()
            model.set_attn_implementation(packed_attention.NAME)
        found = _apart(outputs(model, to_device(micro, model.device)), micro)
        if len(found) != len(sequences):
            raise ConfigError(f"{len(found)} outputs for {len(sequences)} sequences")
        return found

    model.eval()
    try:
        found = compare_ways(alone, together)
    except (ConfigError, TypeError, ValueError, RuntimeError) as error:
        first = str(error).strip().split("\n")[0]
        return first if isinstance(error, ConfigError) else f"{type(error).__name__}: {first}"
    finally:
        model.train(training)
    if found.holds:
        return None
    _check_answers(model, alone)
    return (
        f"outputs change by {found.difference:.1e} beside a neighbour, by {found.noise:.1e} from "
        "rounding"
    )


def _check_answers(model: Any, alone: Callable[[], list[Tensor]]) -> None:
    """Refuse a model whose outputs tell nothing, of which nothing else can be said.

    Raises:
        ConfigError: They are not finite, or the same whatever the input is.
    """
    with eval_mode(model):
        answers = torch.cat([output.flatten().float() for output in alone()])
    if not answers.isfinite().all():
        raise ConfigError(
            f"model: the outputs of {type(model).__name__} are not finite in {model.dtype}: its "
            "weights are damaged, or too large for this precision"
        )
    if answers.numel() and bool((answers == answers[0]).all()):
        raise ConfigError(
            f"model: the outputs of {type(model).__name__} are all {float(answers[0]):g}, whatever "
            "it reads: are its weights all 0?"
        )


def _beyond_the_window(model: Any) -> int:
    """Tokens of a sequence that is longer than a model's sliding window, if that is not wide."""
    config = model.config.get_text_config().to_dict()
    window = config.get("sliding_window") or 0
    positions = config.get("max_position_embeddings") or _LONGEST_PROBE
    longer = window + 2 if isinstance(window, int) else 0
    return longer if 5 < longer <= min(positions, _LONGEST_PROBE) else 5


def _apart(joint: Tensor, micro: dict[str, Any]) -> list[Tensor]:
    """The output of each sequence."""
    if joint.dim() == 2:
        return list(joint)
    if "cu_seq_lens_q" in micro:
        return list(joint[0].split(micro["cu_seq_lens_q"].diff().tolist()))
    mask = micro["attention_mask"].bool().to(joint.device)
    return [row[kept] for row, kept in zip(joint, mask, strict=True)]


def cut_last_layer(model: Any, padding: Padding) -> bool:
    """Compute a decoder's last layer at the targets alone wherever a loss says which they are.

    Two short sequences are run with and without. Only a model whose logits agree at the targets up
    to its own rounding noise (`samestep.utils.agreement`), and show elsewhere that the cut took
    place, is changed.

    Args:
        model: A causal language model of transformers, plain or wrapped by PEFT; changed in place.
        padding: The layout that it is trained in.

    Returns:
        Whether it was cut. Never with routers, whose losses see every token, nor with dropout in
        the layer, which is drawn for whole sequences.
    """
    layer = _last_layer(model)
    if layer is None or not lm_head.row_wise_modules(layer) or routers(model):
        return False
    if any(isinstance(m, ExampleDropout | nn.Dropout) and m.p > 0 for m in layer.modules()):
        return False
    undo = lm_head.install_hooks(layer, model.get_output_embeddings())
    if not _agrees(model, padding):
        undo()
        return False
    return True


def _last_layer(model: Any) -> nn.Module | None:
    """The last of a decoder's layers, if it is built like most of transformers'."""
    layers = dict(model.get_decoder().named_children()).get("layers")
    if not isinstance(layers, nn.ModuleList):
        return None
    return layers[-1] if lm_head.ATTENTION in dict(layers[-1].named_children()) else None


@torch.no_grad()
def _agrees(model: Any, padding: Padding) -> bool:
    vocabulary = num_embeddings(model)
    sequences = [torch.tensor(ids) % vocabulary for ids in ([3, 1, 4, 1], [1, 5, 9, 2, 6])]
    examples = [Example(ids, ids.where(torch.arange(len(ids)) > 2, -100)) for ids in sequences]
    micro = to_device(collate_examples(examples, padding=padding), model.device)
    at, training = micro["target_positions"], model.training

    def logits(**more: Tensor) -> list[Tensor]:
        found = run_model(model, micro, **more).logits.flatten(0, 1)
        return [found[at], found]

    model.eval()
    try:
        at_targets, everywhere = compare_outputs(logits, lambda: logits(**{lm_head.ARGUMENT: at}))
    except (TypeError, ValueError, RuntimeError):
        return False
    finally:
        model.train(training)
    return at_targets.holds and not everywhere.holds
