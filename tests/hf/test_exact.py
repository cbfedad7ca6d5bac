"""One effective batch, cut in several ways, gives every weight the same gradient with exact()."""

from pathlib import Path
from typing import Any

import pytest
import torch
from exact_cases import EXACT, dpo, gradients, plain, reward, sft, worst

from samestep.hf.exact_trainer import exact

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # of TRL against transformers

CASES: dict[str, Any] = {
    "causal": plain("LlamaForCausalLM", "next"),
    "smoothed": plain("LlamaForCausalLM", "next", arguments={"label_smoothing_factor": 0.1}),
    "masked": plain("BertForMaskedLM", "tokens"),
    "bert-classes": plain("BertForSequenceClassification", "row", num_labels=3),
    "llama-classes": plain("LlamaForSequenceClassification", "row", num_labels=3),
    "regression": plain("BertForSequenceClassification", "value", num_labels=1),
    "tags": plain("BertForTokenClassification", "tokens", num_labels=3),
    "answers": plain("BertForQuestionAnswering", "answer"),
    "seq2seq": plain("T5ForConditionalGeneration", "next"),
    "sft": sft(),
    "sft-dft": sft(loss_type="dft"),
    "dpo": dpo(),
    "dpo-sft": dpo(loss_type=["sft"]),
    "reward": reward(),
}
WRONG_TODAY = {"masked", "bert-classes", "llama-classes", "tags", "dpo-sft"}
"""Those whose step depends on the cut into equal micro-batches without it."""

SHORT_WRONG_TODAY = WRONG_TODAY | {"answers", "regression", "dpo", "reward", "seq2seq"}
"""Those whose step does, at the latest, with a micro-batch shorter than the others."""


def run(make: Any, cut: tuple[int, int], folder: Path, *, apply: bool) -> dict[str, torch.Tensor]:
    trainer = make(*cut, folder)
    (gradient,) = gradients(exact(trainer) if apply else trainer)
    return gradient


@pytest.mark.sampled(7)
@pytest.mark.parametrize("name", CASES)
def test_the_gradient_does_not_depend_on_the_cut(tmp_path: Path, name: str) -> None:
    make = CASES[name]
    whole = run(make, (8, 1), tmp_path, apply=True)
    for cut in ((1, 8), (2, 4), (3, 3)):  # the last of three rows is one of two
        assert worst(whole, run(make, cut, tmp_path, apply=True)) < EXACT, cut
    assert worst(whole, run(make, (8, 1), tmp_path, apply=False)) < EXACT
    if name in WRONG_TODAY:
        assert worst(whole, run(make, (1, 8), tmp_path, apply=False)) > 1e-2
    if name in SHORT_WRONG_TODAY:
        assert worst(whole, run(make, (3, 3), tmp_path, apply=False)) > 1e-3
