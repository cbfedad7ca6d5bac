"""Sampling completions with noise that belongs to the completion, not to the order of computation.

A token is the argmax of logits / temperature + Gumbel noise in float64, which draws it from the
softmax. The noise of a token is a hash of (seed, step, row, completion, position, token). So a
completion is a function of the weights and of these; where two computations of the logits differ by
rounding, another token comes out only if two of the sums lie within that rounding of each other.
(With a stream of random numbers every token after the first difference would be another one.)
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList

from samestep.engine.oom import is_out_of_memory
from samestep.errors import OutOfMemoryError
from samestep.models.dropout import hash_

_MASK = 2**32 - 1
_GOLDEN = 0x9E3779B9  # as in models/dropout.py
_SAMPLING = 0x73616D70
"""Part of every key, so that no other use of (seed, step, row) draws the same numbers."""


@dataclass(frozen=True)
class Completion:
    """What was written after a prompt.

    Attributes:
        ids: The tokens, the one that ended it among them.
        ended: Whether such a token came, before there were too many.
        log_p: The log-probability of each token where it was sampled; empty: that of the policy.
    """

    ids: tuple[int, ...]
    ended: bool
    log_p: tuple[float, ...] = ()


def sampling_keys(seed: int, step: int, completions: Sequence[tuple[int, int]]) -> Tensor:
    """The keys of some completions.

    Args:
        seed: The run's seed.
        step: The step's number.
        completions: Of each the row of its prompt in the source, and which of that row's it is.

    Returns:
        Two 32-bit numbers for each completion [2, completions], int64.

    Examples:
        >>> keys = sampling_keys(0, 1, [(5, 0), (5, 1), (7, 0)])
        >>> torch.equal(keys[:, 2:], sampling_keys(0, 1, [(7, 0)]))
        True
    """
    words = [
        np.random.SeedSequence([seed, step, row, sample, _SAMPLING]).generate_state(2, np.uint32)
        for row, sample in completions
    ]
    return torch.from_numpy(np.stack(words, axis=1).astype(np.int64))


def gumbel_noise(keys: Tensor, position: int, *, vocabulary: int) -> Tensor:
    """The noise of every token at a position of some completions.

    Args:
        keys: Of `sampling_keys` [2, completions].
        position: In the completion, from 0.
        vocabulary: How many tokens there are.

    Returns:
        Independent numbers of the standard Gumbel distribution [completions, vocabulary], float64.

    Examples:
        >>> noise = gumbel_noise(sampling_keys(0, 0, [(3, 0)]), 0, vocabulary=100_000)
        >>> abs(float(noise.mean()) - 0.5772) < 0.02  # Euler's constant
        True
    """
    mixed = hash_(keys ^ hash_(torch.full_like(keys, position + 1)))
    tokens = torch.arange(vocabulary, device=keys.device) * _GOLDEN
    drawn = hash_((mixed[0, :, None] + tokens).bitwise_and_(_MASK)).bitwise_xor_(mixed[1, :, None])
    uniform = (hash_(drawn).double() + 0.5) / 2**32
    return -(-uniform.log()).log()


class _KeyedNoise:
    """Makes a greedy search draw from the softmax."""

    def __init__(
        self, keys: Tensor, *, prompt: int, temperature: float, beat: Callable[[], None]
    ) -> None:
        self._keys, self._prompt, self._temperature = keys, prompt, temperature
        self._beat = beat

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Add each token's noise to its logit.

        Args:
            input_ids: What is there so far [completions, length].
            scores: Logits [completions, vocabulary].
        """
        self._beat()
        position = input_ids.shape[1] - self._prompt
        noise = gumbel_noise(self._keys, position, vocabulary=scores.shape[1])
        return scores.double() / self._temperature + noise


def end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """The tokens that end a completion: those of the model, and of its tokenizer.

    Args:
        model: A model of transformers.
        tokenizer: Its tokenizer.

    Returns:
        Ids.
    """
    own = model.generation_config.eos_token_id
    return {*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id} - {None}


@contextmanager
def _without_its_own_sampling(model: Any) -> Iterator[None]:
    """No repetition penalty, bad word, or least length of the model's changes what is sampled."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    before, base.generation_config = base.generation_config, GenerationConfig()
    try:
        yield
    finally:
        base.generation_config = before


def sample_completions(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Tensor],
    *,
    keys: Tensor,
    tokens: int,
    temperature: float,
    beat: Callable[[], None] = lambda: None,
) -> list[list[Completion]]:
    """Completions of some prompts, all at once.

    Args:
        model: Inside `samestep.train.answers.ready_to_generate`.
        tokenizer: Its tokenizer.
        prompts: Token ids of each.
        keys: Of `sampling_keys`, of as many completions for each prompt, side by side.
        tokens: How many a completion has at most.
        temperature: What logits are divided by.
        beat: Called before each token.

    Returns:
        Those of each prompt.

    Raises:
        OutOfMemoryError: They do not fit.
    """
    number = keys.shape[1] // len(prompts)
    width = max(map(len, prompts))
    ends = end_tokens(model, tokenizer)
    ids = torch.full((len(prompts), width), tokenizer.pad_token_id or 0)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = prompt
        mask[row, width - len(prompt) :] = 1
    device = model.device
    noise = _KeyedNoise(keys.to(device), prompt=width, temperature=temperature, beat=beat)
    try:
        with _without_its_own_sampling(model):
            written = model.generate(
                input_ids=ids.repeat_interleave(number, 0).to(device),
                attention_mask=mask.repeat_interleave(number, 0).to(device),
                logits_processor=LogitsProcessorList([noise]),
                max_new_tokens=tokens,
                eos_token_id=sorted(ends) or None,
                pad_token_id=tokenizer.pad_token_id or 0,
                do_sample=False,
                use_cache=True,
            )
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemoryError(
            f"{len(ids) * number} completions of {len(prompts)} prompts do not fit into memory: "
            "--generation-batch sets how many prompts are completed together, which does not "
            "change the step"
        ) from error
    found = [_completed(row, ends) for row in written[:, width:].tolist()]
    return [found[at : at + number] for at in range(0, len(found), number)]


def _completed(ids: Sequence[int], ends: set[int]) -> Completion:
    last = next((at for at, token in enumerate(ids) if token in ends), None)
    return Completion(tuple(ids if last is None else ids[: last + 1]), last is not None)
