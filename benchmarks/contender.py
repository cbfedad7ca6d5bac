"""One run of one contender in a process of its own; prints its figures as a JSON line.

    python benchmarks/contender.py samestep --work gsm --steps 2
    python benchmarks/contender.py trl:4 --work smoke --steps 2

samestep          `samestep train` with its defaults; samestep:512 sets the budget in tokens
trl:B             TRL's SFTTrainer at batch B, accumulated to the effective batch, not checkpointed
trl-default:8     the same with its default, gradient checkpointing
trl-free:B        the same without padding (padding_free)
trl-packing:B     the same with packing: rows are joined to one length, so a step holds other rows
trainer:B         transformers.Trainer, whole logits, tokenised rows
plain:B           a PyTorch loop with whole logits, divided once by the batch's targets
"""

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

from works import WORKS, Work

RATE = 2e-5


def run_samestep(work: Work, rows: Path, steps: int, setting: str) -> list[float]:
    """`samestep train` with its defaults, or with a budget in tokens."""
    from samestep.train.settings.base import finalize
    from samestep.train.settings.language import CausalLMSettings
    from samestep.train.trainer import train

    out = Path(tempfile.mkdtemp()) / "out"
    config = CausalLMSettings(
        model=str(work.model()),
        data=str(rows),
        out=str(out),
        batch_size=work.batch,
        steps=steps,
        lr=RATE,
        lora_rank=work.lora_rank,
        micro_tokens=int(setting) if setting else "auto",
        precision="mixed" if work.mixed else "float32",
    )
    train(finalize(config))
    lines = (out / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["seconds"] for line in lines]


def run_trl(work: Work, rows: Path, steps: int, batch: int, options: dict[str, Any]) -> list[float]:
    """TRL's SFTTrainer: completion-only loss, AdamW fused, clipping at 1, as samestep."""
    from datasets import load_dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    clock = _clock()
    trainer = SFTTrainer(
        model=_model(work),
        args=SFTConfig(**{**_arguments(work, steps, batch), "max_length": None, **options}),
        train_dataset=load_dataset("json", data_files=str(rows), split="train"),
        processing_class=AutoTokenizer.from_pretrained(work.model()),
        callbacks=[clock],
    )
    trainer.train()
    return clock.seconds


def run_trainer(work: Work, rows: Path, steps: int, batch: int) -> list[float]:
    """transformers.Trainer on rows tokenised beforehand."""
    from transformers import (
        AutoTokenizer,
        DataCollatorForSeq2Seq,
        Trainer,
        TrainingArguments,
    )

    clock = _clock()
    trainer = Trainer(
        model=_model(work),
        args=TrainingArguments(**_arguments(work, steps, batch), gradient_checkpointing=False),
        train_dataset=[
            {"input_ids": one.input_ids.tolist(), "labels": one.labels.tolist()}
            for one in _examples(work, rows)
        ],
        data_collator=DataCollatorForSeq2Seq(AutoTokenizer.from_pretrained(work.model())),
        callbacks=[clock],
    )
    trainer.train()
    return clock.seconds


def run_plain(work: Work, rows: Path, steps: int, batch: int) -> list[float]:
    """The loop that one would write: padded, whole logits, divided by the batch's targets."""
    import torch
    from torch.nn.functional import cross_entropy

    from samestep.data.collate import collate_examples

    model, examples = _model(work), _examples(work, rows)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=RATE, fused=True, weight_decay=0.0)
    seconds = []
    for step in range(steps):
        began = time.perf_counter()
        chosen = examples[step * work.batch : (step + 1) * work.batch]
        targets = sum(int((one.labels[1:] != -100).sum()) for one in chosen)
        for start in range(0, len(chosen), batch):
            micro = collate_examples(chosen[start : start + batch], padding="right")
            labels = micro.pop("labels")
            del micro["example_ids"]
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=work.mixed):
                logits = model(**micro).logits[:, :-1].flatten(0, 1).float()
            (cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / targets).backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - began)
    return seconds


def _examples(work: Work, rows: Path) -> Any:
    from samestep.data.load import load_rows
    from samestep.data.tokenize import tokenize_rows
    from samestep.models.load import load_tokenizer

    return tokenize_rows(load_rows(str(rows)), load_tokenizer(str(work.model())))


def _model(work: Work) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(work.model(), dtype=torch.float32).train()
    if work.lora_rank is None:
        return model
    from samestep.models.lora import add_lora

    rank = work.lora_rank
    return add_lora(model, rank, alpha=2 * rank, dropout=0.0, targets=("all-linear",), seed=0)


def _arguments(work: Work, steps: int, batch: int) -> dict[str, Any]:
    return {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": max(1, work.batch // batch),
        "max_steps": steps,
        "learning_rate": RATE,
        "optim": "adamw_torch_fused",
        "bf16": work.mixed,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }


def _clock() -> Any:
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.seconds: list[float] = []

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.seconds.append(time.perf_counter() - self.began)

    return Clock()


TRL: dict[str, dict[str, Any]] = {
    "trl": {"gradient_checkpointing": False},
    "trl-default": {"gradient_checkpointing": True},
    "trl-free": {"gradient_checkpointing": False, "padding_free": True},
    "trl-packing": {"gradient_checkpointing": False, "packing": True},
}


def run(name: str, work: Work, rows: Path, steps: int) -> list[float]:
    """Seconds of each step of a contender."""
    kind, _, setting = name.partition(":")
    if kind == "samestep":
        return run_samestep(work, rows, steps, setting)
    if kind == "trl-packing":  # packs of TRL's default length; max_length=None cannot be packed to
        return run_trl(work, rows, steps, int(setting), TRL[kind] | {"max_length": 1024})
    if kind in TRL:
        return run_trl(work, rows, steps, int(setting), TRL[kind])
    if kind == "trainer":
        return run_trainer(work, rows, steps, int(setting))
    if kind == "plain":
        return run_plain(work, rows, steps, int(setting))
    raise SystemExit(f"no such contender: {name}")


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name")
    parser.add_argument("--work", default="gsm", choices=WORKS)
    parser.add_argument("--steps", type=int, default=2)
    options = parser.parse_args()
    began = time.perf_counter()
    work = WORKS[options.work]
    with tempfile.TemporaryDirectory() as tempfile.tempdir:  # of all folders: gigabytes a run
        rows = work.write_rows(options.steps)
        seconds = run(options.name, work, rows, options.steps)
        whole = time.perf_counter() - began
        tokens = sum(len(one.input_ids) for one in _examples(work, rows))
    figures = {
        "name": options.name,
        "seconds": seconds,
        "outside_steps": whole - sum(seconds),
        "tokens": tokens,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
