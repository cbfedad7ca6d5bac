"""Rows for each objective of `samestep train`, with something to learn in them."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffusion import write_latents
from vision import draw_text

Rows = Callable[[random.Random], dict[str, Any]]


def completion(draw: random.Random) -> dict[str, Any]:
    """A sum and its answer."""
    a, b = draw.randint(1, 99), draw.randint(1, 99)
    tail = " Yes." * draw.randint(0, 3)
    return {"prompt": f"What is {a} + {b}? ", "completion": f"{a} + {b} = {a + b}.{tail}"}


def pair(draw: random.Random) -> dict[str, Any]:
    """Politeness is preferred, in completions of ragged length."""
    row = completion(draw)
    bad = f"{draw.randint(2, 198)}!" + " No." * draw.randint(0, 5)
    chosen = "Yes, of course. " + row["completion"]
    return {"prompt": row["prompt"], "chosen": chosen, "rejected": bad}


def judged(draw: random.Random) -> dict[str, Any]:
    """One side of a pair, and which it was."""
    row, good = pair(draw), draw.random() < 0.5
    completion = row["chosen"] if good else row["rejected"]
    return {"prompt": row["prompt"], "completion": completion, "label": good}


def taught(draw: random.Random) -> dict[str, Any]:
    """A teacher is nearly sure of one of three tokens, wherever it is asked."""
    ids = [draw.randint(5, 200) for _ in range(draw.randint(4, 20))]
    start = draw.randint(1, len(ids) - 2)
    targets = len(ids) - start
    return {
        "input_ids": ids,
        "labels": [-100] * start + ids[start:],
        "top_ids": [[7, 8, 9]] * targets,
        "top_logps": [[-0.1, -3.0, -4.0]] * targets,
    }


def rollout(draw: random.Random) -> dict[str, Any]:
    """Of four prompts; politeness is rewarded."""
    row, good = pair(draw), draw.random() < 0.5
    completion = row["chosen"] if good else row["rejected"]
    prompt = f"What is {draw.randint(1, 4)}? "
    return {"prompt": prompt, "completion": completion, "reward": float(good)}


def sum_class(draw: random.Random) -> dict[str, Any]:
    """The class is told by the words, not by the length."""
    kind = draw.choice(["forks", "euros", "treats"])
    text = f"She had {draw.randint(1, 99)} {kind}" + " and more" * draw.randint(0, 5)
    return {"text": text, "label": kind}


def size(draw: random.Random) -> dict[str, Any]:
    """The number is that of a word's repetitions."""
    number = draw.randint(0, 4)
    return {"text": "many" + " forks" * number + "." * draw.randint(1, 5), "label": number / 2}


def tagged(draw: random.Random) -> dict[str, Any]:
    """Numbers are tagged as such, some words as nothing."""
    words = draw.choices(["forks", "the", "475", "16", "friends"], k=draw.randint(2, 9))
    kinds = {"the": None, "475": "number", "16": "number"}
    return {"tokens": words, "tags": [kinds.get(word, "word") for word in words]}


def asked(draw: random.Random) -> dict[str, Any]:
    """The answer is the number in the context."""
    number = str(draw.randint(10, 99))
    context = "more " * draw.randint(0, 4) + number + " forks" * draw.randint(1, 3)
    answers = {"text": [number], "answer_start": [context.index(number)]}
    return {"question": "How many?", "context": context, "answers": answers}


def pictured(draw: random.Random) -> dict[str, Any]:
    """A question about the picture beside the rows."""
    question = [{"type": "image", "image": "7.png"}, {"type": "text", "text": "How many?"}]
    answer = "7" + " Yes." * draw.randint(0, 4)
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    }


def latent_file(draw: random.Random) -> dict[str, Any]:
    """One of the files beside the rows."""
    return {"file": f"latents/00{draw.randint(0, 3)}.safetensors"}


def alike(draw: random.Random) -> dict[str, Any]:
    """An anchor and its positive share a number."""
    number = draw.randint(100, 999)
    return {"anchor": f"{number} forks" + "." * draw.randint(0, 4), "positive": f"more: {number}"}


def text(draw: random.Random) -> dict[str, Any]:
    """A sentence of a few words."""
    return {"text": "Emma had " + " and ".join(["16 forks"] * draw.randint(1, 5)) + "."}


ROWS: dict[str, Rows] = {
    "causal_lm": completion,
    "vision_language": pictured,
    "dpo": pair,
    "simpo": pair,
    "cpo": pair,
    "orpo": pair,
    "flow_matching": latent_file,
    "kto": judged,
    "policy": rollout,
    "distillation": completion,
    "taught": taught,
    "reward": pair,
    "classification": sum_class,
    "regression": size,
    "token_classification": tagged,
    "question_answering": asked,
    "embedding": alike,
    "masked_lm": text,
    "seq2seq": completion,
}
"""A maker of rows for each objective."""


def write_rows_of(objective: str, path: Path, number: int, *, seed: int = 0) -> str:
    """A file of rows for an objective (of causal_lm for one of the user's own)."""
    draw = random.Random(seed)
    if objective == "vision_language":
        draw_text("7", (16, 16)).save(path.parent / "7.png")
    if objective == "flow_matching":
        write_latents(path.parent / "latents", 4)
    rows = [ROWS.get(objective, completion)(draw) for _ in range(number)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)
