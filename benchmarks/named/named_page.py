"""docs/models.md, written from what benchmarks/results/models.json holds."""

from typing import Any

from named_models import NAMED, Named
from named_sizes import FROZEN, RANK, ROOM, TRAINED, Size

HEAD = """# Models

Written by `make models` from `benchmarks/results/models.json`; every row is run by
`tests/test_models.py`.

## The step, at reduced size
Each model is the class that loads the published weights, in a reduced configuration from random
weights, on {number} ragged rows. The numbers are relative differences of the whole gradient: over
splits, between the whole batch and 1 x {number}, 2 x {half} (padded left) and 3 and 1 in turn
(packed where the model can); on 2 ranks, between one process and two with {more} and {fewer}
rows. The last column is `transformers.Trainer` on the same model and rows, {number} x 1 against 1
x {number}, in float32, with the router loss where the class has one.

| model | class | reduced to | splits, float64 | splits, float32 | 2 ranks, float32 | Trainer |
| --- | --- | --- | --- | --- | --- | --- |
"""

BETWEEN = """
What is left in float64 is float32 inside the model: routers (DeepSeek-V3, ERNIE), norms and
linear attention (MiniCPM). Measured with {versions}.

## The full size
Parameters are counted on the class at its published size, without memory for them. What they need
is {trained} bytes for every weight that trains (float32: weight, gradient, two moments of AdamW)
and {frozen} for every one that does not (bfloat16); LoRA is of rank {rank} on every linear layer
but the head (the experts of these classes are no linear layers, and stay frozen). A rank is a
device of 80 GB, {share:.0%} of it for these; activations take the rest (`--gradient-checkpointing
full`, and `--micro-tokens`, keep them small). FSDP2 starts from whole weights in the memory of
the machine, once a rank. No model of this table has been trained at full size here but
SmolLM2-135M.

| model | parameters | all weights | LoRA | command |
| --- | --- | --- | --- | --- |
"""

NOTES = "\n## Notes\n"


def page(results: dict[str, Any]) -> str:
    """The whole page.

    Args:
        results: Of `named_run.measured`.
    """
    rows = results["rows"]
    number = results["number"]
    text = HEAD.format(number=number, half=number // 2, more=5, fewer=number - 5)
    for named in NAMED:
        row = rows[named.name]
        text += (
            f"| {named.name} | `{named.kind}` | {row['reduced']} | {row['float64']:.0e} | "
            f"{row['float32']:.0e} | {row['ranks']:.0e} | {_trainer(row['trainer'])} |\n"
        )
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    text += BETWEEN.format(
        versions=versions, trained=TRAINED, frozen=FROZEN, rank=RANK, share=ROOM / 80e9
    )
    for named in NAMED:
        text += _full(named, Size(**rows[named.name]["full"]))
    notes = [f"- {named.name}: {named.note}.\n" for named in NAMED if named.note]
    return text + NOTES + "".join(notes)


def _trainer(difference: float) -> str:
    return f"**{difference:.0%}**" if difference > 1e-3 else f"{difference:.0e}"


def _full(named: Named, size: Size) -> str:
    everything, adapters = size.bytes_to_train_all, size.bytes_to_train_adapters
    cells = [
        f"{needed / 1e9:,.0f} GB, {_ranks(size.ranks(needed))}" for needed in (everything, adapters)
    ]
    if named.objective == "flow_matching":
        cells[1] = "not served"
    return (
        f"| {named.name} | {_count(size.parameters)} | {cells[0]} | {cells[1]} | "
        f"`{command(named, size)}` |\n"
    )


def _ranks(number: int) -> str:
    return "1 rank" if number == 1 else f"{number} ranks"


def _count(parameters: int) -> str:
    for unit, name in ((1e12, "T"), (1e9, "B")):
        if parameters >= unit:
            return f"{parameters / unit:.2f} {name}"
    return f"{parameters / 1e6:.0f} M"


def command(named: Named, size: Size) -> str:
    """What trains the full-size weights: all of them on up to 8 ranks, else LoRA."""
    data = "latents" if named.objective == "flow_matching" else "rows.jsonl"
    parts = ["samestep train"]
    number, lora = size.ranks(size.bytes_to_train_all), ""
    if number > 8 and named.objective != "flow_matching":
        number, lora = size.ranks(size.bytes_to_train_adapters), f"--lora-rank {RANK}"
        lora += " --precision bfloat16"
    if number > 8:
        machines = -(-number // 8)
        parts = [f"torchrun --nnodes {machines} --nproc-per-node 8 -m samestep train"]
    if named.objective != "causal_lm":
        parts.append(f"--objective {named.objective}")
    parts.append(f"--model {named.hub} --data {data} --out runs/out")
    if 1 < number <= 8:
        parts.append(f"--ranks {number}")
    if number > 1:
        parts.append("--parallel fsdp2")
    parts += [lora, named.settings, "--gradient-checkpointing full"]
    return " ".join(part for part in parts if part)
