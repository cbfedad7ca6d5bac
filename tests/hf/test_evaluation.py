"""What is reported: losses and metrics, whatever the cut and the evaluation batch size."""

from pathlib import Path
from typing import Any

import pytest
from exact_cases import dpo, plain, reward, sft

from samestep.hf.exact_trainer import exact

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # of TRL against transformers

CASES: dict[str, Any] = {
    "causal": plain("LlamaForCausalLM", "next"),
    "masked": plain("BertForMaskedLM", "tokens"),
    "classes": plain("BertForSequenceClassification", "row", num_labels=3),
    "sft": sft(),
    "dpo": dpo(),
    "reward": reward(),
}
TIMES = ("runtime", "per_second", "preparation_time", "grad_norm", "epoch", "learning_rate")


def measured(numbers: dict[str, float]) -> dict[str, float]:
    return {k: v for k, v in numbers.items() if not any(part in k for part in TIMES)}


def evaluation(make: Any, size: int, folder: Path, *, apply: bool) -> dict[str, float]:
    trainer = make(4, 1, folder, per_device_eval_batch_size=size)
    return measured((exact(trainer) if apply else trainer).evaluate())


@pytest.mark.parametrize("name", CASES)
def test_evaluation_does_not_depend_on_its_batch_size(tmp_path: Path, name: str) -> None:
    make = CASES[name]
    whole = evaluation(make, 8, tmp_path, apply=True)
    plainly = evaluation(make, 8, tmp_path, apply=False)
    assert plainly.keys() == whole.keys()
    assert plainly["eval_loss"] == pytest.approx(whole["eval_loss"], rel=1e-6)
    for size in (1, 3):
        assert evaluation(make, size, tmp_path, apply=True) == pytest.approx(whole, rel=1e-5)
    if name in ("causal", "masked", "sft"):
        wrong = evaluation(make, 3, tmp_path, apply=False)["eval_loss"]
        assert wrong != pytest.approx(whole["eval_loss"], rel=1e-5)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", CASES)
def test_what_is_logged_does_not_depend_on_the_cut(tmp_path: Path, name: str) -> None:
    def logged(cut: tuple[int, int]) -> dict[str, float]:
        trainer = exact(CASES[name](*cut, tmp_path))
        trainer.train()
        return measured(trainer.state.log_history[0])

    whole = logged((8, 1))
    assert whole["loss"] > 0
    for cut in ((1, 8), (3, 3)):
        assert logged(cut) == pytest.approx(whole, rel=1e-5)
