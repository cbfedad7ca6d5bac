"""Metrics beside the loss, evaluation sets by name, and the model that is chosen by them."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import llama_folder, read_lines, run_config, write_rows
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from samestep.data.collate import collate_records
from samestep.data.records import Records
from samestep.data.rows import Row
from samestep.data.tokenize import tokenize_rows
from samestep.engine.evaluate import evaluate
from samestep.engine.terms import Objective
from samestep.errors import ConfigError, StepError
from samestep.models.probes import choose_padding
from samestep.objectives.language import CausalLMLoss
from samestep.train import evaluator
from samestep.train.choice import Choice
from samestep.train.command import read_settings
from samestep.train.metrics import finished, with_metrics
from samestep.train.trainer import train

NAMES = ("perplexity", "token_accuracy", "sequence_accuracy")

OWN = """
from samestep import Objective, Term

def tokens(model, micro):  # a metric that nobody has to train for: tokens a row
    return Term(micro["labels"].ne(-100).sum().double(), unit="example")

def mean(model, micro):
    targets = micro["labels"][micro["labels"] != -100]
    return Term(targets.double().mean(), unit="token")

def nll(model, micro):
    return Term(micro["labels"].sum().double(), unit="token")

def column(model, micro):
    return Term(micro["answer"].sum(), unit="token")

number = 3
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("choice")
    llama_folder(path / "tiny")
    write_rows(path / "rows.jsonl", 20)
    write_rows(path / "math.jsonl", 5, seed=1)
    write_rows(path / "other.jsonl", 4, seed=2)
    (path / "own.py").write_text(OWN, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def learned(folder: Path) -> tuple[Any, Records, dict[str, float]]:
    """A model in float64 that knows two of some ragged rows by heart, these, and its metrics."""
    model = AutoModelForCausalLM.from_pretrained(folder / "tiny", dtype=torch.float64)
    tokenizer = AutoTokenizer.from_pretrained(folder / "tiny")
    texts = [
        ("a", "b"),
        ("How many? ", "19."),
        ("What? ", "16 + 3 = 19. Yes, of course."),
        ("x", "yy"),
    ]
    rows = [
        Row({"prompt": a, "completion": b, "weight": 1 + at % 2}, f"row {at}")
        for at, (a, b) in enumerate(texts)
    ]
    records = Records(tokenize_rows(rows, tokenizer))
    micro = collate_records([records[0], records[1]], padding="right", pad_id=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        CausalLMLoss()(model, micro)["nll"].total.backward()
        optimizer.step()
    expected = plain(model.eval(), records)
    choose_padding(model, "none")
    return model, records, expected


def plain(model: Any, records: Records) -> dict[str, float]:
    """The metrics of whole logits, row by row."""
    sums = dict.fromkeys(("nll", "correct", "right", "tokens", "rows"), 0.0)
    for at in range(len(records)):
        example = records[at].sequences[0]
        with torch.no_grad():
            logits = model(example.input_ids[None]).logits[0, :-1]
        kept = example.labels[1:] != -100
        labels = example.input_ids[1:][kept]
        losses = torch.nn.functional.cross_entropy(logits[kept], labels, reduction="none")
        correct = logits[kept].argmax(-1) == labels
        sums["nll"] += example.weight * float(losses.sum())
        sums["correct"] += example.weight * float(correct.sum())
        sums["right"] += example.weight * float(correct.all())
        sums["tokens"] += example.weight * len(labels)
        sums["rows"] += example.weight
    return {
        "perplexity": math.exp(sums["nll"] / sums["tokens"]),
        "token_accuracy": sums["correct"] / sums["tokens"],
        "sequence_accuracy": sums["right"] / sums["rows"],
    }


@pytest.mark.parametrize("size", [1, 3, 4])
def test_metrics_are_those_of_whole_logits_for_every_evaluation_batch_size(
    learned: tuple[Any, Records, dict[str, float]], size: int
) -> None:
    model, records, expected = learned
    batches = [
        collate_records([records[at] for at in part.tolist()], padding="none", pad_id=1)
        for part in torch.arange(len(records)).split(size)
    ]
    objective = with_metrics(Objective(CausalLMLoss(normalize="sequence")), NAMES)
    report = finished(evaluate(model, batches, objective.loss_fn), NAMES)
    assert 0 < expected["sequence_accuracy"] < 1
    assert {name: report.terms[name] for name in NAMES} == pytest.approx(expected, rel=1e-12)
    # Neither the exponential of a mean of means, nor a mean of exponentials, is the perplexity.
    assert math.exp(report.terms["nll"]) != pytest.approx(expected["perplexity"], rel=1e-3)


def test_of_equal_values_the_first_is_the_best() -> None:
    choice = Choice()
    for step, value in ((2, 3.0), (4, 2.0), (6, 2.0), (8, 1.95), (10, math.nan)):
        choice = choice.after(step, value, higher=False, min_improvement=0.1)
    assert choice == Choice(judged=10, step=4, value=2.0, worse=3)
    assert choice.after(12, 2.5, higher=True).step == 12


RUN: dict[str, Any] = {
    "precision": "float64",
    "lr": 0.5,
    "steps": 6,
    "eval_every": 1,
    "keep": 1,
    "schedule": "constant",
}


def chosen(folder: Path, out: str, **changes: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    sets = {"math": str(folder / "math.jsonl"), "other": str(folder / "other.jsonl")}
    settings = {**RUN, "eval_data": sets, "best": "math/loss", **changes}
    summary = train(run_config(folder, out=str(folder / out), **settings))
    return summary, read_lines(folder / out / "eval.jsonl")


def weights_of(folder: Path, out: str) -> dict[str, torch.Tensor]:
    return load_file(folder / out / "model" / "model.safetensors")


def test_the_best_checkpoint_is_kept_exported_and_the_same_for_every_split(folder: Path) -> None:
    summary, lines = chosen(folder, "a", metrics=NAMES)
    values = {
        line["step"]: line["loss"] for line in lines if line["set"] == "math" and line["step"]
    }
    step = min(values, key=lambda at: values[at])
    assert step < 5, "the run must get worse, or nothing is tested"
    assert summary["best"] == {"metric": "math/loss", "step": step, "value": values[step]}
    kept = sorted(path.name for path in (folder / "a" / "checkpoints").iterdir())
    assert kept == [f"step-{step:08d}", "step-00000006"]
    # The model is that of the step: it is what a run of so many steps has (its rate is constant).
    short = {"eval_data": None, "best": None, "eval_every": None, "metrics": ()}
    chosen(folder, "short", **{**short, "steps": step})
    chosen(folder, "b", micro_batch=1, padding="left", keep=0)
    exported, expected = weights_of(folder, "b"), weights_of(folder, "short")
    for name, weight in expected.items():
        assert float((exported[name] - weight).norm() / weight.norm()) < 1e-9, name
    assert not (folder / "b" / "checkpoints").exists()
    sets = [line["set"] for line in lines]
    assert sets == ["math", "other"] * 7
    assert all(set(NAMES) <= set(line["terms"]) for line in lines)


def test_a_run_that_waits_too_long_ends_and_resume_remembers_both(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    summary, lines = chosen(folder, "whole", patience=2)
    assert summary["stopped_early"]
    assert summary["steps"] == summary["best"]["step"] + 2 < 6
    # Killed after the first evaluation that was worse was written, before it was saved.
    real, calls = evaluator.evaluate, iter(range(99))

    def dies(*arguments: Any, **options: Any) -> Any:
        if next(calls) == 2 * (summary["best"]["step"] + 2) - 1:
            raise RuntimeError("power cut")
        return real(*arguments, **options)

    monkeypatch.setattr(evaluator, "evaluate", dies)
    with pytest.raises(RuntimeError, match="power cut"):
        chosen(folder, "broken", patience=2)
    monkeypatch.undo()
    resumed, again = chosen(folder, "broken", patience=2, resume=True)
    assert (resumed["best"], resumed["steps"]) == (summary["best"], summary["steps"])
    assert [(line["step"], line["set"], line["loss"]) for line in again] == [
        (line["step"], line["set"], line["loss"]) for line in lines
    ]
    one, other = weights_of(folder, "broken"), weights_of(folder, "whole")
    assert all(torch.equal(one[name], weight) for name, weight in other.items())
    with pytest.raises(ConfigError, match="eval_every: was 1, is 2"):
        chosen(folder, "broken", patience=2, resume=True, eval_every=2)


def test_a_metric_of_ones_own_is_reported_and_chosen_by(folder: Path) -> None:
    own = f"{folder / 'own.py'}:tokens"
    summary, lines = chosen(
        folder, "own", metrics=(own,), best="other/tokens", best_is="highest", steps=2
    )
    assert summary["best"]["step"] == 1
    assert lines[1]["terms"]["tokens"] == summary["best"]["value"] > 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metrics": ["perplexty"]}, "no metric 'perplexty'; did you mean 'perplexity'"),
        ({"metrics": ["OWN:nll"]}, "nll is there twice"),
        ({"metrics": ["OWN:number"]}, "own.py:number is int, not a function"),
        ({"metrics": ["OWN:column"]}, r"own.py:column fails .*KeyError: 'answer' \(it has:"),
        ({"metrics": ["none.py:x"]}, "metrics: there is no file none.py"),
        (
            {"best": "math/accurracy", "best_is": "highest"},
            "no 'accurracy'; did you mean 'accuracy'.*it has: loss, nll",
        ),
        ({"best": "loss"}, r"must say of which set, as SET/NAME \(sets: math, other\)"),
        ({"best": "maths/loss"}, "no set 'maths'; did you mean 'math'"),
        ({"best": "math/tokens"}, "whether a high math/tokens is good is not known"),
        ({"eval_data": None}, "metrics and best: there is nothing to evaluate on"),
        ({"best": None, "patience": 3, "best_is": "lowest"}, "patience is given(.|\n)*best_is is"),
        ({"eval_every": None}, "best: without eval_every the model is evaluated once"),
        ({"eval_data": {}}, "the sets need names"),
        ({"eval_data": {"a/b": "x.jsonl"}}, "names without a slash"),
        ({"objective": "dpo"}, "perplexity belong to objective causal_lm"),
    ],
    ids=str,
)
def test_what_cannot_be_chosen_by_is_said_before_anything_is_written(
    folder: Path, changes: dict[str, Any], message: str
) -> None:
    changes = json.loads(json.dumps(changes).replace("OWN", str(folder / "own.py")))
    with pytest.raises(ConfigError, match=message):
        chosen(folder, "refused", **{"metrics": ["perplexity"], **changes})
    assert not (folder / "refused").exists()


def test_a_metric_that_is_a_mean_is_refused(folder: Path) -> None:
    with pytest.raises(StepError, match=r"'mean'.*reduction='sum'"):
        chosen(folder, "mean", metrics=(f"{folder / 'own.py'}:mean",), steps=1)


def test_sets_are_named_in_yaml_and_metrics_on_the_command_line(folder: Path) -> None:
    path = folder / "run.yaml"
    path.write_text(
        "model: m\ndata: d\nout: o\neval_every: 5\neval_data:\n  math: a.jsonl\n  code: [b, c]\n",
        encoding="utf-8",
    )
    flags = ["--metrics", "perplexity", "token_accuracy", "--best", "code/perplexity"]
    settings = read_settings([str(path), *flags])
    assert settings.eval_data == {"math": "a.jsonl", "code": ("b", "c")}
    assert settings.metrics == ("perplexity", "token_accuracy")
    assert read_settings([str(path), "--eval-data", "e", "f"]).eval_data == ("e", "f")
    with pytest.raises(ConfigError, match="perplexty"):
        read_settings([str(path), "--metrics", "perplexty"])
