"""Answers that a model generates at evaluations: exact match, patterns, a table of samples."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from runs import llama_folder, read_lines, run_config
from transformers import AutoModelForCausalLM, AutoTokenizer

from samestep.errors import ConfigError, DataError
from samestep.train import answers
from samestep.train.answers import Answer, is_right, with_exact_match
from samestep.train.log import _cell
from samestep.train.settings.evaluation import EvaluationFields
from samestep.train.trainer import train

ROWS = [
    {"prompt": "Emma? ", "completion": "19 forks.", "weight": 3},
    {"prompt": "How many forks? ", "completion": "16", "weight": 1},
    {"prompt": "Stop. ", "completion": "Yes, of course. = 7."},
]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("answers")
    llama_folder(path / "tiny")
    write(path / "rows.jsonl", ROWS[:1] * 4 + ROWS[1:])
    write(path / "eval.jsonl", ROWS)
    return path


def run(folder: Path, out: str, **changes: Any) -> list[dict[str, Any]]:
    settings = {
        "precision": "float64",
        "steps": 16,
        "batch_size": 6,
        "lr": 3e-2,
        "eval_every": 8,
        "eval_data": str(folder / "eval.jsonl"),
        "metrics": ("exact_match",),
        "samples": 2,
        "sample_tokens": 12,
        "schedule": "constant",
        **changes,
    }
    train(run_config(folder, out=str(folder / out), **settings))
    return read_lines(folder / out / "eval.jsonl")


def test_answers_are_those_of_the_model_and_the_same_for_every_split(folder: Path) -> None:
    lines = run(folder, "a", best="exact_match")
    shares = [line["terms"]["exact_match"] for line in lines]
    assert shares[0] == 0
    assert shares[-1] > 0, "it has learned nothing: there is nothing to test"
    assert all(line["counts"]["answer"] == 5 for line in lines)
    shown = read_lines(folder / "a" / "samples.jsonl")
    assert [(line["step"], line["row"]) for line in shown] == [
        (step, row) for step in (0, 8, 16) for row in (1, 2)
    ]
    split = run(folder, "b", best="exact_match", micro_batch=1, padding="left")
    assert [line["terms"]["exact_match"] for line in split] == shares
    assert read_lines(folder / "b" / "samples.jsonl") == shown
    # The same as transformers generates from the model that was saved.
    summary = json.loads((folder / "a" / "summary.json").read_text("utf-8"))
    chosen = [line for line in shown if line["step"] == summary["best"]["step"]]
    model = AutoModelForCausalLM.from_pretrained(folder / "a" / "model", dtype=torch.float64)
    tokenizer = AutoTokenizer.from_pretrained(folder / "a" / "model")
    for line, row in zip(chosen, ROWS, strict=False):
        ids = tokenizer(line["prompt"], return_tensors="pt").input_ids
        written = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=3)
        assert line["answer"] == tokenizer.decode(
            written[0, ids.shape[1] :], skip_special_tokens=True
        )
        assert line["right"] is (line["answer"].strip() == row["completion"])


def test_a_kill_between_answers_is_done_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = answers.generate, iter(range(99))

    def dies(*arguments: Any, **options: Any) -> Any:
        if next(calls) == 4:
            raise RuntimeError("power cut")
        return real(*arguments, **options)

    monkeypatch.setattr(answers, "generate", dies)
    short = {"steps": 2, "eval_every": 1, "samples": 1, "save_every": 1, "sample_tokens": 2}
    with pytest.raises(RuntimeError, match="power cut"):
        run(folder, "cut", **short)
    monkeypatch.undo()
    lines = run(folder, "cut", **short, resume=True)
    shown = read_lines(folder / "cut" / "samples.jsonl")
    assert [line["step"] for line in lines] == [line["step"] for line in shown] == [0, 1, 2]


def answer(text: str, reference: str, weight: float = 1) -> Answer:
    return Answer(row=0, prompt="", reference=reference, answer=text, weight=weight)


def test_a_pattern_is_what_is_compared() -> None:
    pattern = r"= (\d+)\."
    assert is_right(answer("so = 7.", "1 + 6 = 7."), pattern)
    assert not is_right(answer("so = 8.", "1 + 6 = 7."), pattern)
    assert not is_right(answer("no number", "1 + 6 = 7."), pattern)
    assert is_right(answer(" 7 \n", "7"), None)
    assert not is_right(answer("7.", "7"), None)
    assert is_right(answer("x 12", "12 y"), r"\d+")


def test_rows_count_by_their_weights() -> None:
    from samestep.engine.evaluate import EvalReport

    report = EvalReport(0.0, {}, {}, 0.0, 0, 1)
    settings = EvaluationFields(metrics=("exact_match",))
    found = with_exact_match(report, [answer("a", "a", 3), answer("b", "c", 1)], settings)
    assert found.terms == {"exact_match": 0.75}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"answer_pattern": r"= (\d+)"}, DataError, r"not in the completion of 2 rows \(row 1, 2"),
        ({"answer_pattern": "("}, ConfigError, "answer_pattern: .* no regular expression"),
        ({"answer_pattern": "x", "metrics": ()}, ConfigError, "without exact_match in metrics"),
        ({"eval_data": None, "best": None}, ConfigError, "metrics and samples: there is nothing"),
        ({"eval_data": "TEXT"}, DataError, r"1 rows have no prompt to answer \(row 1\)"),
        (
            {"objective": "dpo", "metrics": ()},
            ConfigError,
            "samples belongs to objective causal_lm",
        ),
    ],
    ids=str,
)
def test_what_nobody_can_answer_is_said_before_anything_is_written(
    folder: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    text = write(folder / "text.jsonl", [{"text": "no prompt"}])
    if changes.get("eval_data") == "TEXT":
        changes = {**changes, "eval_data": text}
    with pytest.raises(error, match=message):
        run(folder, "refused", **changes)
    assert not (folder / "refused").exists()


class Table:
    """As wandb's and trackio's: columns, and rows of values."""

    def __init__(self, columns: list[str], data: list[list[Any]]) -> None:
        assert all(len(row) == len(columns) for row in data)
        self.columns, self.data = columns, data


def test_samples_go_to_trackers_as_tables(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: dict[str, list[Any]] = {"wandb": [], "trackio": []}

    def stand_in(name: str) -> Any:
        def write(values: dict[str, Any], step: int) -> None:
            logged[name].append((step, values))

        made = SimpleNamespace(Table=Table, log=write, finish=lambda: None)
        made.init = lambda **given: made
        return made

    for name in logged:
        monkeypatch.setitem(sys.modules, name, stand_in(name))
    sets = {"sums": str(folder / "eval.jsonl"), "more": str(folder / "rows.jsonl")}
    trackers = ("tensorboard", "wandb", "trackio")
    run(folder, "t", steps=1, eval_every=1, eval_data=sets, track=trackers, metrics=())
    lines = read_lines(folder / "t" / "samples.jsonl")
    assert len(lines) == 8
    for name, found in logged.items():
        tables = [
            (step, key, value)
            for step, values in found
            for key, value in values.items()
            if isinstance(value, Table)
        ]
        assert [(step, key) for step, key, _ in tables] == [
            (step, f"samples/{of}") for step in (0, 1) for of in ("sums", "more")
        ], name
        shown = [
            {
                "step": step,
                "set": key.partition("/")[2],
                **dict(zip(table.columns, row, strict=True)),
            }
            for step, key, table in tables
            for row in table.data
        ]
        assert shown == lines
        assert [step for step, _ in found] == sorted(step for step, _ in found)  # as wandb asks
    (events,) = (folder / "t" / "tracking" / "tensorboard").iterdir()
    content = events.read_bytes()
    for line in lines:
        assert (
            f"| {line['row']} | {_cell(line['prompt'])} | {_cell(line['answer'])} |".encode()
            in content
        )


def test_cells_show_what_is_written() -> None:
    assert _cell("<|im_end|>\na & b") == "&lt;&#124;im_end&#124;&gt;<br>a &amp; b"
