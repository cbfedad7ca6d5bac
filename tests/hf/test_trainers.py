"""Trainers of users: losses of their own, refusals, proof, and micro-batches without targets."""

from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from exact_cases import EXACT, collate, dpo, gradients, model_of, plain, sft, token_rows, worst
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from samestep.errors import ConfigError, StepError
from samestep.hf.exact_trainer import Exact, exact
from samestep.hf.refusals import refuse_inexact

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # of TRL against transformers


class MeanOfTokens(hf.Trainer):
    def compute_loss(self, model: Any, inputs: Any, *args: Any, **options: Any) -> Any:
        labels = inputs.pop("labels")
        logits = model(**inputs).logits[:, :-1].flatten(0, 1)
        return functional.cross_entropy(logits, labels[:, 1:].flatten())


class MeanOfRows(hf.Trainer):
    def compute_loss(self, model: Any, inputs: Any, *args: Any, **options: Any) -> Any:
        labels = inputs.pop("labels")[:, 1:]
        logits = model(**inputs).logits[:, :-1].transpose(1, 2)
        losses = functional.cross_entropy(logits, labels, reduction="none").sum(1)
        return (losses / (labels != -100).sum(1)).mean()


class SumOfTokens(MeanOfTokens):
    def compute_loss(self, model: Any, inputs: Any, *args: Any, **options: Any) -> Any:
        count = (inputs["labels"][:, 1:] != -100).sum()
        return super().compute_loss(model, inputs) * count


class DividesItself(MeanOfTokens):
    def compute_loss(self, model: Any, inputs: Any, *args: Any, **options: Any) -> Any:
        return super().compute_loss(model, inputs) / self.args.gradient_accumulation_steps


class DividesByItems(MeanOfTokens):
    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        count = (inputs["labels"][:, 1:] != -100).sum()
        return super().compute_loss(model, inputs) * count / num_items_in_batch


@pytest.mark.sampled(4)
@pytest.mark.parametrize("trainer", [MeanOfTokens, MeanOfRows])
def test_the_unit_of_a_loss_of_ones_own_is_found(tmp_path: Path, trainer: Any) -> None:
    make = plain("LlamaForCausalLM", "next", trainer=trainer)
    (whole,) = gradients(exact(make(8, 1, tmp_path)))
    (cut,) = gradients(exact(make(3, 3, tmp_path)))
    assert worst(whole, cut) < EXACT
    (wrong,) = gradients(make(3, 3, tmp_path))
    assert worst(whole, wrong) > 1e-2


def test_units_are_told_apart_when_data_come_that_differ(tmp_path: Path) -> None:
    def trainer(size: int, accumulation: int) -> Any:
        made = plain("LlamaForCausalLM", "next", trainer=MeanOfTokens)(size, accumulation, tmp_path)
        for row in made.train_dataset[:4]:  # the first token is no target: two units are the same
            row["labels"] = [-100, *row["input_ids"][1:]]
        for row in made.train_dataset[4:]:
            row["labels"] = row["input_ids"]
        return exact(made)

    for one, other in zip(gradients(trainer(4, 1)), gradients(trainer(2, 2)), strict=True):
        assert worst(one, other) < EXACT


@pytest.mark.parametrize(
    ("trainer", "size", "words"),
    [
        (SumOfTokens, 4, "no mean over shifted-labels, labels, rows"),
        (DividesByItems, 4, "num_items_in_batch"),
        (MeanOfTokens, 1, "cannot be told"),
    ],
)
def test_what_fits_no_unit_is_refused(tmp_path: Path, trainer: Any, size: int, words: str) -> None:
    make = plain("LlamaForCausalLM", "next", trainer=trainer)
    with pytest.raises(ConfigError, match=words):
        exact(make(size, 2, tmp_path)).train()


@pytest.mark.parametrize(
    "unit", ["shifted-labels", lambda batch: (batch["labels"][:, 1:] >= 0).sum()]
)
def test_a_unit_can_be_given(tmp_path: Path, unit: Any) -> None:
    make = plain("LlamaForCausalLM", "next", trainer=MeanOfTokens)
    (whole,) = gradients(exact(make(8, 1, tmp_path), unit=unit))
    (cut,) = gradients(exact(make(1, 8, tmp_path), unit=unit))
    assert worst(whole, cut) < EXACT
    with pytest.raises(ConfigError, match="'lines': one of shifted-labels"):
        exact(make(1, 8, tmp_path), unit="lines")


def test_the_class_before_a_trainer(tmp_path: Path) -> None:
    class Mine(Exact, hf.Trainer):
        samestep_prove = True

    make = plain("BertForMaskedLM", "tokens", trainer=Mine)
    (whole,) = gradients(make(8, 1, tmp_path))
    (cut,) = gradients(make(2, 4, tmp_path))
    assert worst(whole, cut) < EXACT
    (again,) = gradients(exact(make(2, 4, tmp_path)))
    assert worst(cut, again) == 0


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    "name", ["BertForMaskedLM", "LlamaForCausalLM", "T5ForConditionalGeneration"]
)
def test_a_micro_batch_without_targets_adds_nothing(tmp_path: Path, name: str) -> None:
    def trainer(size: int, accumulation: int) -> Any:
        made = plain(name, "next")(size, accumulation, tmp_path)
        for row in made.train_dataset[2:4]:
            row["labels"] = [-100] * len(row["labels"])
        return exact(made)

    (whole,) = gradients(trainer(8, 1))
    made = trainer(2, 4)
    (cut,) = gradients(made)
    assert worst(whole, cut) < EXACT
    assert made.state.log_history[0]["loss"] > 0
    assert made.evaluate()["eval_loss"] > 0


def test_a_micro_batch_of_sft_without_targets(tmp_path: Path) -> None:
    def trainer(size: int, accumulation: int) -> Any:
        made = sft()(size, accumulation, tmp_path)
        rows = [dict(row) for row in made.train_dataset]
        rows[3]["labels"] = [-100] * len(rows[3]["input_ids"])
        made.train_dataset = rows
        return exact(made)

    (whole,) = gradients(trainer(8, 1))
    (cut,) = gradients(trainer(1, 8))
    assert worst(whole, cut) < EXACT


class WithBatchNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = model_of("BertForSequenceClassification", num_labels=3)
        self.norm = nn.BatchNorm1d(3)

    def forward(self, **inputs: Tensor) -> Any:
        return self.model(**inputs)


def refusals(tmp_path: Path) -> dict[str, Any]:
    def batch_norm() -> Any:
        made = plain("BertForSequenceClassification", "row")(4, 2, tmp_path)
        made.model = WithBatchNorm()
        return made

    def data_parallel() -> Any:
        made = plain("LlamaForCausalLM", "next")(4, 2, tmp_path)
        made.args._n_gpu = 2
        return made

    def deepspeed() -> Any:
        made = plain("LlamaForCausalLM", "next")(4, 2, tmp_path)
        made.is_deepspeed_enabled = True
        return made

    def contrastive() -> Any:
        made = plain("LlamaForCausalLM", "next")(4, 2, tmp_path)
        made.can_return_loss = True  # as for CLIP, whose forward has return_loss
        return made

    def routers() -> Any:
        made = plain("LlamaForCausalLM", "next")(4, 2, tmp_path)
        made.model.config.output_router_logits = True
        return made

    return {
        "batch norm .norm, 1 in all.": batch_norm,
        "DataParallel over 2 GPUs": data_parallel,
        "DeepSpeed": deepspeed,
        "contrasts each row": contrastive,
        "router loss": routers,
        "DividesItself.compute_loss divides by gradient_accumulation_steps": lambda: plain(
            "LlamaForCausalLM", "next", trainer=DividesItself
        )(4, 2, tmp_path),
        "'sft' is a mean over tokens": lambda: dpo(
            loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.5]
        )(4, 2, tmp_path),
        "'aot' sorts": lambda: dpo(loss_type=["aot"])(4, 2, tmp_path),
    }


@pytest.mark.parametrize("drops", [False, True])
def test_pairs_that_a_rank_would_repeat_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, drops: bool
) -> None:
    trainer = dpo(dataloader_drop_last=drops)(3, 1, tmp_path)  # 8 pairs: 6, and 2 for two ranks
    monkeypatch.setattr(type(trainer.accelerator), "num_processes", 2)
    refused = pytest.raises(ConfigError, match=r"a rank repeats 1 of its pairs.*drop_last")
    with nullcontext() if drops else refused:
        refuse_inexact(trainer)


@pytest.mark.parametrize("words", refusals(Path()))
def test_what_no_factor_makes_exact_is_refused(tmp_path: Path, words: str) -> None:
    trainer = refusals(tmp_path)[words]()
    with pytest.raises(ConfigError, match=words) as refusal:
        exact(trainer)
    assert ": " in str(refusal.value)
    assert not isinstance(trainer, Exact)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("ORPOTrainer", "objective orpo"),
        ("CPOTrainer", "objective orpo"),
        ("KTOTrainer", "objective kto"),
        ("SomeTrainer", "not known to be a mean"),
    ],
)
def test_further_trainers_of_trl_are_refused(tmp_path: Path, name: str, words: str) -> None:
    trainer = plain("LlamaForCausalLM", "next")(4, 2, tmp_path)
    trainer.__class__ = type(name, (hf.Trainer,), {"__module__": "trl.experimental.some"})
    with pytest.raises(ConfigError, match=words):
        exact(trainer)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"loss_type": "dapo"}, None),
        ({"loss_type": "grpo"}, None),
        ({"loss_type": "bnpo"}, "each micro-batch's own tokens"),
        ({"_entropy_bonus_enabled": True}, "entropy_coef=0.0"),
        ({"aux_loss_enabled": True}, "router_aux_loss_coef=0.0"),
    ],
)
def test_grpo_is_left_alone_or_refused(tmp_path: Path, settings: Any, words: str | None) -> None:
    trainer = plain("LlamaForCausalLM", "next")(4, 2, tmp_path)
    trainer.__class__ = type("GRPOTrainer", (hf.Trainer,), {"__module__": "trl.trainer.grpo"})
    for key, value in settings.items():
        setattr(trainer.args if key == "loss_type" else trainer, key, value)
    if words:
        with pytest.raises(ConfigError, match=words):
            exact(trainer)
    else:
        before = trainer.loss_is_scaled_for_ga
        exact(trainer).train()
        assert trainer.loss_is_scaled_for_ga is before


class AttendsPadding(hf.LlamaForCausalLM):
    def forward(self, input_ids: Any = None, attention_mask: Any = None, **inputs: Any) -> Any:
        mean = self.model.embed_tokens(input_ids).mean(1, keepdim=True)
        embedded = self.model.embed_tokens(input_ids) + mean
        return super().forward(inputs_embeds=embedded, attention_mask=attention_mask, **inputs)


def test_a_proof_finds_a_model_that_attends_to_padding(tmp_path: Path) -> None:
    def trainer(kind: type, **options: Any) -> Any:
        made = plain("LlamaForCausalLM", "next")(4, 2, tmp_path)
        model = made.model
        model.__class__ = kind
        return exact(made, **options)

    trainer(hf.LlamaForCausalLM, prove=True).train()
    with pytest.raises(StepError, match="attends to padding"):
        trainer(AttendsPadding, unit="shifted-labels", prove=True).train()
    with pytest.raises(ConfigError, match="one row each"):
        exact(plain("LlamaForCausalLM", "next")(1, 8, tmp_path), prove=True).train()


class RemembersItsLargest(hf.LlamaForCausalLM):
    def forward(self, input_ids: Any = None, **inputs: Any) -> Any:
        found = super().forward(input_ids, **inputs)
        if self.training:
            self.largest = torch.maximum(self.largest, found.logits.detach().abs().max())
        return found


def test_a_proof_finds_statistics_that_a_forward_leaves(tmp_path: Path) -> None:
    made = plain("LlamaForCausalLM", "next")(4, 2, tmp_path)
    made.model.__class__ = RemembersItsLargest
    largest = torch.zeros(())
    made.model.register_buffer("largest", largest)
    with pytest.raises(StepError, match="moves largest"):
        exact(made, unit="shifted-labels", prove=True).train()
    assert made.model.largest is largest
    assert not largest


def test_a_wrong_unit_is_found(tmp_path: Path) -> None:
    with pytest.raises(StepError, match="over their rows"):
        exact(plain("LlamaForCausalLM", "next")(4, 2, tmp_path), unit="rows", prove=True).train()


def test_answers_that_are_cut_or_padded_unevenly_are_refused(tmp_path: Path) -> None:
    make = plain("BertForQuestionAnswering", "answer")
    trainer = make(4, 2, tmp_path)
    trainer.train_dataset[1]["end_positions"] = 40
    with pytest.raises(StepError, match="4 starts and 3 ends"):
        exact(trainer).train()
    trainer = make(4, 2, tmp_path)
    trainer.data_collator = lambda rows: {
        k: v[:, : max(len(r["input_ids"]) for r in rows)] if v.dim() > 1 else v
        for k, v in collate(rows).items()
    }
    with pytest.raises(StepError, match="pad all rows to one length"):
        exact(trainer).train()


def test_only_trainers_are_taken() -> None:
    with pytest.raises(ConfigError, match=r"takes a transformers\.Trainer"):
        exact(nn.Linear(1, 1))


def test_it_costs_a_count_of_labels(tmp_path: Path) -> None:
    class Counts(hf.TrainerCallback):
        forwards = 0

    def forwards(apply: bool) -> int:
        trainer = plain("BertForMaskedLM", "tokens")(2, 4, tmp_path)
        seen = [0]
        trainer.model.register_forward_hook(lambda *_: seen.__setitem__(0, seen[0] + 1))
        (exact(trainer) if apply else trainer).train()
        return seen[0]

    assert forwards(True) == forwards(False) == 4


def test_a_window_that_is_taken_from_elsewhere_is_refused(tmp_path: Path) -> None:
    trainer = exact(plain("BertForMaskedLM", "tokens")(2, 4, tmp_path))
    with pytest.raises(StepError, match="get_batch_samples"):
        trainer.training_step(trainer.model, collate(token_rows("tokens")))
    assert torch.is_tensor(trainer.compute_loss(trainer.model, collate(token_rows("tokens"))))


class _Operations(TorchDispatchMode):
    """Keeps the size of what each operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        self.sizes.append(found.numel() if isinstance(found, Tensor) else 0)
        return found


@pytest.mark.parametrize("layers", [1, 3])
def test_it_adds_a_few_operations_on_the_labels_whatever_the_model(
    tmp_path: Path, layers: int
) -> None:
    """What docs/trainers.md says of the cost: counted, not timed."""

    def operations(*, apply: bool) -> Counter[int]:
        make = plain("BertForMaskedLM", "tokens", num_hidden_layers=layers)
        trainer = make(2, 4, tmp_path)
        if apply:
            exact(trainer)
        with _Operations() as seen:
            trainer.train()
        return Counter(seen.sizes)

    added = operations(apply=True) - operations(apply=False)
    assert max(added) <= 2 * 24  # the labels of a micro-batch: two rows of up to 24
    assert added.total() <= 8 * 4  # micro-batches
