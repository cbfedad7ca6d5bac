"""What `samestep.hf.exact` costs a `transformers.Trainer`: runs in turn, with it and without.

    python benchmarks/exact_overhead.py [--pairs 30]     two minutes on an idle machine

Writes benchmarks/results/exact-overhead.json and the line of docs/trainers.md. The runs are timed
in seconds of the processor; each pair has its two runs side by side, in either order.
"""

import argparse
import contextlib
import cProfile
import json
import os
import pstats
import random
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "support"))

import torch
import transformers
from exact_cases import collate

from samestep.hf import exact
from samestep.kernels.gemm import processor_name

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "exact-overhead.json"
PAGE = HERE.parent / "docs" / "trainers.md"
Rows = list[dict[str, list[int]]]
ROWS, WIDTH, LAYERS, VOCABULARY = 32, 256, 4, 2000


def small_bert() -> transformers.PreTrainedModel:
    """A masked LM of some four million weights, without dropout."""
    torch.manual_seed(0)
    return transformers.BertForMaskedLM(
        transformers.BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            hidden_dropout_prob=0,
            attention_probs_dropout_prob=0,
        )
    )


def masked_rows() -> Rows:
    """Ragged rows, one token in seven learned."""
    draw, rows = random.Random(0), []
    for _ in range(ROWS):
        ids = [draw.randrange(VOCABULARY) for _ in range(draw.randint(32, 128))]
        labels = [token if draw.random() < 0.15 else -100 for token in ids]
        rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
    return rows


def seconds(
    model: transformers.PreTrainedModel, rows: list[dict[str, list[int]]], *, cured: bool
) -> float:
    """Of the processor, for two steps of 4 x 4 rows."""
    arguments = transformers.TrainingArguments(
        tempfile.gettempdir(),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=4,
        num_train_epochs=1,
        learning_rate=0.0,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        logging_steps=1,
    )
    trainer = transformers.Trainer(model, arguments, collate, rows)
    if cured:
        exact(trainer)
    started = time.process_time()
    with contextlib.redirect_stdout(None):
        trainer.train()
    return time.process_time() - started


def measure(pairs: int) -> dict[str, object]:
    """Pairs of runs, and the ratio of each."""
    model, rows = small_bert(), masked_rows()
    found = []
    for at in range(-1, pairs):
        order = (False, True) if at % 2 else (True, False)
        pair = {cured: seconds(model, rows, cured=cured) for cured in order}
        if at >= 0:  # the first warms up
            found.append((pair[False], pair[True]))
    return {
        "weights": sum(weight.numel() for weight in model.parameters()),
        "plain": [plain for plain, _ in found],
        "exact": [cured for _, cured in found],
        "own": [own_share(model, rows) for _ in range(5)],
        "machine": {"processor": processor_name(), "torch": torch.__version__},
        "transformers": transformers.__version__,
    }


def own_share(model: transformers.PreTrainedModel, rows: Rows) -> float:
    """The part of a cured run's time that the functions of samestep take by themselves."""
    profile = cProfile.Profile()
    profile.runcall(seconds, model, rows, cured=True)
    found = pstats.Stats(profile).stats.items()
    own = sum(inside for (file, *_), (_, _, inside, *_) in found if "/samestep/" in file)
    return own / sum(inside for _, (_, _, inside, *_) in found)


def line(results: dict[str, object]) -> str:
    """What the page says of them."""
    plain, cured = results["plain"], results["exact"]
    ratios = sorted(b / a for a, b in zip(plain, cured, strict=True))
    quarter = len(ratios) // 4
    return (
        f"{len(ratios)} pairs of runs of a Bert of {results['weights'] / 1e6:.1f} M weights, two "
        f"steps of 4 x 4 rows each, one thread of {results['machine']['processor']}: the median of "
        f"the ratios of time is {statistics.median(ratios):.3f} (half of them between "
        f"{ratios[quarter]:.3f} and {ratios[-1 - quarter]:.3f}), the ratio of the fastest runs "
        f"{min(cured) / min(plain):.3f}. A profile says that the functions of samestep take "
        f"{statistics.median(results['own']):.2%} of such a run by themselves; the rest of the "
        "difference is what two runs of the same differ by on such a machine."
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=30)
    given = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)
    results = measure(given.pairs)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    text = PAGE.read_text(encoding="utf-8")
    place = re.compile(r"(<!-- overhead -->\n).*?(\n<!-- end -->)", re.DOTALL)
    PAGE.write_text(
        place.sub(lambda found: f"{found[1]}{line(results)}{found[2]}", text), encoding="utf-8"
    )
    print(line(results))


if __name__ == "__main__":
    main()
