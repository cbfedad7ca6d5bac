"""Whole runs of every objective on two ranks: the weights are those of one process."""

from pathlib import Path
from typing import Any

import pytest
import rank_work
from experts import FAMILIES
from gloo import on_ranks
from objective_runs import CASES, configured, latents, pictures
from safetensors.torch import load_file
from transformers import GotOcr2Processor

from samestep.train.trainer import train

PLAIN: dict[str, Any] = {
    "precision": "float64",
    "steps": 2,
    "batch_size": 7,  # odd: one rank holds more
    "micro_batch": 2,
    "optimizer": "sgd",
    "lr": 0.1,
    "max_grad_norm": None,
    "eval_data": None,
}


@pytest.mark.sampled(5)
@pytest.mark.parametrize("case", [*CASES, "vision_language", "flow_matching"])
def test_two_ranks_are_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    monkeypatch.setattr(GotOcr2Processor, "num_image_tokens", 16)  # of tiny images
    own = {"vision_language": pictures, "flow_matching": latents}
    config = own[case](tmp_path, **PLAIN) if case in own else configured(tmp_path, case, **PLAIN)
    train(config)
    two = config.model_copy(update={"out": str(tmp_path / "two")})
    on_ranks(2, rank_work.trained, two)
    found, wanted = (
        load_file(next((tmp_path / out / "model").glob("*.safetensors"))) for out in ("two", "out")
    )
    # transformers' routers compute in float32, whatever the weights are.
    bound = 1e-6 if case.split()[-1] in FAMILIES else 1e-11
    for name, weight in wanted.items():
        size = max(float(weight.norm()), 1e-3)  # some hold only noise: a bias inside a softmax
        assert float((weight - found[name]).norm()) / size < bound, name
