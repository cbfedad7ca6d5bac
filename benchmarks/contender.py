"""One run of one contender in a process of its own; prints its figures as a JSON line.

    python benchmarks/contender.py samestep --work gsm --steps 2
    python benchmarks/contender.py trl:4 --work smoke --steps 2

"trl:B" is TRL's SFTTrainer at batch B with the accumulation that makes the same effective batch;
"trl-default:B" adds its default gradient checkpointing.
"""

import argparse
import json
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


class Work:
    """What every contender does: a model, rows, and an effective batch."""

    def __init__(self, name: str) -> None:
        from samestep.models.gguf import model_folder

        sys.path.insert(0, str(ROOT / "tests" / "support"))
        from runs import llama_folder, packaged_model

        if name == "gsm":
            self.model = str(model_folder(packaged_model()))
            self.batch, rows = 32, 1024
        elif name == "smoke":
            self.model = str(llama_folder(Path(tempfile.mkdtemp()) / "tiny"))
            self.batch, rows = 8, 32
        else:
            raise SystemExit(f"no such work: {name}")
        lines = (ROOT / "data" / "gsm_train.jsonl").read_text(encoding="utf-8").splitlines()[:rows]
        self.rows = Path(tempfile.mkdtemp()) / "rows.jsonl"
        if name == "smoke":  # rows that fit a tiny model's positions
            parsed = [json.loads(line) for line in lines]
            lines = [json.dumps({k: v[:60] for k, v in row.items()}) for row in parsed]
        self.rows.write_text("\n".join(lines) + "\n", encoding="utf-8")


def run_samestep(work: Work, steps: int, setting: str) -> list[float]:
    """`samestep train` with its defaults, or with a budget in tokens."""
    from samestep.train.config import checked
    from samestep.train.objectives.causal_lm import CausalLMConfig
    from samestep.train.trainer import train

    out = Path(tempfile.mkdtemp()) / "out"
    config = CausalLMConfig(
        model=work.model,
        data=str(work.rows),
        out=str(out),
        batch_size=work.batch,
        steps=steps,
        micro_tokens=int(setting) if setting else "auto",
    )
    train(checked(config))
    lines = (out / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["seconds"] for line in lines]


def run_trl(work: Work, steps: int, batch: int, *, checkpointing: bool) -> list[float]:
    """TRL's SFTTrainer: completion-only loss, AdamW fused, clipping at 1, as samestep."""
    import torch
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.seconds: list[float] = []

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.seconds.append(time.perf_counter() - self.began)

    clock = Clock()
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(work.model, dtype=torch.float32),
        args=SFTConfig(
            output_dir=tempfile.mkdtemp(),
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=work.batch // batch,
            gradient_checkpointing=checkpointing,
            max_steps=steps,
            max_length=None,
            learning_rate=2e-5,
            optim="adamw_torch_fused",
            bf16=False,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=load_dataset("json", data_files=str(work.rows), split="train"),
        processing_class=AutoTokenizer.from_pretrained(work.model),
        callbacks=[clock],
    )
    trainer.train()
    return clock.seconds


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name")
    parser.add_argument("--work", default="gsm")
    parser.add_argument("--steps", type=int, default=2)
    options = parser.parse_args()
    kind, _, setting = options.name.partition(":")
    work = Work(options.work)
    if kind == "samestep":
        seconds = run_samestep(work, options.steps, setting)
    elif kind in ("trl", "trl-default"):
        checkpointing = kind == "trl-default"
        seconds = run_trl(work, options.steps, int(setting), checkpointing=checkpointing)
    else:
        raise SystemExit(f"no such contender: {options.name}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"name": options.name, "seconds": seconds, "peak_bytes": peak}))


if __name__ == "__main__":
    main()
