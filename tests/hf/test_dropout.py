"""Dropout that draws by the row, asked of exact(): one window, cut in several ways."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from exact_cases import EXACT, gradients, plain, worst
from peft import LoraConfig, get_peft_model

from samestep.errors import ConfigError, StepError
from samestep.hf.exact_trainer import Exact, exact

BERT = {"hidden_dropout_prob": 0.3, "classifier_dropout": 0.3}
GPT2 = {"n_embd": 16, "n_layer": 1, "n_head": 2, "attn_pdrop": 0.0}


def with_lora(*cut: Any, **options: Any) -> Any:
    """A language model without dropout but for that of its adapters."""
    trainer = plain("LlamaForCausalLM", "next")(*cut, **options)
    torch.manual_seed(0)
    lora = LoraConfig(r=2, lora_dropout=0.3, target_modules=["q_proj"], init_lora_weights=False)
    trainer.model = trainer.model_wrapped = get_peft_model(trainer.model, lora).double()
    return trainer


CASES: dict[str, Any] = {
    "tags": plain("BertForTokenClassification", "tokens", num_labels=3, **BERT),
    "classes": plain("BertForSequenceClassification", "row", num_labels=3, **BERT),
    "causal": plain("GPT2LMHeadModel", "next", **GPT2, resid_pdrop=0.3, embd_pdrop=0.3),
    "lora": with_lora,
}


def step(make: Any, cut: tuple[int, int], folder: Path, **options: Any) -> dict[str, torch.Tensor]:
    return gradients(exact(make(*cut, folder), **options))[0]


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", CASES)
def test_no_cut_changes_the_masks(tmp_path: Path, name: str) -> None:
    make = CASES[name]
    whole = step(make, (8, 1), tmp_path, key_dropout=True)
    assert worst(whole, step(make, (3, 3), tmp_path, key_dropout=True)) < EXACT
    assert worst(whole, step(make, (8, 1), tmp_path)) > 1e-2  # other masks: there is dropout


def test_masks_that_are_drawn_by_the_micro_batch_change_with_the_cut(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make = CASES["tags"]
    with caplog.at_level(logging.WARNING, "samestep"):
        whole = step(make, (8, 1), tmp_path)
    assert "exact(trainer, key_dropout=True)" in caplog.text
    assert worst(whole, step(make, (3, 3), tmp_path)) > 1e-2


def test_each_step_has_masks_of_its_own_and_evaluation_none(tmp_path: Path) -> None:
    class Mine(Exact, type(CASES["tags"](2, 4, tmp_path))):
        samestep_key_dropout = True

    make = plain("BertForTokenClassification", "tokens", num_labels=3, trainer=Mine, **BERT)
    trainer = make(4, 2, tmp_path, num_train_epochs=2, learning_rate=0.0)
    first, second = gradients(trainer)
    assert worst(first, second) > 1e-2
    without = {"hidden_dropout_prob": 0.0, "classifier_dropout": 0.0}
    plainly = plain("BertForTokenClassification", "tokens", num_labels=3, **without)
    wanted = exact(plainly(4, 2, tmp_path)).evaluate()["eval_loss"]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize(
    ("name", "config", "words"),
    [
        ("BertForMaskedLM", {"attention_probs_dropout_prob": 0.1}, "attention_probs_dropout_prob="),
        ("T5ForConditionalGeneration", {"dropout_rate": 0.1}, "two sequences a row"),
    ],
)
def test_dropout_that_cannot_be_keyed_is_refused(
    tmp_path: Path, name: str, config: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        exact(plain(name, "next", **config)(4, 2, tmp_path), key_dropout=True).train()


def test_rows_that_are_not_known_by_tokens_are_refused(tmp_path: Path) -> None:
    trainer = exact(CASES["causal"](4, 2, tmp_path), key_dropout=True)
    with pytest.raises(StepError, match="this micro-batch has pixel_values"):
        trainer._samestep.dropout.set({"pixel_values": torch.zeros(2, 3)})
