"""Dropout of a trainer's model that draws by the row: the same masks however a window is cut.

A row is known by its tokens, so that the step needs no numbers of rows: rows that are the same drop
the same in a step.
"""

import pickle
import random
from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from samestep.errors import ConfigError, StepError
from samestep.hf.proof import loss_of, undisturbed
from samestep.hf.units import Batch, base_model
from samestep.models.dropout import example_dropouts, example_key, replace_dropout, set_keys

Spans = list[tuple[int, slice]]


class KeyedDropout:
    """The dropout of a trainer's model, keyed by seed, step, row, position and layer.

    Args:
        trainer: Every ``nn.Dropout`` of its model is replaced.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._model: nn.Module = base_model(trainer)
        replace_dropout(trainer.model)
        self._unchecked = True

    def check(self, batches: Sequence[Batch]) -> None:
        """Refuse a model that draws random numbers in other places; asked once, of one forward.

        Args:
            batches: Of this rank.

        Raises:
            ConfigError: It does.
        """
        if not self._unchecked:
            return
        self._unchecked = False
        for batch in batches[:1]:
            with undisturbed(self._trainer, training=True), torch.random.fork_rng():
                before = _generators(self._trainer.args.device)
                loss_of(self._trainer, batch)
                after = _generators(self._trainer.args.device)
            if before != after:
                raise ConfigError(self._complaint())

    def _complaint(self) -> str:
        config = getattr(self._model, "config", None)
        fields = config.to_dict() if config is not None else {}
        named = [
            f"{name}={value}"
            for name, value in sorted(fields.items())
            if ("drop" in name or "jitter" in name or name.endswith("pdrop")) and value
        ]
        among = f" ({', '.join(named)})" if named else ""
        return (
            "key_dropout=True: the model draws random numbers beside its nn.Dropout modules, such "
            f"as in attention or whole layers: set those of its configuration to 0{among}"
        )

    def set(self, inputs: Batch) -> None:
        """Set the rows of the next forward.

        Args:
            inputs: The micro-batch.

        Raises:
            StepError: It has no tokens by which its rows are known.
        """
        layers = example_dropouts(self._trainer.model)
        if not layers:
            return
        ids, spans = _rows(inputs, getattr(self._model, "config", None))
        seed, step = self._trainer.args.seed, self._trainer.state.global_step
        keys = [example_key(seed, step, _digest(ids[row, span])) for row, span in spans]
        set_keys(layers, ids, spans=spans, keys=keys)


def _rows(inputs: Batch, config: Any) -> tuple[Tensor, Spans]:
    """The tokens of a micro-batch [rows, length], and where each sequence stands, no padding."""
    ids = inputs.get("input_ids")
    if not isinstance(ids, Tensor) or ids.dim() < 2:
        raise StepError(
            f"key_dropout=True knows a row by its input_ids [rows, length], and this micro-batch "
            f"has {', '.join(inputs)}: set the model's dropout to 0"
        )
    ids = ids.flatten(0, -2)  # of multiple choice [rows, choices, length]
    mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
    if isinstance(mask, Tensor) and mask.dim() >= 2 and mask.shape[-1] == ids.shape[-1]:
        mask = mask.flatten(0, -2) != 0
    elif isinstance(positions, Tensor) and positions.shape == ids.shape:
        return ids, _packed(positions)
    elif getattr(config, "pad_token_id", None) is not None:
        mask = ids != config.pad_token_id
    else:
        mask = torch.ones_like(ids)
    return ids, _filled(mask)


def _filled(mask: Tensor) -> Spans:
    """From the first to the last position that a mask lets pass, row by row."""
    found = []
    for row, line in enumerate(mask.tolist()):
        places = [at for at, passes in enumerate(line) if passes]
        found.append((row, slice(places[0], places[-1] + 1) if places else slice(0, 0)))
    return found


def _packed(positions: Tensor) -> Spans:
    """The sequences of packs, each of which counts its positions from 0."""
    found = []
    for row, line in enumerate(positions.tolist()):
        starts = [at for at, position in enumerate(line) if position == 0 or at == 0]
        found += [
            (row, slice(start, stop))
            for start, stop in zip(starts, [*starts[1:], len(line)], strict=True)
        ]
    return found


def _digest(tokens: Tensor) -> int:
    return int(blake2b(repr(tokens.tolist()).encode(), digest_size=16).hexdigest(), 16)


def _generators(device: torch.device) -> bytes:
    """The states of the random number generators that a model may draw from."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    found = random.getstate(), np.random.get_state(), [state.numpy() for state in states]
    return pickle.dumps(found)
