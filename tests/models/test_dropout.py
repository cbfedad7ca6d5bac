"""Dropout that belongs to the example: the same under any split, fresh in every step."""

from typing import Any

import pytest
import torch
from cases import build, gradients, ragged, worst
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import samestep
from samestep.data.collate import Padding, collate_examples
from samestep.errors import ConfigError
from samestep.kernels import packed_attention
from samestep.models import dropout
from samestep.models.dropout import ExampleDropout, key_dropout, replace_dropout


def gpt2() -> Any:
    """With residual and embedding dropout; that of attention cannot be keyed and is off."""
    packed_attention.register()
    torch.manual_seed(0)
    size = {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    drop = {"attn_pdrop": 0.0, "resid_pdrop": 0.3, "embd_pdrop": 0.3}
    model = GPT2LMHeadModel(GPT2Config(**size, **drop, bos_token_id=0, eos_token_id=1))
    return model.double().train()


def gradient(
    model: Any, size: int, padding: Padding, *, step: int = 0, keyed: bool = True
) -> dict[str, Any]:
    model.set_attn_implementation(packed_attention.NAME if padding == "none" else "sdpa")
    examples, loss = ragged(12), samestep.CausalLMLoss()
    micros = [
        collate_examples(examples[at : at + size], padding=padding) for at in range(0, 12, size)
    ]

    def loss_fn(model: Any, micro: Any) -> Any:
        if keyed:
            key_dropout(model, micro, seed=5, step=step)
        return loss(model, micro)

    torch.manual_seed(0)
    samestep.backward(model, micros, loss_fn)
    return gradients(model)


def test_no_split_changes_the_masks() -> None:
    model = gpt2()
    assert replace_dropout(model) == 5
    wanted = gradient(model, 12, "right")
    for size, padding in ((1, "none"), (5, "left"), (12, "none"), (2, "right")):
        assert worst(gradient(model, size, padding), wanted) < 1e-12


def test_plain_dropout_would_fail_the_same_test() -> None:
    model = gpt2()
    wanted = gradient(model, 12, "right", keyed=False)
    assert worst(gradient(model, 1, "right", keyed=False), wanted) > 1e-2


def test_each_step_draws_other_masks_and_each_layer_its_own() -> None:
    model = gpt2()
    replace_dropout(model)
    one, other = gradient(model, 4, "none", step=0), gradient(model, 4, "none", step=1)
    assert worst(one, other) > 1e-2
    layers = [module for module in model.modules() if isinstance(module, ExampleDropout)]
    micro = collate_examples(ragged(3))
    key_dropout(model, micro, seed=5, step=0)
    ones = torch.ones(*micro["input_ids"].shape, 16)
    masks = [layer(ones) for layer in layers]
    assert all(not torch.equal(masks[0], mask) for mask in masks[1:])


def test_gradient_checkpointing_draws_the_same_masks_again() -> None:
    model = gpt2()
    replace_dropout(model)
    wanted = gradient(model, 4, "none")
    model.activation_checkpointing_enable({"use_reentrant": False})
    assert worst(gradient(model, 5, "right"), wanted) < 1e-12


def keyed_layer(p: float, *, layer: int = 0, step: int = 0, rows: int = 4) -> ExampleDropout:
    """A layer with the keys of a pack of ragged rows."""
    found = ExampleDropout(p, layer)
    key_dropout(found, collate_examples(ragged(rows)), seed=0, step=step)
    return found


def test_the_share_that_is_kept_and_the_scale() -> None:
    layer = keyed_layer(0.25)
    tokens = layer.keys.shape[2]
    out = layer(torch.ones(1, tokens, 4000))
    assert out.unique().tolist() == [0.0, pytest.approx(1 / 0.75)]
    spread = (0.25 * 0.75 / out.numel()) ** 0.5  # of a share of independent draws
    assert float((out > 0).float().mean()) == pytest.approx(0.75, abs=5 * spread)
    assert torch.equal(layer.eval()(out), out)


def test_masks_of_neighbours_are_as_good_as_independent() -> None:
    """Features, positions, examples, layers and steps: no two masks agree more than chance."""
    width = 2**14
    layers = [keyed_layer(0.5, layer=layer, step=step) for layer in (0, 1) for step in (0, 1)]
    drawn = torch.cat([one(torch.ones(1, one.keys.shape[2], width))[0] > 0 for one in layers])
    signs = 2 * drawn.double() - 1
    # Besides each other: each mask moved on by some features, which a weak hash would repeat.
    moved = torch.cat([signs, signs.roll(1, 1), signs.roll(64, 1)])
    agreement = (moved @ moved.T / width).fill_diagonal_(0)
    assert float(agreement.abs().max()) < 6 / width**0.5


def test_a_weak_hash_would_fail_the_same_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dropout, "hash_", lambda numbers: numbers)
    with pytest.raises(AssertionError):
        test_masks_of_neighbours_are_as_good_as_independent()


def test_the_numbers_are_those_of_the_definition() -> None:
    """Plain Python gives the same: nothing of them depends on a device or a generator."""

    def scalar_hash(number: int) -> int:
        for shift, factor in ((16, 0x21F0AAAD), (15, 0x735A2D97)):
            number = ((number ^ number >> shift) * factor) & (2**32 - 1)
        return number ^ number >> 15

    layer = keyed_layer(0.3, layer=2)
    out = layer(torch.ones(1, layer.keys.shape[2], 3))
    salt = scalar_hash(3)
    for position, pair in enumerate(layer.keys[:, 0].T.tolist()):
        first, second = (scalar_hash(key ^ salt) for key in pair)
        for feature in range(3):
            drawn = scalar_hash((first + feature * 0x9E3779B9) % 2**32)
            kept = scalar_hash(drawn ^ second) >= 0.3 * 2**32
            assert (float(out[0, position, feature]) > 0) == kept


def test_states_that_hide_the_examples_are_refused() -> None:
    layer = ExampleDropout(0.25, 0)
    layer.keys = torch.zeros(2, 2, 5, dtype=torch.int64)
    with pytest.raises(ConfigError, match="Set this model's dropout to 0"):
        layer(torch.ones(10, 4))


def test_a_model_without_dropout_is_left_alone() -> None:
    model = build("llama")
    assert replace_dropout(model) == 0
    key_dropout(model, {}, seed=0, step=0)
    assert replace_dropout(nn.Sequential(nn.Dropout(0.0))) == 0
