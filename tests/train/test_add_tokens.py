"""Tokens that are added: their rows, what they do under every split, and what is saved of them."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import rank_work
import torch
from cases import worst
from gloo import on_ranks
from objective_rows import write_rows_of
from peft import AutoPeftModelForCausalLM
from runs import bert_folder, llama_folder, read_lines, run_config, t5_folder
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from samestep.cli import main
from samestep.errors import ConfigError
from samestep.train.after import load_finished
from samestep.train.command import read_settings
from samestep.train.recipes.base import recipe_for
from samestep.train.run_data import load_data
from samestep.train.setup import load_trainable
from samestep.train.trainer import train

TOKENS: dict[str, Any] = {"add_tokens": ("<call>", "<done>"), "add_special_tokens": "<|tool|>"}
NEW = [320, 321, 322]
STEPS: dict[str, Any] = {
    **TOKENS,
    "precision": "float64",
    "optimizer": "sgd",
    "lr": 0.5,
    "batch_size": 4,
    "micro_batch": 3,
    "steps": 2,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models with their own heads and with shared ones, and rows that use the tokens."""
    folder = tmp_path_factory.mktemp("tokens")
    for name, tied in (("own", False), ("tied", True)):
        llama_folder(folder / name)
        model = AutoModelForCausalLM.from_pretrained(folder / name, tie_word_embeddings=False)
        if tied:
            model.lm_head.weight.data = model.get_input_embeddings().weight.data.clone()
            model.config.tie_word_embeddings = True
        model.double().save_pretrained(folder / name)
    rows = [
        {"prompt": f"{a} and {a}:", "completion": f"<call> {2 * a}<done>" + "<|tool|>" * (a % 3)}
        for a in range(6)
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "rows.jsonl").write_text(text, "utf-8")
    return folder


def run(folder: Path, model: str, out: str, **changes: Any) -> dict[str, Tensor]:
    settings = {"model": str(folder / model), "out": str(folder / out), **STEPS, **changes}
    train(run_config(folder, **settings))
    return saved(folder / out)


def saved(out: Path) -> dict[str, Tensor]:
    return load_file(next((out / "model").glob("*.safetensors")))


@pytest.mark.parametrize("model", ["own", "tied"])
def test_rows_are_those_of_transformers_for_the_seed(folder: Path, model: str) -> None:
    settings = run_config(folder, model=str(folder / model), **{**STEPS, "seed": 5})
    recipe = recipe_for(settings)
    tokenizer, data = load_data(recipe)
    found = load_trainable(recipe, data, device=torch.device("cpu"), tokenizer=tokenizer)
    wanted = AutoModelForCausalLM.from_pretrained(folder / model, dtype=torch.float64)
    torch.manual_seed(5)
    wanted.resize_token_embeddings(323)
    for one, other in zip(found.parameters(), wanted.parameters(), strict=True):
        assert torch.equal(one, other)
    head = found.get_output_embeddings()
    assert (head.weight is found.get_input_embeddings().weight) == (model == "tied")
    assert tokenizer("<call> 4<done>").input_ids[0] == NEW[0]
    assert data[0].highest_id() == NEW[-1]


@pytest.mark.sampled(4)
@pytest.mark.parametrize("model", ["own", "tied"])
@pytest.mark.parametrize("lora", [None, 2])
def test_a_run_is_the_same_under_every_split_on_ranks_and_resumed(
    folder: Path, model: str, lora: int | None
) -> None:
    """The new rows train, in the head too; transformers and PEFT load what is saved."""
    out = f"{model}-{lora}"
    adapters = {} if lora is None else {"lora_rank": lora, "lora_targets": "q_proj"}
    whole = run(folder, model, out, save_every=1, **adapters)
    split = run(folder, model, f"{out}-split", micro_batch=1, padding="left", **adapters)
    assert worst(split, whole) < 1e-12
    if model == "own" and lora:
        there = {**STEPS, **adapters, "model": str(folder / model), "out": str(folder / "ranks")}
        on_ranks(2, rank_work.training, str(folder), **there)
        assert worst(saved(folder / "ranks"), whole) < 1e-12
    shutil.rmtree(folder / out / "checkpoints" / "step-00000002")
    assert main(["train", "--resume", "--out", str(folder / out)]) == 0
    resumed = saved(folder / out)
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    tokenizer = AutoTokenizer.from_pretrained(folder / out / "model")
    assert tokenizer.convert_tokens_to_ids(["<call>", "<done>", "<|tool|>"]) == NEW
    assert tokenizer.decode([*NEW], skip_special_tokens=True).replace(" ", "") == "<call><done>"
    auto = AutoModelForCausalLM if lora is None else AutoPeftModelForCausalLM
    loaded = auto.from_pretrained(folder / out / "model", dtype=torch.float64).eval()
    ours = load_finished(str(folder / out))[0].eval()
    ids = torch.tensor([[5, 6, *NEW, 7]])
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, ours(ids).logits)
    begun = AutoModelForCausalLM.from_pretrained(folder / model, dtype=torch.float64)
    torch.manual_seed(0)
    begun.resize_token_embeddings(323)
    assert moved(ours, begun, "get_input_embeddings") == (set(NEW) if lora else {*NEW, "others"})
    head = {*NEW, "others"} if lora is None else set(NEW)
    assert moved(ours, begun, "get_output_embeddings") == head


def moved(model: Any, begun: Any, which: str) -> set[int | str]:
    """The rows that are others than at the start; those of old tokens together."""
    inner = model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
    now, then = (getattr(each, which)().weight.detach() for each in (inner, begun))
    rows = (now != then).any(1).nonzero()[:, 0].tolist()
    return {row if row in NEW else "others" for row in rows}


def test_a_run_with_new_tokens_is_evaluated_asked_exported_and_goes_on(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = str(folder / "rows.jsonl")
    run(folder, "own", "done", lora_rank=2, eval_data=data, steps=1)
    assert main(["eval", str(folder / "done"), "--data", data]) == 0
    said = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()[-9:])
    last = read_lines(folder / "done" / "eval.jsonl")[-1]["loss"]
    assert float(said["loss"]) == pytest.approx(last, rel=1e-5)
    assert main(["export", str(folder / "done"), "--out", str(folder / "flat"), "--merge"]) == 0
    assert AutoModelForCausalLM.from_pretrained(folder / "flat").config.vocab_size == 323
    none = dict.fromkeys(TOKENS, ())
    for out, changes in (("on", {}), ("folded", {"model_adapter": "merge", "lora_rank": 1})):
        run(folder, "done/model", out, steps=1, batch_size=6, **none, **changes)
        first = read_lines(folder / out / "log.jsonl")[0]
        assert first["loss"] == pytest.approx(last, rel=1e-6)  # a fold is in float32


def test_rows_that_the_model_has_already_are_taken_first(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A model may have more rows than its tokenizer has tokens."""
    wide = AutoModelForCausalLM.from_pretrained(folder / "own", dtype=torch.float64)
    wide.resize_token_embeddings(330)
    wide.save_pretrained(folder / "wide")
    AutoTokenizer.from_pretrained(folder / "own").save_pretrained(folder / "wide")
    caplog.set_level(logging.INFO, "samestep")
    whole = run(folder, "wide", "wide-1", steps=1)
    assert whole["model.embed_tokens.weight"].shape[0] == 330
    assert "'<call>' is id 320, new" in caplog.text
    assert "grow" not in caplog.text
    run(folder, "wide-1/model", "wide-2", steps=1)
    assert "'<call>' is id 320, which the tokenizer had already" in caplog.text


def test_what_cannot_be_added_is_said(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as found:
        run_config(folder, add_tokens=("a", "", "a"), add_special_tokens=("a",))
    assert "add_tokens: a token is empty" in str(found.value)
    assert "add_tokens and add_special_tokens: 'a' more than once" in str(found.value)
    rows = str(write_rows_of("seq2seq", tmp_path / "pairs.jsonl", 4, seed=0))
    t5 = {"model": str(t5_folder(tmp_path / "t5")), "objective": "seq2seq", "data": rows}
    with pytest.raises(ConfigError, match=r"shares its embeddings with .*where adapters cannot"):
        train(run_config(tmp_path, **t5, **TOKENS, lora_rank=2))
    with pytest.raises(ConfigError, match="here it is --add-tokens"):
        read_settings(["--model", "m", "--data", "d", "--out", "o", "--new-tokens", "x"])
    pairs = str(write_rows_of("dpo", tmp_path / "dpo.jsonl", 4, seed=0))
    dpo = {"objective": "dpo", "data": pairs, "reference_model": str(folder / "own")}
    with pytest.raises(ConfigError, match="they must share a vocabulary"):
        train(run_config(tmp_path, model=str(folder / "own"), **dpo, **TOKENS))


def test_other_objectives_get_them_too(folder: Path, tmp_path: Path) -> None:
    rows = str(write_rows_of("masked_lm", tmp_path / "texts.jsonl", 4, seed=0))
    bert = {"model": str(bert_folder(tmp_path / "bert")), "objective": "masked_lm", "data": rows}
    train(run_config(tmp_path, **bert, **TOKENS, steps=1, micro_batch=2))
    embeddings = saved(tmp_path / "out")["bert.embeddings.word_embeddings.weight"]
    assert embeddings.shape[0] == 323
