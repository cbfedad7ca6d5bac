"""The examples of several ranks, under torchrun."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def losses(*command: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, *command],
        env=os.environ | {"TORCH_DISTRIBUTED_DEBUG": "OFF"},
        capture_output=True,
        text=True,
        check=True,
    )
    return re.findall(r"loss (\S+)", done.stdout)


@pytest.mark.thorough
@pytest.mark.slow
@pytest.mark.parametrize("example", ["ddp.py", "fsdp2.py"])
def test_two_ranks_print_the_losses_of_one(example: str) -> None:
    alone = losses(str(EXAMPLES / "ddp.py"))
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    found = losses(*launcher, str(EXAMPLES / example))
    assert len(found) == 10
    assert [float(x) for x in found] == pytest.approx([float(x) for x in alone], abs=2e-6)
