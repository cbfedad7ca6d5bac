"""A router loss over the window: two passes, with the loss that the model itself computes."""

from pathlib import Path
from typing import Any

import pytest
import transformers as hf
from exact_cases import (
    BALANCED,
    EXACT,
    ROUTED,
    dpo,
    gradients,
    of_trl,
    plain,
    worst,
)
from trl import SFTConfig, SFTTrainer

from samestep.audit.adapters.instrument import force_float64
from samestep.errors import ConfigError, StepError
from samestep.hf.exact_trainer import Exact, exact

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # of TRL against transformers


def eagerly(make: Any) -> Any:
    """A factory whose experts are computed in float64 too."""

    def made(*args: Any, **options: Any) -> Any:
        trainer = make(*args, **options)
        trainer.model.set_experts_implementation("eager")
        return trainer

    return made


mixtral = eagerly(plain("MixtralForCausalLM", "next", **BALANCED))
unbalanced = eagerly(plain("MixtralForCausalLM", "next", **ROUTED))
sft = of_trl(
    SFTTrainer, SFTConfig, "prompt", "completion", model="MixtralForCausalLM", shape=ROUTED
)
TRAINERS = {"trainer": mixtral, "sft": eagerly(sft(router_aux_loss_coef=0.3))}


def trained(make: Any, cut: tuple[int, int], folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The gradient of the first step, and all that is reported of training and evaluation."""
    trainer = exact(make(*cut, folder, per_device_eval_batch_size=cut[0]), two_pass=True)
    found = gradients(trainer)[0]
    with force_float64():
        reported = {**trainer.state.log_history[0], **trainer.evaluate()}
    names = ("loss", "aux_loss", "num_tokens", "eval_loss", "eval_aux_loss")
    return found, {name: reported[name] for name in names if name in reported}


@pytest.mark.parametrize("name", TRAINERS)
def test_no_cut_changes_the_gradient_or_what_is_reported(tmp_path: Path, name: str) -> None:
    make = TRAINERS[name]
    whole, reported = trained(make, (8, 1), tmp_path)
    (plainly,) = gradients(make(8, 1, tmp_path))
    assert worst(plainly, whole) < EXACT  # one micro-batch: the model's own loss
    gradient, again = trained(make, (3, 3), tmp_path)
    assert worst(whole, gradient) < EXACT
    assert again == pytest.approx(reported, rel=1e-6)
    assert len(again) == (5 if name == "sft" else 2)


def test_routers_balanced_in_each_micro_batch_give_another_gradient(tmp_path: Path) -> None:
    """What the trainer does by itself; and the gradient holds that of the router loss."""
    whole, _ = trained(mixtral, (8, 1), tmp_path)
    (wrong,) = gradients(mixtral(1, 8, tmp_path))
    assert worst(whole, wrong) > 1e-3
    (without,) = gradients(unbalanced(8, 1, tmp_path))
    assert worst(whole, without) > 1e-3


def test_dropout_is_that_of_the_second_pass_and_empty_micro_batches_are_balanced(
    tmp_path: Path,
) -> None:
    """Router logits that are drawn otherwise in the second pass would be refused."""

    class Mine(Exact, hf.Trainer):
        samestep_two_pass = True

    def trainer(size: int, accumulation: int, **config: Any) -> Any:
        make = plain("MixtralForCausalLM", "next", trainer=Mine, **(BALANCED | config))
        made = eagerly(make)(size, accumulation, tmp_path)
        for row in made.train_dataset[2:4]:
            row["labels"] = [-100] * len(row["labels"])
        return made

    (whole,) = gradients(trainer(8, 1))
    (cut,) = gradients(trainer(2, 4))
    assert worst(whole, cut) < EXACT
    (dropped,) = gradients(trainer(2, 4, attention_dropout=0.5))
    assert worst(whole, dropped) > 1e-3


def refusals(tmp_path: Path) -> dict[str, Any]:
    def switch() -> Any:
        made = plain("SwitchTransformersForConditionalGeneration", "next")(4, 2, tmp_path)
        made.model.config.output_router_logits = True
        return made

    def compiled() -> Any:
        made = mixtral(4, 2, tmp_path)
        made.args.torch_compile = True
        return made

    def of_pairs() -> Any:
        made = dpo()(4, 2, tmp_path)
        made.aux_loss_enabled = True
        return made

    return {
        "the trainer has no router loss": lambda: unbalanced(4, 2, tmp_path),
        "balance by load_balancing_loss_func": switch,
        "torch_compile=False": compiled,
        "in another unit: set router_aux_loss_coef": of_pairs,
    }


@pytest.mark.parametrize("words", refusals(Path()))
def test_what_two_passes_do_not_serve_is_refused(tmp_path: Path, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        exact(refusals(tmp_path)[words](), two_pass=True)


def test_without_being_asked_for_it_is_refused(tmp_path: Path) -> None:
    for make in TRAINERS.values():
        with pytest.raises(ConfigError, match=r"exact\(trainer, two_pass=True\)"):
            exact(make(4, 2, tmp_path))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"router_aux_loss_coef": 0.0}, ConfigError, "does not hold the model's router loss"),
        ({"label_smoothing_factor": 0.1}, ConfigError, "does not hold the model's router loss"),
        ({"unmasked": True}, StepError, "Return the attention_mask"),
    ],
)
def test_a_loss_that_cannot_be_balanced_is_refused(
    tmp_path: Path, change: dict[str, Any], error: type, words: str
) -> None:
    config = {name: value for name, value in change.items() if name in BALANCED}
    smoothed = {name: value for name, value in change.items() if "smoothing" in name}
    made = eagerly(plain("MixtralForCausalLM", "next", arguments=smoothed, **(BALANCED | config)))
    trainer = made(4, 2, tmp_path)
    if "unmasked" in change:
        collate = trainer.data_collator
        trainer.data_collator = lambda rows: {
            name: value for name, value in collate(rows).items() if name != "attention_mask"
        }
    with pytest.raises(error, match=words):
        exact(trainer, two_pass=True).train()
