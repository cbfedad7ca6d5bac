"""Writes docs/models.md: named models, reduced, and what the cut of a batch does to their step."""

# ruff: noqa: E501 (lines of the page)

import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "support"))
os.environ["HF_HUB_OFFLINE"] = "1"

import torch  # noqa: E402
import transformers  # noqa: E402
from measure import mean_of_means, of_trainer, over_cuts, over_ranks  # noqa: E402
from named import NAMED, Named  # noqa: E402

HEAD = """\
# Models

Written by `make models` (torch {torch}, transformers {transformers}, CPU). Each model is the class of
transformers that its full-size weights load into, here in a reduced configuration (2 layers of width 32, or
as noted in `tests/support/named.py`) with random weights, on one batch of 8 sequences of ragged length; those
that see take an image of their own each. `tests/test_named_models.py` runs every row.

- **cuts**: the relative difference of the whole gradient between 8 x 1, 1 x 8 and 3 + 1 + 4, in float64 and
  float32. Where float64 gives more than 1e-12, a part of the model computes in float32 whatever the weights
  are (routers, gates).
- **2 ranks**: of two processes with 3 and 5 of the sequences from one process with all, in float32.
- **Trainer**: the same for one SGD update of the plain `transformers.Trainer`, 1 x 8 from 8 x 1, in float32.
- **mean of means**: what dividing by each micro-batch's own count does on this batch, for scale.

| model | class | parameters here | cuts, float64 | cuts, float32 | 2 ranks | Trainer | mean of means |
| --- | --- | --- | --- | --- | --- | --- | --- |
"""

TAIL = """
## The full-size weights

Not run here: this machine has neither the weights nor the memory. Memory is arithmetic: training all weights
with AdamW takes 16 bytes a parameter (weights, gradients and two moments in float32); LoRA on frozen bfloat16
weights takes 2 bytes a parameter and little more; activations come on top and follow `--micro-tokens`. Several
ranks need FSDP2 once a model outgrows one device ([train.md](train.md)).

| model | parameters | all weights, AdamW | LoRA, bfloat16 | command |
| --- | --- | --- | --- | --- |
"""

NOTE = """
`samestep train` reads text rows. Models that see are trained by a loop of your own: `samestep.step` with
`samestep.CausalLMLoss()` on micro-batches that hold the processor's tensors beside `input_ids`, `labels` and
`attention_mask`, without `position_ids`, as `tests/support/named.py` builds them.

HunyuanVideo-1.5 is not on this page: its class is in diffusers, which the tests do not install.
"""


def row(index: int, named: Named) -> str:
    """One measured row."""
    parameters = sum(weight.numel() for weight in named.build(torch.float32).parameters())
    found = [
        over_cuts(named, torch.float64),
        over_cuts(named, torch.float32),
        over_ranks(index, torch.float32),
        of_trainer(named),
        mean_of_means(named),
    ]
    shown = " | ".join(f"{value:.1e}" for value in found)
    return f"| {named.title} | `{named.kind}` | {parameters:,} | {shown} |\n"


def full_size(named: Named) -> str:
    """One row of what the full-size weights take."""
    if named.parameters is None:
        return f"| {named.title} | of the checkpoint | | | {named.command} |\n"
    size = f"{named.parameters:g} B" if named.parameters >= 1 else f"{1000 * named.parameters:g} M"
    memory = [f"{factor * named.parameters:,.1f} GB" for factor in (16, 2)]
    command = f"`{named.command}`" if named.command.startswith("samestep") else named.command
    return f"| {named.title} | {size} | {' | '.join(memory)} | {command} |\n"


def main() -> None:
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    text = HEAD.format(torch=torch.__version__, transformers=transformers.__version__)
    text += "".join(row(index, named) for index, named in enumerate(NAMED))
    text += TAIL + "".join(map(full_size, NAMED)) + NOTE
    (ROOT / "docs" / "models.md").write_text(text, encoding="utf-8")
    print(f"wrote {ROOT / 'docs' / 'models.md'}")


if __name__ == "__main__":
    main()
