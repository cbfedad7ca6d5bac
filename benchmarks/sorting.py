"""A model learns to sort by its own rollouts. Writes a result file, a curve, docs/rollouts.md.

    python benchmarks/sorting.py           some two minutes of one core
    python benchmarks/sorting.py --page    writes curve and table anew from the result file

A Llama of two layers is first shown some sorted rows, and then learns from rewards alone: 1 for
digits in order, else 0. The second half is done again in other splits, and the rollouts compared.
"""

import argparse
import json
import random
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "support"))

import altair as alt
import torch
import vl_convert
from runs import read_lines, run_config
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from samestep.kernels.gemm import processor_name
from samestep.train.after import load_finished
from samestep.train.answers import generate, ready_to_generate
from samestep.train.trainer import train

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "sorting.json"
PAGE = HERE.parent / "docs" / "rollouts.md"
CURVE = PAGE.with_suffix(".svg")

DIGITS = 7
SHOWN = 110
STEPS = 150
COMPARED = 20
HELD_OUT = 200

REWARD = """
def in_order(completions, answer):
    return [float(text.replace(" ", "") == wanted) for text, wanted in zip(completions, answer)]
"""

POLICY: dict[str, Any] = {
    "objective": "policy",
    "num_generations": 8,
    "max_completion_length": DIGITS + 1,
    "batch_size": 32,
    "generation_batch": 32,
    "normalize": "token",
    "lr": 5e-4,
    "warmup": 0,
    "schedule": "constant",
    "precision": "float64",
    "save_minutes": None,
    "keep": 0,
}

FIRST = "micro-batches of 1,024 tokens"
SPLITS: dict[str, dict[str, Any]] = {
    FIRST: {"micro_tokens": 1024},
    "micro-batches of 7 sequences, padded to the left": {"micro_batch": 7, "padding": "left"},
    "prompts completed one by one": {"generation_batch": 1},
}


def prepare(folder: Path) -> None:
    """A random model with a token for each digit; rows to show, to learn from, and held out."""
    letters = {word: at for at, word in enumerate([*"0123456789", ">", "<end>", "<pad>"])}
    inner = Tokenizer(models.WordLevel(letters, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<end>", pad_token="<pad>"
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(letters),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
        bos_token_id=None,
        eos_token_id=letters["<end>"],
        pad_token_id=letters["<pad>"],
    )
    LlamaForCausalLM(config).save_pretrained(folder / "random")
    tokenizer.save_pretrained(folder / "random")
    (folder / "rewards.py").write_text(REWARD, encoding="utf-8")
    draw = random.Random(0)
    for name, number in {"shown": 4000, "prompts": 4000, "held_out": HELD_OUT}.items():
        rows = []
        for _ in range(number):
            digits = "".join(draw.choices("0123456789", k=DIGITS))
            answer = "".join(sorted(digits))
            rows.append({"prompt": f"{digits}>", "completion": answer, "answer": answer})
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def right(folder: Path, run: str) -> float:
    """The share of held-out rows that a run's model sorts, by its likeliest tokens."""
    model, tokenizer = load_finished(str(folder / run))
    found = []
    with ready_to_generate(model):
        for row in read_lines(folder / "held_out.jsonl"):
            ids = tokenizer(row["prompt"], return_tensors="pt").input_ids[0]
            written = generate(model, tokenizer, ids, tokens=DIGITS + 1)
            text = tokenizer.decode(written, skip_special_tokens=True)
            found.append(text.replace(" ", "") == row["answer"])
    return sum(found) / len(found)


def learn(folder: Path, run: str, **changes: Any) -> list[dict[str, Any]]:
    """A run from rewards; its rollouts."""
    settings = {
        **POLICY,
        "model": str(folder / "shown" / "model"),
        "data": str(folder / "prompts.jsonl"),
        "out": str(folder / run),
        "reward_funcs": (f"{folder / 'rewards.py'}:in_order",),
        "steps": STEPS,
        **changes,
    }
    train(run_config(folder, **settings))
    return read_lines(folder / run / "rollouts.jsonl")


def measure() -> dict[str, Any]:
    """Show, learn, and learn the first steps again in other splits."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as path:
        folder = Path(path)
        prepare(folder)
        shown = {"model": str(folder / "random"), "data": str(folder / "shown.jsonl")}
        common = {"lr": 2e-3, "schedule": "constant", "save_minutes": None, "keep": 0}
        out = str(folder / "shown")
        train(run_config(folder, **shown, **common, out=out, steps=SHOWN, batch_size=32))
        rollouts = learn(folder, "learned", **SPLITS[FIRST])
        log = read_lines(folder / "learned" / "log.jsonl")
        wanted = [line for line in rollouts if line["step"] <= COMPARED]
        splits = [{"split": FIRST, "completions": len(wanted), "equal": len(wanted)}]
        for name, split in SPLITS.items():
            if name != FIRST:
                found = learn(folder, "again", steps=COMPARED, overwrite=True, **split)
                equal = sum(
                    one["completion"] == other["completion"]
                    for one, other in zip(found, wanted, strict=True)
                )
                splits.append({"split": name, "completions": len(found), "equal": equal})
        return {
            "right": {"shown": right(folder, "shown"), "learned": right(folder, "learned")},
            "reward": [line["terms"]["reward"] for line in log],
            "flat": [line["terms"]["frac_reward_zero_std"] for line in log],
            "splits": splits,
            "settings": {"digits": DIGITS, "shown": SHOWN, "steps": STEPS, "held_out": HELD_OUT},
            "seconds": time.perf_counter() - started,
            "machine": {"processor": processor_name(), "threads": torch.get_num_threads()},
        }


def picture(results: dict[str, Any]) -> str:
    """The reward of each step, and its mean over the ten steps up to it."""
    rewards = results["reward"]
    points = []
    for at, reward in enumerate(rewards, 1):
        last = rewards[max(0, at - 10) : at]
        points += [
            {"step": at, "reward": reward, "of": "step"},
            {"step": at, "reward": sum(last) / len(last), "of": "mean of ten steps"},
        ]
    base = alt.Chart(alt.Data(values=points)).encode(
        x=alt.X("step:Q", title="step"),
        y=alt.Y("reward:Q", title="mean reward", scale=alt.Scale(domain=[0, 1])),
    )
    single = base.transform_filter("datum.of == 'step'").mark_circle(color="#93c5fd", size=18)
    mean = base.transform_filter("datum.of != 'step'").mark_line(color="#2563eb")
    chart = (single + mean).properties(width=520, height=240, background="#ffffff")
    return str(vl_convert.vegalite_to_svg(chart.to_json()))


def tables(results: dict[str, Any]) -> dict[str, str]:
    """What the page says of the results, by place."""
    right, steps = results["right"], results["settings"]["steps"]
    learned = (
        f"| held-out rows that are sorted | share of {results['settings']['held_out']} |\n"
        "| --- | --- |\n"
        f"| before | {right['shown']:.0%} |\n"
        f"| after {steps} steps | {right['learned']:.0%} |\n"
    )
    rows = [
        f"| {row['split']} | {row['equal']:,} of {row['completions']:,} |\n"
        for row in results["splits"]
    ]
    splits = f"| split | same completions in {COMPARED} steps |\n| --- | --- |\n{''.join(rows)}"
    return {"learned": learned, "splits": splits}


def write_page(results: dict[str, Any]) -> str:
    """The page with its tables, as it should be."""
    text = PAGE.read_text(encoding="utf-8")
    for name, table in tables(results).items():
        place = re.compile(rf"(<!-- sorting: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        text = place.sub(lambda found, table=table: f"{found[1]}{table}{found[2]}", text)
    return text


def main() -> None:
    """Measure, unless asked for the page alone; write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--page", action="store_true", help="from the result file")
    if not parser.parse_args().page:
        RESULTS.write_text(json.dumps(measure(), indent=1) + "\n", encoding="utf-8")
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    CURVE.write_text(picture(results), encoding="utf-8")
    PAGE.write_text(write_page(results), encoding="utf-8")


if __name__ == "__main__":
    main()
