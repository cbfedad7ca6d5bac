"""An audit takes at most three times the memory of the loop itself."""

import subprocess
import sys
from pathlib import Path

import pytest

LOOP = """
import torch
from torch import nn
from torch.nn import functional

WORDS = 30_000
draw = torch.Generator().manual_seed(0)
examples = [torch.randint(0, WORDS, (n,), generator=draw) for n in (5, 14, 3, 9, 11, 4, 16, 7)]


def model():
    return nn.Sequential(nn.Embedding(WORDS, 384), nn.Linear(384, WORDS))  # 23 M weights


def collate(rows):
    pad = nn.utils.rnn.pad_sequence
    labels = pad(rows, batch_first=True, padding_value=-100)
    return {"input_ids": pad(rows, batch_first=True), "labels": labels}


def step(model, micros):
    count = sum((micro["labels"] != -100).sum() for micro in micros)
    for micro in micros:
        logits, labels = model(micro["input_ids"]).flatten(0, 1), micro["labels"].flatten()
        (functional.cross_entropy(logits, labels, reduction="sum") / count).backward()
"""

ALONE = "import loop; loop.step(loop.model(), [loop.collate(loop.examples)])"
AUDIT = "import samestep; assert samestep.check('loop.py').verdict == 'exact'"
PEAK = "; import resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"


@pytest.mark.thorough
@pytest.mark.slow
def test_memory_is_within_three_times_the_loops_own(tmp_path: Path) -> None:
    (tmp_path / "loop.py").write_text(LOOP, encoding="utf-8")
    alone, audited = (
        int(
            subprocess.run(
                [sys.executable, "-c", code + PEAK],
                cwd=tmp_path,
                check=True,
                capture_output=True,
                text=True,
            ).stdout.split()[-1]
        )
        for code in (ALONE, AUDIT)
    )
    assert audited < 3 * alone
