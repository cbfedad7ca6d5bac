"""Classes, numbers, tags, answers and rewards: transformers' or TRL's values, under every split."""

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import V
from torch import Tensor
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
)

from objectives import SPLITS, check_all_splits, check_wrong_is_caught, ragged_records
from samestep.data.records import Records
from samestep.engine.terms import Objective
from samestep.objectives.classification import (
    Classification,
    QuestionAnswering,
    Regression,
    TokenClassification,
)
from samestep.objectives.preference import Reward
from samestep.objectives.units import EXAMPLE_COUNTERS, LABELLED_TOKEN_COUNTERS, PAIR_COUNTERS

N = 9
RIGHT = [split for split in SPLITS if split[1] == "right"] + [([1], "right"), ([3, 1], "right")]


def model(kind: Any, labels: int = 3, **settings: Any) -> Any:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    if kind.__name__.startswith("Bert"):
        drop = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        config: Any = BertConfig(
            vocab_size=V, num_attention_heads=4, num_labels=labels, **shape, **drop, **settings
        )
    else:
        config = LlamaConfig(
            vocab_size=V,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_labels=labels,
            pad_token_id=5,  # some sequences end in it, which must not matter
            **shape,
            **settings,
        )
        config.classifier_dropout = 0.0
    built = kind(config).double().train()
    with torch.no_grad():  # a bias of zeros would hide errors
        for weight in built.parameters():
            weight.add_(0.05 * torch.randn(weight.shape).double())
    return built


def mean_of_examples(records: Records, loss: Any) -> Any:
    """The mean of each record's own loss, which transformers computes from it alone."""

    def truth(model: Any) -> Tensor:
        model.set_attn_implementation("sdpa")
        weights = [record.sequences[0].weight for record in records]
        losses = [
            weight * loss(model, record.sequences[0].input_ids[None], record)
            for weight, record in zip(weights, records, strict=True)
        ]
        return torch.stack(losses).sum() / sum(weights)

    return truth


def ignoring_softmax_biases(kind: Any) -> Any:
    """Freeze what the loss does not depend on, whose gradient is only rounding."""
    for name, weight in kind.named_parameters():
        last = "encoder.layer.1.output.LayerNorm.bias" if "QuestionAnswering" in str(kind) else "-"
        if name.endswith(("key.bias", "qa_outputs.bias", last)):
            weight.requires_grad_(False)
    return kind


@pytest.mark.parametrize("kind", [LlamaForSequenceClassification, BertForSequenceClassification])
def test_classification_is_transformers(kind: Any) -> None:
    classes = torch.arange(N) % 3
    records = ragged_records(N, weighted=True, **{"class": classes})
    built = ignoring_softmax_biases(model(kind))

    def own(model: Any, ids: Tensor, record: Any) -> Tensor:
        # Alone and without a pad token there is no doubt about where the sequence ends.
        model.config.pad_token_id = None
        loss: Tensor = model(input_ids=ids, labels=record.fields["class"][None]).loss
        return loss

    objective = Objective(Classification(), EXAMPLE_COUNTERS)
    truth = mean_of_examples(records, own)
    splits = SPLITS if kind is LlamaForSequenceClassification else RIGHT
    terms = check_all_splits(built, records, objective, truth, splits=splits)
    assert 0 < terms["accuracy"] < 1
    check_wrong_is_caught(built, records, objective, truth)


def test_regression_is_transformers() -> None:
    records = ragged_records(N, weighted=True, value=torch.randn(N).double())
    built = model(LlamaForSequenceClassification, 1, problem_type="regression")

    def own(model: Any, ids: Tensor, record: Any) -> Tensor:
        model.config.pad_token_id = None
        loss: Tensor = model(input_ids=ids, labels=record.fields["value"][None]).loss
        return loss

    objective = Objective(Regression(), EXAMPLE_COUNTERS)
    check_all_splits(built, records, objective, mean_of_examples(records, own))
    check_wrong_is_caught(built, records, objective, mean_of_examples(records, own))


@pytest.mark.parametrize("kind", [LlamaForTokenClassification, BertForTokenClassification])
def test_token_classification_is_the_mean_over_all_tagged_tokens(kind: Any) -> None:
    plain = ragged_records(N)
    draw = torch.Generator().manual_seed(3)
    tags = torch.randint(-1, 3, (len(plain.sequences.ids),), generator=draw)
    tags[tags < 0] = -100
    records = Records(plain.sequences, token_fields={"classes": tags})
    built = ignoring_softmax_biases(model(kind))

    def truth(model: Any) -> Tensor:
        model.set_attn_implementation("sdpa")
        logits = [model(input_ids=one.input_ids[None]).logits[0] for one in records.sequences]
        return torch.nn.functional.cross_entropy(torch.cat(logits), tags)

    objective = Objective(TokenClassification(), LABELLED_TOKEN_COUNTERS)
    check_all_splits(built, records, objective, truth)
    check_wrong_is_caught(built, records, objective, truth)


def test_answers_are_transformers_without_padding() -> None:
    ends = {"start": torch.tensor([1] * N), "end": torch.tensor([2] * N)}
    records = ragged_records(N, **ends)
    built = ignoring_softmax_biases(model(BertForQuestionAnswering, 2))

    def own(model: Any, ids: Tensor, record: Any) -> Tensor:
        ends = {"start_positions": record.fields["start"][None]}
        ends["end_positions"] = record.fields["end"][None]
        loss: Tensor = model(input_ids=ids, **ends).loss
        return loss

    objective = Objective(QuestionAnswering(), EXAMPLE_COUNTERS)
    check_all_splits(built, records, objective, mean_of_examples(records, own))


@pytest.mark.parametrize("margin", [False, True])
def test_reward_is_trls(margin: bool) -> None:
    from trl.trainer.reward_trainer import RewardTrainer

    fields = {"margin": torch.rand(N).double()} if margin else {}
    records = ragged_records(N, width=2, **fields)
    built = model(LlamaForSequenceClassification, 1)

    def truth(model: Any) -> Tensor:
        model.set_attn_implementation("sdpa")
        model.config.pad_token_id = None
        ids = [one.input_ids[None] for one in records.sequences]
        rewards = torch.cat([model(input_ids=one).logits for one in ids[::2] + ids[1::2]])

        def gather(tensor: Any) -> Any:
            return tensor

        fake = SimpleNamespace(
            model=SimpleNamespace(training=False),
            args=SimpleNamespace(center_rewards_coefficient=0.05),
            accelerator=SimpleNamespace(gather=gather, gather_for_metrics=gather),
            _total_train_tokens=0,
            _metrics={"eval": defaultdict(list)},
        )
        inputs = {"margin": fields["margin"]} if margin else {}
        loss: Tensor = RewardTrainer.compute_loss(
            fake, lambda **_: SimpleNamespace(logits=rewards), inputs
        )
        return loss

    objective = Objective(Reward(center_rewards=0.05), PAIR_COUNTERS)
    terms = check_all_splits(built, records, objective, truth)
    assert terms["margin"] == pytest.approx(terms["reward_chosen"] - terms["reward_rejected"])
    check_wrong_is_caught(built, records, objective, truth)
