"""Former releases, by a trainer that has what theirs had: served, or the one to take is named."""

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as hf
from exact_cases import gradients, plain, worst

import samestep
from samestep.audit.adapters.trainer import TrainerSubject
from samestep.audit.adapters.trainer_setup import padding_side, padding_token
from samestep.errors import ConfigError, StepError
from samestep.hf.evaluation import average_metrics
from samestep.hf.exact_trainer import exact
from samestep.hf.proof import select_rows
from samestep.hf.units import PAIRS, known_unit
from samestep.hf.window import backward_of


class Former(hf.Trainer):
    """As from 4.46 to 5.18: no switch, a division of its own, and a log that rounds the loss."""

    __module__ = "transformers.former"  # the library's own, not a user's class

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        del self._loss_shifts_labels

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any = None) -> Any:
        return list(itertools.islice(epoch_iterator, num_batches)), None

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        model.train()
        loss = self.compute_loss(model, self._prepare_inputs(inputs))
        loss = loss / self.args.gradient_accumulation_steps
        self.accelerator.backward(loss)
        return loss.detach()

    def log(self, logs: dict[str, float], *args: Any, **options: Any) -> None:
        rounded = {key: round(value, 4) if key == "loss" else value for key, value in logs.items()}
        super().log(rounded, *args, **options)


@pytest.fixture
def _no_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(hf.Trainer, "loss_is_scaled_for_ga")


def factory(folder: Path, name: str, labels: str, *, apply: bool) -> Any:
    make = plain(name, labels, trainer=Former, number=8)

    def make_trainer(
        *, per_device_train_batch_size: int, gradient_accumulation_steps: int, **_: Any
    ) -> Any:
        trainer = make(per_device_train_batch_size, gradient_accumulation_steps, folder)
        return exact(trainer) if apply else trainer

    return make_trainer


@pytest.mark.sampled(4)
@pytest.mark.usefixtures("_no_switch")
@pytest.mark.parametrize("name", ["LlamaForCausalLM", "BertForMaskedLM"])
def test_a_former_trainer_is_made_exact(tmp_path: Path, name: str) -> None:
    make = plain(name, "next" if "Llama" in name else "tokens", trainer=Former)
    (whole,) = gradients(exact(make(8, 1, tmp_path)))
    for cut in ((1, 8), (3, 3)):
        (gradient,) = gradients(exact(make(*cut, tmp_path)))
        assert worst(whole, gradient) < 2e-6, cut
    (before,) = gradients(make(1, 8, tmp_path))
    assert worst(whole, before) > 1e-2


@pytest.mark.usefixtures("_no_switch")
def test_the_auditor_finds_a_former_trainer_exact(tmp_path: Path) -> None:
    make = factory(tmp_path, "BertForMaskedLM", "tokens", apply=True)
    report = samestep.check(make, axes=("micro-batch", "short-window", "reported"))
    # The four digits of what it logs are no difference.
    verdicts = {axis.name: axis.verdict for axis in report.axes}
    assert set(verdicts.values()) == {"exact"}, verdicts


@pytest.mark.parametrize(
    ("name", "labels", "shifts"),
    [("LlamaForCausalLM", "next", True), ("BertForMaskedLM", "tokens", False),
     ("T5ForConditionalGeneration", "next", False)],
)  # fmt: skip
def test_a_trainer_that_does_not_say_whether_it_shifts_is_asked(
    tmp_path: Path, name: str, labels: str, shifts: bool
) -> None:
    subject = TrainerSubject(factory(tmp_path, name, labels, apply=False), name="former")
    counts = subject.example_counts()
    assert counts is not None
    batches = [subject._batch((at,)) for at in range(subject.size)]
    targets = [batch["labels"][:, 1:] if shifts else batch["labels"] for batch in batches]
    assert [one.targets for one in counts] == [int((one != -100).sum()) for one in targets]


def test_without_windows_the_release_to_take_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = plain("LlamaForCausalLM", "next")(4, 2, tmp_path)
    monkeypatch.delattr(hf.Trainer, "get_batch_samples")
    with pytest.raises(ConfigError, match=r"exact\(\) needs transformers 4\.46 or later"):
        exact(trainer)


def test_a_type_of_loss_that_is_told_by_its_function_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = plain("LlamaForCausalLM", "next")(4, 2, tmp_path)
    expected = known_unit(trainer)
    assert expected is not None
    monkeypatch.setattr(type(trainer.model), "loss_type", property(_absent), raising=False)
    vars(trainer.model).pop("loss_type", None)
    assert not hasattr(trainer.model, "loss_type")
    assert known_unit(trainer) is expected


def _absent(model: Any) -> Any:
    raise AttributeError("loss_type")


def test_the_division_that_accelerate_states_is_undone() -> None:
    weight = torch.nn.Parameter(torch.tensor(3.0))

    def backward(loss: torch.Tensor) -> None:
        (loss / accelerator.gradient_accumulation_steps).backward()

    accelerator = SimpleNamespace(gradient_accumulation_steps=4, backward=backward)
    with backward_of(accelerator, lambda: 2.0 * weight):
        accelerator.backward(weight / 7)  # whatever the trainer made of it
    assert weight.grad is not None
    assert weight.grad.item() == 2.0
    assert accelerator.backward is backward
    with pytest.raises(StepError, match="apex"), backward_of(accelerator, lambda: weight):
        pass


def test_pairs_whose_halves_have_names_of_their_own() -> None:
    batch = {
        "chosen_input_ids": torch.ones(3, 5),
        "rejected_input_ids": torch.zeros(3, 4),
        "prompt": ["a", "b", "c"],
    }
    assert int(PAIRS.count(batch)) == 3
    part = select_rows(batch, [0, 2], paired=True)
    assert part["chosen_input_ids"].shape[0] == part["rejected_input_ids"].shape[0] == 2
    stacked = {"input_ids": torch.arange(8).reshape(4, 2)}
    assert int(PAIRS.count(stacked)) == 2
    assert select_rows(stacked, [1], paired=True)["input_ids"].tolist() == [[2, 3], [6, 7]]


@pytest.mark.parametrize(
    ("names", "settings", "words"),
    [
        (("GKDTrainer", "SFTTrainer"), {}, "GKDTrainer is not known to be a mean"),
        (("DPOTrainer",), {"rpo_alpha": 1.0}, "rpo_alpha=1 adds a mean over tokens"),
    ],
)
def test_what_only_derives_from_a_served_trainer_is_refused(
    tmp_path: Path, names: tuple[str, ...], settings: dict[str, Any], words: str
) -> None:
    trainer = plain("LlamaForCausalLM", "next")(4, 2, tmp_path)
    kind: type = hf.Trainer
    for name in reversed(names):
        kind = type(name, (kind,), {"__module__": "trl.trainer.some"})
    trainer.__class__ = kind
    for key, value in settings.items():
        setattr(trainer.args, key, value)
    with pytest.raises(ConfigError, match=words):
        exact(trainer)


@pytest.mark.parametrize("name", ["processing_class", "tokenizer"])
def test_the_tokenizer_is_found_by_either_name(name: str) -> None:
    held = SimpleNamespace(padding_side="left", pad_token_id=7)
    trainer = SimpleNamespace(model=SimpleNamespace(), **{name: held})
    assert padding_side(trainer) == "left"
    assert padding_token(trainer) == 7


def test_metrics_whose_unit_earlier_batches_do_not_tell_stay_as_they_are() -> None:
    """TRL's pairs of before 1.0 have no mask of completions: means over pairs are mended alone."""
    kind = type("DPOTrainer", (), {"__module__": "trl.trainer.dpo_trainer"})
    trainer = kind()
    held = {"rewards/chosen": [1.0, 4.0], "logits/chosen": [1.0, 2.0]}
    trainer._metrics = {"train": held}
    average_metrics(trainer, "train", [{"pairs": 1.0}, {"pairs": 3.0}])
    assert held == {"rewards/chosen": [3.25], "logits/chosen": [1.0, 2.0]}
