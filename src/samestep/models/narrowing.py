"""May a model's last layer be computed at the targets alone? Asked of the model."""

from typing import Any

import torch
from torch import Tensor, nn

from samestep import last_layer
from samestep.data.collate import Padding, collate, to_device
from samestep.data.examples import Example
from samestep.lm_head import model_inputs
from samestep.models.dropout import ExampleDropout
from samestep.models.packing import LOW_PRECISION_TOLERANCE, TOLERANCE
from samestep.models.routers import routers


def cut_last_layer(model: Any, padding: Padding) -> bool:
    """Compute a decoder's last layer at the targets alone wherever a loss says which they are.

    Two short sequences are run with and without. Only a model whose logits agree at the targets,
    and show elsewhere that the cut took place, is changed.

    Args:
        model: A causal language model of transformers, plain or wrapped by PEFT; changed in place.
        padding: The layout that it is trained in.

    Returns:
        Whether it was cut. Never with routers, whose losses see every token, nor with dropout in
        the layer, which is drawn for whole sequences.
    """
    layer = _last_layer(model)
    if layer is None or not last_layer.parts(layer) or routers(model):
        return False
    if any(isinstance(m, ExampleDropout | nn.Dropout) and m.p > 0 for m in layer.modules()):
        return False
    undo = last_layer.cut(layer, model.get_output_embeddings())
    if not _agrees(model, padding):
        undo()
        return False
    return True


def _last_layer(model: Any) -> nn.Module | None:
    """The last of a decoder's layers, if it is built like most of transformers'."""
    layers = dict(model.get_decoder().named_children()).get("layers")
    if not isinstance(layers, nn.ModuleList):
        return None
    return layers[-1] if last_layer.ATTENTION in dict(layers[-1].named_children()) else None


@torch.no_grad()
def _agrees(model: Any, padding: Padding) -> bool:
    vocabulary = model.get_input_embeddings().num_embeddings
    sequences = [torch.tensor(ids) % vocabulary for ids in ([3, 1, 4, 1], [1, 5, 9, 2, 6])]
    examples = [Example(ids, ids.where(torch.arange(len(ids)) > 2, -100)) for ids in sequences]
    micro = to_device(collate(examples, padding=padding), model.device)
    at, training = micro["target_positions"], model.training
    model.eval()
    try:
        whole, narrow = (
            model(**model_inputs(micro), **more).logits.flatten(0, 1)
            for more in ({}, {last_layer.ARGUMENT: at})
        )
    except (TypeError, ValueError, RuntimeError):
        return False
    finally:
        model.train(training)
    return _close(whole[at], narrow[at]) and not _close(whole, narrow)


def _close(one: Tensor, other: Tensor) -> bool:
    tolerance = TOLERANCE.get(one.dtype, LOW_PRECISION_TOLERANCE)
    return bool((one - other).norm() <= tolerance * one.norm())
