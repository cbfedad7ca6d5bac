"""The auditor on trainers: sound ones are exact, the cause of each wrong one is named."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import IterableDataset
from trainers import causal, classifier, factory, rows
from transformers import Trainer, TrainerCallback

from samestep.audit.check import CheckReport, as_subject, check_subject, load_subject
from samestep.cli import main
from samestep.errors import CheckError


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # trainers make their output folder


def audit(make_trainer: Callable[..., Any], *axes: str) -> CheckReport:
    return check_subject(as_subject(make_trainer), axes or None)


def found(report: CheckReport) -> dict[str, str]:
    return {axis.name: axis.cause or axis.verdict for axis in report.axes}


def token_losses(outputs: Any, labels: Tensor) -> Tensor:
    logits = outputs.logits[:, :-1].flatten(0, 1)
    return functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")


class Means(Trainer):
    loss_is_scaled_for_ga = True

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **options: Any) -> Any:
        labels = inputs.pop("labels")
        return token_losses(model(**inputs), labels) / (labels[:, 1:] != -100).sum()


class MeanOfMeans(Means):
    loss_is_scaled_for_ga = False  # so the trainer divides by the accumulation


class ClipsEachTime(Trainer):
    def training_step(self, model: nn.Module, *args: Any, **options: Any) -> Tensor:
        loss = super().training_step(model, *args, **options)
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        return loss


class StepsEachTime(Means):
    def training_step(self, model: nn.Module, *args: Any, **options: Any) -> Tensor:
        loss = super().training_step(model, *args, **options)
        with torch.no_grad():
            for weight in model.parameters():
                weight -= 0.1 * weight.grad
                weight.grad = None
        return loss


class ClearsEachTime(Trainer):
    def training_step(self, model: nn.Module, *args: Any, **options: Any) -> Tensor:
        model.zero_grad()
        return super().training_step(model, *args, **options)


def summed(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    return token_losses(outputs, labels) / num_items_in_batch


def local(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    return token_losses(outputs, labels) / (labels[:, 1:] != -100).sum()


def test_a_causal_language_model_is_exact_but_for_its_evaluation() -> None:
    report = audit(factory())
    assert report.dtype == "float64"
    assert {name: cause for name, cause in found(report).items() if cause != "exact"} == {
        "packing": "skipped",
        "knobs": "skipped",
        "ranks": "duplicated-examples",  # of 7 rows, the sampler repeats one to fill the last batch
        "terms": "skipped",
        "evaluation-batch": "eval-mean-of-means",
        "evaluation-ranks": "eval-mean-of-means",  # of the tokens that the ranks have together
    }


def test_a_classifier_is_multiplied_by_the_accumulation() -> None:
    report = audit(factory(model=classifier, data=rows(classes=3)))
    assert found(report)["micro-batch"] == "unscaled-sum"
    by_name = {axis.name: axis for axis in report.axes}
    assert by_name["micro-batch"].ratio == pytest.approx(8)
    assert by_name["short-window"].ratio == pytest.approx(4)
    assert by_name["evaluation-batch"].verdict == "exact"
    assert by_name["ranks"].cause == "world-scaled"
    assert by_name["ranks"].ratio == pytest.approx(2)


@pytest.mark.sampled(8)
@pytest.mark.parametrize(
    ("options", "cause"),
    [
        ({"compute_loss_func": summed}, "exact"),
        ({"arguments": {"label_smoothing_factor": 0.1}}, "exact"),
        ({"arguments": {"gradient_checkpointing": True}}, "exact"),
        ({"arguments": {"max_grad_norm": 1e-3, "warmup_steps": 10}}, "exact"),
        ({"arguments": {"train_sampling_strategy": "group_by_length"}}, "exact"),
        ({"arguments": {"bf16": True}}, "exact"),
        ({"compute_loss_func": local}, "unscaled-sum"),
        ({"kind": MeanOfMeans}, "mean-of-means"),
        ({"kind": ClipsEachTime}, "clip-per-micro-batch"),
        ({"kind": StepsEachTime}, "optimizer-step-per-micro-batch"),
        ({"kind": ClearsEachTime}, "last-micro-batch-only"),
    ],
)
def test_the_cause_is_named(options: dict[str, Any], cause: str) -> None:
    report = audit(factory(**options), "micro-batch")
    assert found(report) == {"micro-batch": cause}
    assert report.dtype == "float64"


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(rows())


class Listed(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return 7

    def __getitem__(self, index: int) -> Any:
        return rows()[index]


@pytest.mark.sampled(4)
@pytest.mark.parametrize("data", [rows(), rows(5), Stream(), Listed()])
def test_every_kind_of_data_runs(data: Any) -> None:
    stream = isinstance(data, Stream)
    make_trainer = factory(data=data, arguments={"max_steps": 9} if stream else None)
    seen = found(audit(make_trainer, "micro-batch", "short-window", "evaluation-batch"))
    assert seen == {
        "micro-batch": "exact",
        "short-window": "skipped" if stream else "exact",
        "evaluation-batch": "eval-mean-of-means",
    }


def test_a_model_that_all_trainers_share_comes_back_as_it_was() -> None:
    model = causal()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    axes = ("micro-batch", "evaluation-first", "dropout", "ranks")
    assert found(audit(factory(model=lambda: model), *axes)) == {
        "micro-batch": "exact",
        "evaluation-first": "exact",
        "dropout": "rng",
        "ranks": "duplicated-examples",
    }
    assert {layer.self_attn.attention_dropout for layer in model.model.layers} == {0.5}
    assert before.keys() == model.state_dict().keys()


def test_callbacks_of_the_user_run_and_those_of_the_library_do_not(
    capfd: pytest.CaptureFixture[str],
) -> None:
    class Clears(TrainerCallback):
        def on_substep_end(self, *args: Any, model: Any = None, **options: Any) -> None:
            print("noise")
            model.zero_grad()

    make_trainer = factory(callbacks=[Clears()])
    assert found(audit(make_trainer, "micro-batch"))["micro-batch"] == "last-micro-batch-only"
    assert capfd.readouterr() == ("", "")


def test_metrics_of_an_evaluation_are_judged() -> None:
    def metrics(prediction: Any) -> dict[str, float]:
        return {"rows": float(len(prediction.label_ids))}

    make_trainer = factory(
        model=classifier,
        data=rows(classes=3),
        compute_metrics=metrics,
        eval_dataset=rows(classes=2),
    )
    assert found(audit(make_trainer, "evaluation-batch")) == {"evaluation-batch": "exact"}


def of_classes(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    return functional.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch


def test_ranks_are_seen_by_a_trainer_that_does_not_ask_for_the_processor() -> None:
    make_trainer = factory(
        model=classifier,
        data=rows(classes=3),
        arguments={"use_cpu": False},
        compute_loss_func=of_classes,
    )
    # As many targets on either rank: a repeated row explains what a mean of the ranks' would too.
    assert found(audit(make_trainer, "ranks", "evaluation-ranks")) == {
        "ranks": "duplicated-examples",
        "evaluation-ranks": "duplicated-examples",
    }


def explodes(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    raise RuntimeError("the loss of a user is broken")


@pytest.mark.parametrize(
    ("make_trainer", "message"),
    [
        (factory(compute_loss_func=explodes), "the loss of a user is broken"),
        (factory(data=rows(3)), "3 rows"),
        (factory(arguments={"no_such_argument": 1}), "no_such_argument"),
        (lambda *, per_device_train_batch_size: None, "gradient_accumulation_steps"),
        (lambda **sizes: object(), "not a transformers.Trainer"),
        (
            lambda **sizes: factory()(per_device_train_batch_size=2, gradient_accumulation_steps=2),
            "pass its arguments on",
        ),
    ],
)
def test_what_cannot_be_run_says_why(make_trainer: Callable[..., Any], message: str) -> None:
    with pytest.raises(CheckError, match=message):
        audit(make_trainer, "micro-batch")


def test_the_command_finds_a_factory_in_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    support = Path(__file__).parent.parent / "support"
    monkeypatch.setenv("PYTHONPATH", str(support), prepend=":")
    file = tmp_path / "subject.py"
    file.write_text("from trainers import factory\nmake_trainer = factory()\n", encoding="utf-8")
    assert main(["check", str(file), "--axes", "micro-batch,order"]) == 0
    file.write_text(
        "def make_trainer(*, per_device_train_batch_size, gradient_accumulation_steps):\n"
        "    return 1 / 0\n",
        encoding="utf-8",
    )
    with pytest.raises(CheckError, match="ZeroDivisionError: division by zero"):
        check_subject(load_subject(str(file)))


def padded_left(features: list[Mapping[str, Any]]) -> dict[str, Tensor]:
    """As some collators do, whatever the tokenizer says; the model reads no mask."""
    longest = max(len(feature["input_ids"]) for feature in features)
    rows = [(longest - len(one["input_ids"]), one["input_ids"]) for one in features]
    return {
        "input_ids": torch.tensor([[3] * more + ids for more, ids in rows]),
        "labels": torch.tensor([[-100] * more + ids for more, ids in rows]),
    }


def test_the_padding_that_is_tried_is_that_of_the_collator() -> None:
    report = audit(factory(collator=padded_left), "micro-batch", "padding")
    assert set(found(report).values()) == {"padding-attended"}
    assert "columns on the left" in {axis.name: axis.reason for axis in report.axes}["padding"]


def test_the_cut_that_differs_is_diagnosed_if_the_telling_one_does_not() -> None:
    """3 + 3 + 2 rows are padded as far as all 8 are, single rows are not."""
    draw = torch.Generator().manual_seed(0)
    lengths = (12, 5, 7, 4, 12, 6, 9, 12)
    ids = [torch.randint(4, 61, (length,), generator=draw).tolist() for length in lengths]
    data = [{"input_ids": one} for one in ids]
    report = audit(factory(collator=padded_left, data=data), "micro-batch")
    assert found(report) == {"micro-batch": "padding-attended"}
