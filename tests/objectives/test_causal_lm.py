"""The causal language model loss: through every kind of head, and what it refuses."""

from typing import Any

import pytest
import torch
from cases import V, build, cut, gradients, plain_objective, ragged, worst
from transformers import Gemma2Config, Gemma2ForCausalLM, GraniteConfig, GraniteForCausalLM

import samestep
from samestep.errors import ConfigError

SHAPE: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}


def scaled() -> Any:
    """Granite divides its logits by a constant."""
    shape = {key: value for key, value in SHAPE.items() if key != "head_dim"}
    torch.manual_seed(0)
    return GraniteForCausalLM(GraniteConfig(**shape, logits_scaling=4.0)).double().train()


def capped() -> Any:
    """Gemma 2 caps its logits softly."""
    torch.manual_seed(0)
    config = Gemma2Config(**SHAPE, final_logit_softcapping=0.1, attn_logit_softcapping=None)
    return Gemma2ForCausalLM(config).double().train()


class Shifting(torch.nn.Module):
    """Does something to its logits that no rule covers: a bias of its own."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.config = model, model.config
        self.bias = torch.nn.Parameter(torch.randn(V, dtype=torch.float64))

    def get_output_embeddings(self) -> Any:
        return self.model.get_output_embeddings()

    def set_attn_implementation(self, name: str) -> None:
        self.model.set_attn_implementation(name)

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64

    def forward(self, **inputs: Any) -> Any:
        out = self.model(**inputs)
        out.logits = out.logits + self.bias
        return out


MODELS = {
    "granite": scaled,
    "gemma2": capped,
    "a bias on logits": lambda: Shifting(build("llama")),
}


@pytest.mark.parametrize("kind", MODELS)
def test_what_a_model_does_to_its_logits_is_found_out(kind: str) -> None:
    model, examples = MODELS[kind](), ragged(8)
    objective = plain_objective(model, examples)
    objective.backward()
    wanted = gradients(model)
    bound = 1e-6 if kind == "gemma2" else 1e-12  # its norms compute in float32, whatever the type
    for sizes in ([8], [3, 1]):
        loss, _ = samestep.backward(
            model, cut(model, examples, sizes, "right"), samestep.CausalLMLoss()
        )
        assert loss == pytest.approx(float(objective.detach()), rel=bound)
        assert worst(gradients(model), wanted) < bound


def test_a_frozen_head_gets_no_gradient_and_changes_no_other() -> None:
    model, examples = build("llama"), ragged(8)
    samestep.backward(model, cut(model, examples, [3], "none"), samestep.CausalLMLoss())
    wanted = gradients(model)
    model.lm_head.weight.requires_grad_(False)
    samestep.backward(model, cut(model, examples, [3], "none"), samestep.CausalLMLoss())
    assert model.lm_head.weight.grad is None
    del wanted["lm_head.weight"]
    assert worst(gradients(model), wanted) < 1e-12


def test_the_accuracy_is_that_of_the_logits() -> None:
    model, examples = build("qwen2"), ragged(8)
    _, terms = samestep.backward(model, cut(model, examples, [3], "right"), samestep.CausalLMLoss())
    right = total = 0
    for example in examples:
        targets = example.labels[1:]
        best = model(input_ids=example.input_ids[None]).logits[0, :-1].argmax(-1)
        right += int((best == targets)[targets != -100].sum())
        total += int((targets != -100).sum())
    assert terms["accuracy"] == pytest.approx(right / total, rel=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"normalize": "pair"}, "normalize='pair'"),
        ({"label_smoothing": 1.0}, "label_smoothing"),
        ({"z_loss": -1.0}, "z_loss"),
    ],
)
def test_values_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        samestep.CausalLMLoss(**options)
