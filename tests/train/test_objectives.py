"""Whole runs of each objective: it learns, and no memory knob changes the weights."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from experts import FAMILIES
from objective_runs import CASES, configured
from runs import read_lines, run_config
from safetensors.torch import load_file
from same_weights import check_same_weights
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from samestep.errors import ConfigError
from samestep.train.settings.base import finalize
from samestep.train.settings.objectives import settings_class
from samestep.train.trainer import train


@pytest.mark.sampled(8)
@pytest.mark.parametrize("case", CASES)
def test_it_learns(tmp_path: Path, case: str) -> None:
    train(configured(tmp_path, case, steps=12))
    before, after = read_lines(tmp_path / "out" / "eval.jsonl")
    metric, up = CASES[case][1:]
    assert (after["terms"][metric] > before["terms"][metric]) == up, (before, after)
    if case.split()[0] != "policy" and CASES[case][0].get("loss") != "dft":
        assert after["loss"] < before["loss"]  # those two have no loss that falls as they learn


@pytest.mark.sampled(16)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("precision", ["float64", "float32"])
def test_memory_knobs_do_not_change_the_weights(tmp_path: Path, case: str, precision: str) -> None:
    # Some can only be padded on the right.
    side = "right" if case in ("classification bert", "seq2seq t5") else "left"
    # transformers' routers compute in float32, whatever the weights are.
    bound = 1e-6 if case.split()[-1] in FAMILIES else 1e-12
    knobs = [{"micro_batch": 1}, {"micro_batch": 3, "padding": side}]
    run = partial(trained, tmp_path, case)
    check_same_weights(run, knobs, precision=precision, floor=1e-3, bound=bound)


HEADED = {
    "classification", "regression", "token_classification", "reward", "embedding",
    "question_answering",
}  # fmt: skip
"""Objectives that give some models a head, or a pooler, of random weights."""


def trained(folder: Path, case: str, precision: str, knobs: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights after two steps of SGD, which shows the gradient's size."""
    plain = {"optimizer": "sgd", "lr": 0.1, "max_grad_norm": None, "eval_data": None, "steps": 2}
    settings = {"precision": precision, "out": str(folder / "run"), "overwrite": True, **plain}
    if case.split()[0] in HEADED:
        settings["model"] = str(with_head(folder, case))
    train(configured(folder, case, **{**settings, **knobs}))
    return load_file(folder / "run" / "model" / "model.safetensors")


def with_head(folder: Path, case: str) -> Path:
    """The model of a case with the head that loading adds, which is random in each precision."""
    start = folder / "start"
    if not start.exists():
        still = {"optimizer": "sgd", "lr": 1e-12, "steps": 1, "eval_data": None}
        train(configured(folder, case, out=str(start), precision="float32", **still))
    return start / "model"


def test_a_fault_is_more_than_the_measured_rounding(tmp_path: Path) -> None:
    """The wrong version: a micro-batch size that changes the loss by one part in two thousand."""

    def run(precision: str, knobs: Mapping[str, Any]) -> dict[str, Tensor]:
        temperature = 0.0501 if knobs else 0.05
        return trained(tmp_path, "embedding bert", precision, {"temperature": temperature, **knobs})

    with pytest.raises(AssertionError, match="micro_batch"):
        check_same_weights(run, [{"micro_batch": 1}], precision="float32", floor=1e-3, bound=0)


def test_the_reference_may_be_live_run_once_or_read_from_rows(tmp_path: Path) -> None:
    common = {"precision": "float64", "optimizer": "sgd", "lr": 0.1, "steps": 3, "eval_data": None}
    found = []
    for at, how in enumerate([{}, {"precompute_reference": True}, {"reference_model": "tiny"}]):
        if "reference_model" in how:
            how = {"reference_model": str(tmp_path / "tiny")}
        train(configured(tmp_path, "dpo", out=str(tmp_path / str(at)), **common, **how))
        found.append(load_file(tmp_path / str(at) / "model" / "model.safetensors"))
    for other in found[1:]:
        assert all(torch.allclose(other[n], w, rtol=1e-11) for n, w in found[0].items())


def test_lora_with_dropout_resumes_bit_for_bit(tmp_path: Path) -> None:
    """The reference is the model without its adapters; a precomputed one is computed again."""
    lora = {"lora_rank": 2, "lora_dropout": 0.2, "precompute_reference": True, "save_every": 2}
    train(configured(tmp_path, "dpo", out=str(tmp_path / "whole"), steps=4, **lora))
    half = {"out": str(tmp_path / "half"), "steps": 4, "schedule": "linear", **lora}
    train(configured(tmp_path, "dpo", **half))
    for path in (tmp_path / "half" / "checkpoints" / "step-00000004").iterdir():
        path.unlink()
    (tmp_path / "half" / "checkpoints" / "step-00000004").rmdir()
    train(configured(tmp_path, "dpo", **half, resume=True))
    one, other = (
        load_file(tmp_path / out / "model" / "adapter_model.safetensors")
        for out in ("whole", "half")
    )
    assert all(torch.equal(one[name], other[name]) for name in one)


OWN = '''
import torch
import samestep

loss = samestep.CausalLMLoss()


def plain(model, micro):
    return loss(model, micro)


def spread(model, micro):
    """Cross entropy, and a bonus for hidden states that differ: a term that couples the batch."""
    inputs = samestep.model_inputs(micro)
    states = model(**inputs, output_hidden_states=True).hidden_states[-1]
    rows = states.flatten(0, 1)[:4]
    return {**loss(model, micro), "spread": samestep.Coupled(rows, torch.var, "rows", -0.1)}


coupled = samestep.TwoPass(spread)
whole = samestep.Objective(plain, {"token": lambda micro: 7.0})
'''


@pytest.mark.parametrize("name", ["plain", "coupled", "whole"])
def test_an_objective_of_ones_own(tmp_path: Path, name: str) -> None:
    (tmp_path / "own.py").write_text(OWN, encoding="utf-8")
    train(run_config(tmp_path, objective=f"{tmp_path / 'own.py'}:{name}", steps=2))
    line = read_lines(tmp_path / "out" / "log.jsonl")[-1]
    assert ("spread" in line["terms"]) == (name == "coupled")
    assert (line["counts"]["token"] == 7.0 * line["micro_batches"]) == (name == "whole")


@pytest.mark.parametrize(
    ("case", "head"),
    [
        ("classification", "score"),
        ("token_classification", "score"),
        ("question_answering bert", "qa_outputs"),
    ],
)
def test_lora_trains_the_new_head_whole(tmp_path: Path, case: str, head: str) -> None:
    train(configured(tmp_path, case, steps=2, lora_rank=2, lora_dropout=0.1))
    saved = load_file(tmp_path / "out" / "model" / "adapter_model.safetensors")
    assert [name for name in saved if head in name and "lora" not in name]
    assert not [name for name in saved if head in name and "lora" in name]
    assert any("lora_A" in name for name in saved)


def test_a_classifier_loads_again_with_its_classes(tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    train(configured(tmp_path, "classification", steps=1))
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "model")
    assert model.config.id2label == {0: "euros", 1: "forks", 2: "treats"}


def test_models_of_another_vocabulary_are_refused(tmp_path: Path) -> None:
    other = tmp_path / "large"
    config = LlamaConfig(
        vocab_size=999, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(other)
    for objective, field in (("dpo", "reference_model"), ("distillation", "teacher")):
        with pytest.raises(ConfigError, match=f"{field}: it has 999 embeddings"):
            train(configured(tmp_path, objective, **{field: str(other)}))
    assert not (tmp_path / "out").exists()


def test_a_teacher_of_another_vocabulary_is_refused_in_rows_too(tmp_path: Path) -> None:
    config = configured(tmp_path, "distillation taught")
    rows = Path(config.data)
    rows.write_text(rows.read_text().replace("[7, 8, 9]", "[7, 8, 99999]"), encoding="utf-8")
    with pytest.raises(ConfigError, match="the teacher names token 99999"):
        train(config)


def test_routers_of_a_dense_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no router"):
        train(run_config(tmp_path, router_loss="window"))


@pytest.mark.parametrize(
    ("objective", "settings", "message"),
    [
        ("dpo", {"loss_weights": (1.0, 2.0)}, "loss_weights: 2 for 1 losses"),
        ("dpo", {"loss": ("exo_pair",)}, "exo_pair needs one above 0"),
        ("dpo", {"loss": ("sft", "sft")}, "name each loss once"),
        ("causal_lm", {"loss": "dft", "z_loss": 0.1}, "dft goes with neither"),
        ("seq2seq", {"padding": "left"}, "pads to the right"),
        ("policy", {"precompute_reference": True}, "live reference"),
        ("distillation", {"temperature": 2.0}, "it needs whole logits"),
    ],
)
def test_settings_that_do_not_fit(objective: str, settings: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        finalize(settings_class(objective)(model="m", data="d", out="o", **settings))
