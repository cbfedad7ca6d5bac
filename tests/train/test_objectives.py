"""Whole runs of each objective: it learns, and no memory knob changes the weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from experts import FAMILIES, experts_folder
from objective_rows import write_rows_of
from runs import bert_folder, llama_folder, read_lines, run_config, t5_folder
from safetensors.torch import load_file

from samestep.train.trainer import train

CASES: dict[str, tuple[dict[str, Any], str, bool]] = {
    # objective: settings, the metric that must move, whether up
    "causal_lm mixtral": ({"router_loss": "window"}, "nll", False),
    "causal_lm deepseek_v3": (
        {"router_loss": "sequence", "router_z_loss": 1e-3, "router_bias_rate": 0.01},
        "nll",
        False,
    ),
    "causal_lm dft": ({"loss": "dft"}, "nll", False),
    "dpo": ({"beta": 0.5}, "margin", True),
    "dpo mixture": ({"loss": ("aot", "sft"), "loss_weights": (1, 0.1)}, "margin", True),
    "simpo": ({}, "margin", True),
    "cpo": ({}, "margin", True),
    "orpo": ({}, "nll", False),
    "kto": ({"beta": 0.5}, "kto", False),
    "kto once": ({"precompute_reference": True}, "reward_undesirable", False),
    "policy": ({"baseline": "rloo", "normalize": "token"}, "score", True),
    "policy kl": ({"kl_weight": 0.1, "ratio": "sequence"}, "score", True),
    "distillation": ({"divergence": "jensen_shannon", "lr": 1e-3}, "divergence", False),
    "distillation kl": ({"temperature": 2.0}, "divergence", False),
    "reward": ({"centring": 0.01}, "accuracy", True),
    "classification": ({"lr": 3e-2}, "accuracy", True),
    "classification bert": ({"lr": 3e-3}, "cross_entropy", False),
    "regression": ({}, "squared_error", False),
    "token_classification": ({}, "accuracy", True),
    "embedding": ({"temperature": 0.2}, "contrastive", False),
    "embedding bert": ({"symmetric": True}, "contrastive", False),
    "masked_lm bert": ({}, "nll", False),
    "seq2seq t5": ({"label_smoothing": 0.1}, "nll", False),
    "question_answering bert": ({}, "cross_entropy", False),
}


def configured(folder: Path, case: str, **changes: Any) -> Any:
    objective, settings = case.split()[0], CASES[case][0]
    kind = case.split()[-1]
    if kind in FAMILIES:
        settings = {**settings, "model": str(experts_folder(folder / kind, kind))}
    if objective == "distillation":
        llama_folder(folder / "teacher", seed=1, scale=20)
        settings = {**settings, "teacher": str(folder / "teacher")}
    if kind == "t5":
        settings = {**settings, "model": str(t5_folder(folder / kind))}
    if "bert" in case:
        settings = {**settings, "model": str(bert_folder(folder / "bert"))}
    data = {
        name: write_rows_of(objective, folder / f"{name}.jsonl", number, seed=number)
        for name, number in SIZES.items()
    }
    return run_config(folder, objective=objective, **{**data, **settings, **changes})


SIZES = {"data": 32, "eval_data": 12}


@pytest.mark.parametrize("case", CASES)
def test_it_learns(tmp_path: Path, case: str) -> None:
    train(configured(tmp_path, case, steps=12))
    before, after = read_lines(tmp_path / "out" / "eval.jsonl")
    metric, up = CASES[case][1:]
    assert (after["terms"][metric] > before["terms"][metric]) == up, (before, after)
    if case.split()[0] != "policy" and CASES[case][0].get("loss") != "dft":
        assert after["loss"] < before["loss"]  # those two have no loss that falls as they learn


@pytest.mark.parametrize("case", CASES)
def test_memory_knobs_do_not_change_the_weights(tmp_path: Path, case: str) -> None:
    found = []
    knobs: list[dict[str, Any]] = [{}, {"micro_batch": 1}, {"micro_batch": 3, "padding": "left"}]
    for at, knob in enumerate(knobs):
        out = tmp_path / str(at)
        common = {"dtype": "float64", "steps": 2, "optimizer": "sgd", "lr": 0.1, "eval_data": None}
        if case in ("classification bert", "seq2seq t5") and "padding" in knob:
            knob = {**knob, "padding": "right"}  # some can only be padded there
        train(configured(tmp_path, case, out=str(out), **{**common, **knob}))
        found.append(load_file(out / "model" / "model.safetensors"))
    for other in found[1:]:
        # A weight that the loss does not depend on (a bias inside a softmax) holds only noise.
        pairs = [(w, other[name], max(float(w.norm()), 1e-3)) for name, w in found[0].items()]
        # transformers' routers compute in float32, whatever the weights are.
        bound = 1e-6 if case.split()[-1] in FAMILIES else 1e-12
        assert max(float((one - two).norm()) / norm for one, two, norm in pairs) < bound


def test_the_reference_may_be_live_run_once_or_read_from_rows(tmp_path: Path) -> None:
    common = {"dtype": "float64", "optimizer": "sgd", "lr": 0.1, "steps": 3, "eval_data": None}
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
