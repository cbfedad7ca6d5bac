"""The last layer at the targets alone: the same step, from fewer positions."""

from typing import Any

import pytest
import torch
from cases import V, build, cut, gradients, ragged, worst
from experts import build_experts
from torch import nn
from transformers import Gemma2Config, Gemma2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

import samestep
from samestep.engine.targets import shifted_targets
from samestep.kernels import packed_attention
from samestep.models import lm_head
from samestep.models.activations import Checkpointing, checkpoint_activations
from samestep.models.dropout import replace_dropout
from samestep.models.lora import add_lora
from samestep.models.probes import cut_last_layer

LAYOUTS = [
    (name, padding)
    for name in ("llama", "llama-tied", "qwen2", "qwen3", "gemma2")
    for padding in ("none", "right", "left")
    if (name, padding) != ("gemma2", "left")  # NaN in transformers itself, where a row sees nothing
]


def made(name: str) -> Any:
    """A two-layer model in float64."""
    shape: dict[str, Any] = {
        "vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    }  # fmt: skip
    packed_attention.register()
    torch.manual_seed(0)
    if name == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(**shape)).double().train()
    if name == "gemma2":
        # Its capped attention scores are not for packs.
        config = Gemma2Config(**shape, attn_logit_softcapping=None, query_pre_attn_scalar=8)
        return Gemma2ForCausalLM(config).double().train()
    return build(name)


@pytest.mark.sampled(4)
@pytest.mark.parametrize(("name", "padding"), LAYOUTS)
@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_the_step_stays_the_same(name: str, padding: Any, mode: Checkpointing) -> None:
    model, loss = made(name), samestep.CausalLMLoss(normalize="sequence", z_loss=1e-3)
    micros = cut(model, ragged(9), [4, 1], padding)
    wanted_loss, wanted_terms = samestep.backward(model, micros, loss)
    wanted = gradients(model)
    assert cut_last_layer(model, padding)
    checkpoint_activations(model, mode)
    rows: list[int] = []
    model.model.layers[-1].mlp.register_forward_hook(
        lambda _, arguments, __: rows.append(arguments[0].numel() // 32)
    )
    found_loss, found_terms = samestep.backward(model, micros, loss)
    assert worst(gradients(model), wanted) < 1e-12
    assert found_loss == pytest.approx(wanted_loss, rel=1e-12)
    assert found_terms == pytest.approx(wanted_terms, rel=1e-12)
    targets = [len(micro["target_positions"]) for micro in micros]
    assert set(rows) <= set(targets)
    assert sum(targets) < sum(micro["input_ids"].numel() for micro in micros)


def test_a_micro_batch_without_targets() -> None:
    model, examples = build("llama"), [one for one in ragged(14) if (one.labels[1:] == -100).all()]
    assert examples
    assert cut_last_layer(model, "none")
    micros = cut(model, [*examples, *ragged(2)], [len(examples)], "none")
    samestep.backward(model, micros, samestep.CausalLMLoss())
    found = gradients(model)
    samestep.backward(model, cut(model, ragged(2), [2], "none"), samestep.CausalLMLoss())
    assert worst(found, gradients(model)) < 1e-12


def test_whoever_does_not_say_what_is_read_gets_everything() -> None:
    model = build("llama")
    micro = cut(model, ragged(4), [4], "none")[0]
    before = model(**samestep.model_inputs(micro)).logits
    assert cut_last_layer(model, "none")
    samestep.backward(model, [micro], samestep.CausalLMLoss())
    assert torch.equal(model(**samestep.model_inputs(micro)).logits, before)


def test_a_position_that_is_left_out_is_noticed() -> None:
    """The comparison above would catch a cut that is too deep."""
    model, loss = build("llama"), samestep.CausalLMLoss()
    micros = cut(model, ragged(9), [4, 1], "none")
    samestep.backward(model, micros, loss)
    wanted = gradients(model)
    assert cut_last_layer(model, "none")

    def too_deep(model: nn.Module, micro: Any) -> Any:
        states = loss._up_to_head(model, micro, positions=micro["target_positions"][1:])
        sums = states.cross_entropy(shifted_targets(micro), positions=micro["target_positions"])
        return samestep.Term(sums.loss)

    samestep.backward(model, micros, too_deep)
    assert worst(gradients(model), wanted) > 1e-3


def test_adapters() -> None:
    model, loss = build("llama"), samestep.CausalLMLoss()
    model = add_lora(model, 2, alpha=4, dropout=0.0, targets=("all-linear",), seed=0).double()
    for weight in model.parameters():
        if weight.requires_grad:
            nn.init.normal_(weight, std=0.1)
    micros = cut(model, ragged(9), [4, 1], "none")
    samestep.backward(model, micros, loss)
    wanted = gradients(model)
    assert cut_last_layer(model, "none")
    samestep.backward(model, micros, loss)
    assert worst(gradients(model), wanted) < 1e-12


class Mixing(nn.Module):
    """Looks at the neighbours."""

    def __init__(self, plain: nn.Module) -> None:
        super().__init__()
        self.plain = plain

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.plain(states.cumsum(dim=-2))  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", ["gpt2", "experts", "dropout", "mixing", "no attention"])
def test_models_that_are_left_as_they_are(kind: str) -> None:
    if kind == "experts":
        model: Any = build_experts("mixtral")
    elif kind == "gpt2":
        model = build("gpt2")
    else:
        model = build("llama")
    layers = [] if kind == "gpt2" else model.model.layers
    if kind == "dropout":
        layers[-1].mlp = nn.Sequential(layers[-1].mlp, nn.Dropout(0.1))
        replace_dropout(model)
    if kind == "mixing":
        layers[-1].mlp = Mixing(layers[-1].mlp)
    if kind == "no attention":
        del layers[-1].self_attn
    assert not cut_last_layer(model, "right")
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert not lm_head.position_kwargs(model.get_output_embeddings(), torch.tensor([0]))
