"""One contender in a process of its own: trains some steps, prints its figures as a JSON line.

    python benchmarks/gpu/gpu_contender.py samestep --work llama-1b-gsm --device cuda

samestep             `samestep train` with its defaults; samestep:none leaves layers uncompiled
trl:B                TRL's SFTTrainer at B rows, accumulated to the batch; bfloat16 autocast over
                     float32 weights on a GPU, as samestep's own default
trl-liger:B          the same with Liger's kernels
trl-free:B           the same without padding (padding_free)
trl-bf16:B           the same with bfloat16 weights, which lose updates
plain:B              a loop of one's own: layers compiled, padded, divided once by the targets
"""

import argparse
import json
import math
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpu_works import SHAPES, WORKS, Work, config_of, flops, model_folder, rows_of

WARM = 2
"""Steps before those that are timed: they compile kernels and fill caches."""

RATE = 2e-5


def run_samestep(work: Work, setting: str, steps: int, device: str) -> dict[str, Any]:
    """`samestep train` with its defaults, on random weights."""
    from samestep.train.settings.base import finalize
    from samestep.train.settings.language import CausalLMSettings
    from samestep.train.trainer import train

    folder = Path(tempfile.mkdtemp())
    data = folder / "rows.jsonl"
    lines = [json.dumps(row) for row in rows_of(work, steps)]
    data.write_text("\n".join(lines) + "\n", encoding="ascii")
    settings = CausalLMSettings(
        model=str(model_folder(work.shape, folder / "model")),
        init="random",
        data=str(data),
        out=str(folder / "out"),
        batch_size=work.batch,
        steps=steps,
        lr=RATE,
        lora_rank=work.lora_rank,
        device=device,
        **({"compile": setting} if setting else {}),
    )
    summary = train(finalize(settings))
    log = (folder / "out" / "log.jsonl").read_text(encoding="utf-8").splitlines()
    steps_log = [line for line in map(json.loads, log) if "grad_norm" in line]
    return {
        "seconds": [line["seconds"] for line in steps_log],
        "losses": [line["loss"] for line in steps_log],
        "peak_bytes": summary["peak_device_bytes"] or summary["peak_resident_bytes"],
    }


def run_trl(
    work: Work, rows: int, steps: int, device: str, options: dict[str, Any]
) -> dict[str, Any]:
    """TRL's SFTTrainer over the same ids: AdamW fused, clipping at 1, no checkpointing."""
    from datasets import Dataset
    from tiny import build_tokenizer
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.seconds: list[float] = []
            self.losses: list[float] = []

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            _wait(device)
            self.began = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            _wait(device)
            self.seconds.append(time.perf_counter() - self.began)

        def on_log(self, _: Any, __: Any, ___: Any, logs: Any = None, **____: Any) -> None:
            if "loss" in logs:
                self.losses.append(float(logs["loss"]))

    low = options.pop("bf16_weights", False)
    clock = Clock()
    trainer = SFTTrainer(
        model=_model(work, device, low=low),
        args=SFTConfig(
            output_dir=tempfile.mkdtemp(),
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=max(1, work.batch // rows),
            max_steps=steps,
            learning_rate=RATE,
            optim="adamw_torch_fused",
            bf16=device != "cpu" and not low,
            use_cpu=device == "cpu",
            gradient_checkpointing=False,
            max_length=None,
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            **options,
        ),
        train_dataset=Dataset.from_list(rows_of(work, steps)),
        processing_class=build_tokenizer(),
        callbacks=[clock],
    )
    trainer.train()
    return {"seconds": clock.seconds, "losses": clock.losses, "peak_bytes": _peak(device)}


def run_plain(work: Work, rows: int, steps: int, device: str) -> dict[str, Any]:
    """A loop of one's own, compiled: padded, whole logits, divided once by the batch's targets."""
    import torch
    from torch.nn.functional import cross_entropy
    from torch.nn.utils.rnn import pad_sequence

    model = _model(work, device)
    if device != "cpu":
        for layer in model.model.layers:
            layer.compile(dynamic=True)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=RATE, fused=True, weight_decay=0.0)
    everything = rows_of(work, steps)

    def padded(chosen: list[dict[str, list[int]]], name: str, fill: int) -> Any:
        parts = [torch.tensor(row[name]) for row in chosen]
        return pad_sequence(parts, batch_first=True, padding_value=fill).to(device)

    def micro_batches(chosen: list[dict[str, list[int]]]) -> Iterator[Any]:
        for at in range(0, len(chosen), rows):
            part = chosen[at : at + rows]
            ids, labels = padded(part, "input_ids", 1), padded(part, "labels", -100)
            yield ids, labels, padded([{"m": [1] * len(r["labels"])} for r in part], "m", 0)

    seconds, losses = [], []
    for step in range(steps):
        chosen = everything[step * work.batch : (step + 1) * work.batch]
        targets = sum(sum(label != -100 for label in row["labels"][1:]) for row in chosen)
        _wait(device)
        began, total = time.perf_counter(), 0.0
        for ids, labels, mask in micro_batches(chosen):
            with torch.autocast(device, dtype=torch.bfloat16, enabled=device != "cpu"):
                logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            flat = logits[:, :-1].flatten(0, 1).float()
            loss = cross_entropy(flat, labels[:, 1:].flatten(), reduction="sum") / targets
            loss.backward()
            total += float(loss)
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        _wait(device)
        seconds.append(time.perf_counter() - began)
        losses.append(total)
    return {"seconds": seconds, "losses": losses, "peak_bytes": _peak(device)}


def _model(work: Work, device: str, *, low: bool = False) -> Any:
    """Random weights, made on the device; float32, or under adapters bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM

    adapters = work.lora_rank is not None
    dtype = torch.bfloat16 if low or (adapters and device != "cpu") else torch.float32
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config_of(work.shape), dtype=dtype).train()
    if not adapters:
        return model
    from samestep.models.lora import add_lora
    from samestep.train.precision import raise_trained

    rank = work.lora_rank
    assert rank is not None
    model = add_lora(model, rank, alpha=2 * rank, dropout=0.0, targets=("all-linear",), seed=0)
    raise_trained(model)
    return model


def _wait(device: str) -> None:
    import torch

    if device != "cpu":
        torch.accelerator.synchronize()


def _peak(device: str) -> int:
    import torch

    from samestep.utils.memory import process_peak

    return process_peak() if device == "cpu" else torch.cuda.max_memory_allocated()


TRL: dict[str, dict[str, Any]] = {
    "trl": {},
    "trl-liger": {"use_liger_kernel": True},
    "trl-free": {"padding_free": True},
    "trl-bf16": {"use_liger_kernel": True, "bf16_weights": True},
}


def run(name: str, work: Work, *, steps: int, device: str) -> dict[str, Any]:
    """The figures of a contender."""
    kind, _, setting = name.partition(":")
    began = time.perf_counter()
    if kind == "samestep":
        found = run_samestep(work, setting, steps, device)
    elif kind == "plain":
        found = run_plain(work, int(setting), steps, device)
    else:
        found = run_trl(work, int(setting), steps, device, dict(TRL[kind]))
    whole = time.perf_counter() - began
    rows = rows_of(work, steps)[WARM * work.batch :]
    timed = sum(found["seconds"][WARM:])
    tokens = sum(len(row["input_ids"]) for row in rows)
    work_done = flops(work, rows, matrices(work.shape))
    return found | {
        "name": name,
        "tokens_per_second": tokens / timed,
        "flops_per_second": {kind: number / timed for kind, number in work_done.items()},
        "outside_steps": whole - sum(found["seconds"]),
    }


def matrices(shape: str) -> dict[str, int]:
    """Elements of a shape's matrices, in its layers and in its head."""
    values = SHAPES[shape]
    width, inner = values["hidden_size"], values["intermediate_size"]
    head_width = values.get("head_dim", width // values["num_attention_heads"])
    heads, key_heads = values["num_attention_heads"], values["num_key_value_heads"]
    attention = 2 * width * head_width * (heads + key_heads)
    body = values["num_hidden_layers"] * (attention + 3 * width * inner)
    return {"body": body, "head": math.prod((width, values["vocab_size"]))}


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name")
    parser.add_argument("--work", default="tiny", choices=WORKS)
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    print(
        json.dumps(
            run(options.name, WORKS[options.work], steps=options.steps, device=options.device)
        )
    )


if __name__ == "__main__":
    main()
