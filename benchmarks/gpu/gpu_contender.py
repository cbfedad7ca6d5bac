"""One contender in a process of its own: trains some steps, prints its figures as a JSON line.

    python benchmarks/gpu/gpu_contender.py samestep --work llama-1b-gsm --device cuda

samestep             `samestep train` with its defaults, in the first steps of a long run: so it
                     measures whether compiled layers pay, as a run of usual length does
samestep:layers      a whole short run with compiled layers, its model saved; also :none, :auto
trl-best:B           TRL at its best: with Liger's kernels at B rows; without them, or where they
                     fail, at the most rows up to B that fit. The figures say which it was
trl:B                TRL's SFTTrainer at B rows, accumulated to the batch; bfloat16 autocast over
                     float32 weights on a GPU, as samestep's own default
trl-liger:B          the same with Liger's kernels
trl-free:B           the same without padding (padding_free)
trl-pack:B           the same with packs of 1,024 tokens, B of them at a time
trl-bf16:B           the same with bfloat16 weights, which lose updates; Liger's kernels if there
plain:B              a loop of one's own: layers compiled, padded, divided once by the targets

From the third step on each step prints the figures so far: who ends it early has those.
"""

import argparse
import gc
import importlib.util
import json
import math
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpu_limit import measure as measure_limit
from gpu_works import SHAPES, WORKS, Work, config_of, flops, model_folder, rows_of

WARM = 2
"""Steps before those that are timed: they compile kernels and fill caches."""

LONG = 20_000
"""Steps of the run whose first ones are timed: long enough to earn back what it tries out."""

RATE = 2e-5


class Figures:
    """What a contender has shown so far, printed from the first timed step on.

    Args:
        name: Of the contender.
        work: What it does.
        steps: How many it takes.
        device: Where.
    """

    def __init__(self, name: str, work: Work, *, steps: int, device: str) -> None:
        self._device = device
        self._began = time.perf_counter()
        rows = rows_of(work, steps)
        tokens = sum(len(row["input_ids"]) for row in rows)
        done = flops(work, rows, matrices(work.shape))
        self._flops_per_token = {kind: number / tokens for kind, number in done.items()}
        self.values: dict[str, Any] = {"name": name}
        self.restart()

    def restart(self) -> None:
        """Forget the steps so far: another way is tried."""
        self.values |= {"seconds": [], "tokens": [], "losses": [], "peak_bytes": 0}

    def step(self, *, seconds: float, tokens: float, loss: float) -> None:
        """Count a step.

        Args:
            seconds: Its time.
            tokens: Its tokens, those of padding not counted.
            loss: Its loss.
        """
        found = self.values
        for name, value in (("seconds", seconds), ("tokens", tokens), ("losses", loss)):
            found[name].append(value)
        found["peak_bytes"] = max(found["peak_bytes"], _peak(self._device))
        timed = sum(found["seconds"][WARM:])
        if not timed:
            return
        speed = sum(found["tokens"][WARM:]) / timed
        found["tokens_per_second"] = speed
        found["flops_per_second"] = {
            kind: number * speed for kind, number in self._flops_per_token.items()
        }
        print(json.dumps(found), flush=True)

    def end(self) -> None:
        """Print all there is, with the limit of this device, measured beside it."""
        outside = time.perf_counter() - self._began - sum(self.values["seconds"])
        self.values["outside_steps"] = outside
        if self._device != "cpu":
            import torch

            self.values["reserved_bytes"] = torch.cuda.max_memory_reserved()
            torch.cuda.empty_cache()
        print(json.dumps(self.values), flush=True)  # the products that follow may fail
        size = 256 if self._device == "cpu" else 8192
        self.values |= {"limit_flops_per_second": measure_limit(self._device, size)}
        print(json.dumps(self.values), flush=True)


class Enough(Exception):  # noqa: N818 (it is none)
    """Ends a long run after its first steps."""


def run_samestep(work: Work, setting: str, steps: int, device: str, figures: Figures) -> None:
    """`samestep train` with its defaults, on random weights."""
    import samestep
    from samestep.train.settings.base import finalize
    from samestep.train.settings.language import CausalLMSettings
    from samestep.train.trainer import train

    class Watch(samestep.Callback):
        def on_step(self, record: dict[str, Any]) -> None:
            figures.step(seconds=record["seconds"], tokens=record["tokens"], loss=record["loss"])
            if not setting and record["step"] == steps:
                raise Enough

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
        steps=steps if setting else LONG,
        lr=RATE,
        lora_rank=work.lora_rank,
        device=device,
        **({"compile": setting} if setting else {}),
    )
    try:
        train(finalize(settings), callbacks=[Watch()])
    except Enough:
        print(f"of a run of {LONG} steps these are the first", flush=True)


def run_best_of_trl(work: Work, rows: int, steps: int, device: str, figures: Figures) -> None:
    """TRL with Liger, else with the most rows that fit."""
    import torch

    passed = {} if has_liger() else {f"trl-liger:{rows}": "liger-kernel is not installed"}
    found: dict[str, Any] = {"ran": "", "passed_over": passed}
    figures.values |= found
    for kind, number in best_of_trl(rows):
        figures.restart()
        try:
            run_trl(work, number, steps, device, dict(TRL[kind]), figures)
        except Exception as error:  # whatever stands in its way, the next is tried
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            if kind == "trl" and not isinstance(error, torch.OutOfMemoryError):
                raise
            found["passed_over"][f"{kind}:{number}"] = reason
            print(f"{kind}:{number} is passed over: {reason}", flush=True)
        else:
            found["ran"] = f"{kind}:{number}"
            figures.values |= found
            return
        gc.collect()
        if device != "cpu":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    raise RuntimeError(f"TRL fits at no number of rows: {found['passed_over']}")


def best_of_trl(rows: int) -> list[tuple[str, int]]:
    """The ways of TRL and their rows, the best first; Liger's kernels only where they are."""
    liger = [("trl-liger", rows)] if has_liger() else []
    return [*liger, *(("trl", rows >> half) for half in range(rows.bit_length()))]


def has_liger() -> bool:
    """Whether Liger's kernels are installed."""
    return importlib.util.find_spec("liger_kernel") is not None


def run_trl(
    work: Work, rows: int, steps: int, device: str, options: dict[str, Any], figures: Figures
) -> None:
    """TRL's SFTTrainer over the same ids: AdamW fused, clipping at 1, no checkpointing."""
    from datasets import Dataset
    from tiny import build_tokenizer
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Clock(TrainerCallback):
        tokens = 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            _wait(device)
            self.began = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            _wait(device)
            self.seconds = time.perf_counter() - self.began

        def on_log(self, _: Any, __: Any, ___: Any, logs: Any = None, **____: Any) -> None:
            if "loss" in logs:
                before, self.tokens = self.tokens, float(logs["num_tokens"])
                tokens, loss = self.tokens - before, float(logs["loss"])
                figures.step(seconds=self.seconds, tokens=tokens, loss=loss)

    low = options.pop("bf16_weights", False)
    options = {"max_length": None, **options}
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
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            **options,
        ),
        train_dataset=Dataset.from_list(rows_of(work, steps)),
        processing_class=build_tokenizer(),
        callbacks=[Clock()],
    )
    trainer.train()


def run_plain(work: Work, rows: int, steps: int, device: str, figures: Figures) -> None:
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
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        _wait(device)
        tokens = sum(len(row["input_ids"]) for row in chosen)
        figures.step(seconds=time.perf_counter() - began, tokens=tokens, loss=total)


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
    "trl-pack": {"packing": True, "max_length": 1024},
    "trl-bf16": {"use_liger_kernel": has_liger(), "bf16_weights": True},
}


def run(name: str, work: Work, *, steps: int, device: str) -> dict[str, Any]:
    """The figures of a contender."""
    kind, _, setting = name.partition(":")
    figures = Figures(name, work, steps=steps, device=device)
    if kind == "samestep":
        run_samestep(work, setting, steps, device, figures)
    elif kind == "plain":
        run_plain(work, int(setting), steps, device, figures)
    elif kind == "trl-best":
        run_best_of_trl(work, int(setting), steps, device, figures)
    else:
        run_trl(work, int(setting), steps, device, dict(TRL[kind]), figures)
    figures.end()
    return figures.values


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
    run(options.name, WORKS[options.work], steps=options.steps, device=options.device)


if __name__ == "__main__":
    main()
