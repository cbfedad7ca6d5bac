"""What is done with a finished run: its model answers, is evaluated on other rows, is exported."""

from pathlib import Path
from typing import Any

import pytest
import torch
from runs import llama_folder, read_lines, run_config, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from samestep.cli import main
from samestep.train.after import load_finished, settings_to_evaluate
from samestep.train.finished import EvalArguments
from samestep.train.trainer import train
from samestep.utils.text import printable


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("after")
    llama_folder(path / "tiny")
    double = AutoModelForCausalLM.from_pretrained(path / "tiny", dtype=torch.float64)
    double.save_pretrained(path / "tiny")
    write_rows(path / "rows.jsonl", 8)
    write_rows(path / "other.jsonl", 5, seed=3)
    common: dict[str, Any] = {"precision": "float64", "steps": 2, "lr": 1e-2}
    common |= {"eval_data": str(path / "other.jsonl"), "metrics": ("perplexity",)}
    train(run_config(path, out=str(path / "whole"), **common, ema=0.5, eval_every=1, best="loss"))
    train(run_config(path, out=str(path / "lora"), **common, lora_rank=2))
    return path


@pytest.mark.sampled(4)
@pytest.mark.parametrize("run", ["whole", "lora"])
@pytest.mark.parametrize("size", [[], ["--micro-batch", "1"]], ids=["auto", "one"])
def test_eval_says_what_the_run_said(
    folder: Path, run: str, size: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    data = ["--data", str(folder / "other.jsonl")]
    assert main(["eval", str(folder / run), *data, *size]) == 0
    out = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    lines = read_lines(folder / run / "eval.jsonl")
    said = min(lines[1:], key=lambda line: line["loss"]) if run == "whole" else lines[-1]
    assert said["loss"] != lines[0]["loss"]
    assert float(out["loss"]) == pytest.approx(said["loss"], rel=1e-5)
    assert float(out["perplexity"]) == pytest.approx(said["terms"]["perplexity"], rel=1e-5)
    assert out["over"].startswith(f"{said['counts']['token']:,.0f} token")
    assert main(["eval", str(folder / run), "--data", str(folder / "rows.jsonl")]) == 0
    assert f"loss {out['loss']}" not in capsys.readouterr().out


@pytest.mark.parametrize("run", ["whole", "lora"])
def test_generate_writes_what_transformers_does(
    folder: Path, run: str, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = ["What is 12 + 3?", "How many"]
    assert main(["generate", str(folder / run), "--prompt", *prompts, "--tokens", "6"]) == 0
    printed = capsys.readouterr().out
    model, _ = load_finished(str(folder / run))
    tokenizer = AutoTokenizer.from_pretrained(folder / run / "model")
    texts = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        written = model.eval().generate(
            input_ids=ids, max_new_tokens=6, do_sample=False, eos_token_id=3
        )
        texts.append(tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True))
    assert printed == "".join(printable(text) + "\n" for text in texts)
    drawn = ["generate", str(folder / run), "--prompt", "a", "--temperature", "5", "--tokens", "9"]
    texts = []
    for seed in ("1", "1", "2"):
        assert main([*drawn, "--seed", seed]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]
    assert main(["generate", str(folder / run), "--prompt", "a", "--chat", "--tokens", "2"]) == 0


def test_export_merges_adapters_and_says_how_the_model_was_made(folder: Path) -> None:
    out = folder / "merged"
    assert main(["export", str(folder / "lora"), "--out", str(out), "--merge"]) == 0
    merged = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    adapted, tokenizer = load_finished(str(folder / "lora"))
    ids = tokenizer("How many forks?", return_tensors="pt").input_ids
    with torch.no_grad():
        one, other = merged(ids).logits, adapted.eval()(ids).logits
    assert merged.dtype == torch.float64
    torch.testing.assert_close(one, other, rtol=0, atol=1e-10)
    card = (out / "README.md").read_text("utf-8")
    assert "lora_rank: 2" in card
    assert "function of its effective batch alone" in card
    assert "evaluation_after: " in card
    assert str(folder) not in card
    low = folder / "low"
    assert main(["export", str(folder / "whole"), "--out", str(low), "--dtype", "bfloat16"]) == 0
    assert AutoModelForCausalLM.from_pretrained(low, dtype="auto").dtype == torch.bfloat16
    kept = folder / "kept"
    assert main(["export", str(folder / "lora"), "--out", str(kept)]) == 0
    assert (kept / "adapter_config.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "./whol", "--prompt", "a"], "no folder ./whol; did you mean 'whole'"),
        (["generate", "whole", "--prompt", "a", "--tokens", "0", "--temperature", "-1"], "tokens:"),
        (["generate", "whole", "--prompt", ""], "prompt: give a text"),
        (["generate", "empty", "--prompt", "a"], "empty holds no model (no run)"),
        (["eval", "stopped", "--data", "x"], "samestep train --resume --out stopped"),
        (["eval", "tiny", "--data", "rows.jsonl"], "tiny is no run of samestep train"),
        (["eval", "whole", "--data", "./none.jsonl"], "none.jsonl: no such file"),
        (["eval", "whole", "--data", "rows.jsonl", "--metrics", "bleu"], "no metric 'bleu'"),
        (["export", "whole", "--out", "tiny"], "tiny is there already"),
        (["export", "whole", "--out", "new", "--merge"], "has no adapters"),
        (["exprt", "whole"], "did you mean 'export'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_is_said(
    folder: Path,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(folder)
    Path("empty").mkdir(exist_ok=True)
    Path("stopped").mkdir(exist_ok=True)
    Path("stopped/config.yaml").touch()
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
    assert not Path("new").exists()


def test_a_reference_is_what_the_run_began_with(folder: Path) -> None:
    run = folder / "preferred"
    (run / "model").mkdir(parents=True)
    (run / "model" / "config.json").touch()
    settings = "objective: dpo\nmodel: start\ndata: d\nout: o\nreference_model: null\nsteps: 9\n"
    (run / "config.yaml").write_text(settings, encoding="utf-8")
    found = settings_to_evaluate(EvalArguments(run=str(run), data=("e",)))
    values = found.model_dump()
    assert (values["model"], values["reference_model"]) == (str(run / "model"), "start")
    assert (found.data, found.eval_data, found.steps) == ("e", "e", 1)
