"""TR-DPO's reference: it moves once a step, as TRL's does, and a resumed run goes on with it."""

import copy
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from objective_runs import configured
from runs import read_lines
from safetensors.torch import load_file
from torch import Tensor, nn
from trl.trainer.callbacks import SyncRefModelCallback

from samestep.errors import ConfigError
from samestep.objectives.moving_reference import MovingReference
from samestep.train.settings.base import finalize
from samestep.train.settings.objectives import settings_class
from samestep.train.trainer import train

PLAIN = {
    "precision": "float64",
    "optimizer": "sgd",
    "lr": 0.5,
    "max_grad_norm": None,
    "eval_data": None,
    "steps": 3,
}
MOVING = {"sync_ref_model": True, "ref_model_mixup_alpha": 0.3, "ref_model_sync_steps": 1}


def run(folder: Path, name: str, case: str = "dpo", **changes: Any) -> dict[str, Tensor]:
    """The weights of a run."""
    train(configured(folder, case, out=str(folder / name), **{**PLAIN, **changes}))
    return load_file(folder / name / "model" / "model.safetensors")


def largest_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return max(float((one[n] - other[n]).norm() / one[n].norm()) for n in one)


def test_it_moves_as_trls() -> None:
    policy = nn.Linear(5, 3).double()
    ours = nn.Linear(5, 3).double()
    theirs = copy.deepcopy(ours)
    reference = MovingReference(ours, policy, share=0.6, every=2)
    for step in range(1, 6):
        with torch.no_grad():
            policy.weight.add_(0.1 * step)
        reference.after_step(policy, True)
        reference.after_step(policy, False)  # a step that was skipped
        if step % 2 == 0:
            SyncRefModelCallback._sync_target_model(policy, theirs, 0.6)
    torch.testing.assert_close(ours.weight, theirs.weight)
    with pytest.raises(ConfigError, match=r"differ in 2 weights \(bias, weight\)"):
        MovingReference(nn.Linear(5, 4), policy, share=0.6, every=2)


@pytest.mark.parametrize(
    ("case", "number", "still"),
    [("dpo", "loss", math.log(2)), ("kto", "reward_desirable", 0.0), ("policy kl", "kl", 0.0)],
)
def test_a_reference_that_takes_all_of_the_model(
    tmp_path: Path, case: str, number: str, still: float
) -> None:
    """After every step: no step finds a difference between the two."""
    run(tmp_path, "out", case, **{**MOVING, "ref_model_mixup_alpha": 1.0, "steps": 2})
    for line in read_lines(tmp_path / "out" / "log.jsonl"):
        assert {**line["terms"], **line}[number] == pytest.approx(still, rel=1e-12, abs=1e-12)


def test_no_split_changes_it_and_a_resumed_run_goes_on_with_it(tmp_path: Path) -> None:
    whole = run(tmp_path, "whole", **MOVING, save_every=2)
    split = run(tmp_path, "split", **MOVING, micro_batch=1, padding="left")
    still = run(tmp_path, "still")
    assert largest_difference(whole, split) < 1e-12
    assert largest_difference(whole, still) > 1e-6
    shutil.rmtree(tmp_path / "whole" / "checkpoints" / "step-00000003")
    resumed = run(tmp_path, "whole", **MOVING, save_every=2, resume=True)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_rows_that_bring_the_reference_have_none_that_moves(tmp_path: Path) -> None:
    settings = configured(tmp_path, "dpo", **PLAIN, **MOVING, ld_alpha=0.5)
    rows = Path(settings.data).read_text().splitlines()
    ending = ', "ref_chosen_logps": -3.0, "ref_rejected_logps": -4.0}'
    Path(settings.data).write_text("\n".join(row[:-1] + ending for row in rows))
    with pytest.raises(ConfigError, match=r"(?s)ref_chosen_logps:.*ld_alpha.*sync_ref_model"):
        train(settings)


@pytest.mark.parametrize(
    ("objective", "settings", "parts"),
    [
        (
            "dpo",
            {**MOVING, "precompute_reference": True, "lora_rank": 2, "parallel": "fsdp2"},
            ["precompute_reference contradict", "adapters have no whole", "parallel fsdp2"],
        ),
        ("dpo", {**MOVING, "precision": "bfloat16"}, ["mixed keeps them"]),
        (
            "kto",
            {"ref_model_mixup_alpha": 0.5, "ref_model_sync_steps": 3},
            ["ref_model_mixup_alpha: 0.5 has no effect", "ref_model_sync_steps: 3 has no effect"],
        ),
        (
            "dpo",
            {
                "loss": ("aot_unpaired", "apo_zero"),
                "f_divergence_type": "forward_kl",
                "f_alpha_divergence_coef": 0.2,
                "use_weighting": True,
            },
            [
                "forward_kl does not go with loss aot_unpaired, apo_zero",
                "f_alpha_divergence_coef: 0.2 has no effect",
                "use_weighting: aot_unpaired sort the pairs",
            ],
        ),
        ("policy", MOVING, ["sync_ref_model: without kl_weight"]),
        (
            "policy",
            {"loss": "cispo", "clip_low": 0.1, "sapo_temperature_neg": 2.0},
            ["clip_low: 0.1 has no effect: loss cispo", "sapo_temperature_neg: 2.0 has no effect"],
        ),
        ("policy", {"loss": "sapo", "clip_high": 0.3}, ["clip_high: 0.3 has no effect"]),
    ],
    ids=str,
)
def test_contradictions_are_named_together(objective: str, settings: Any, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as found:
        finalize(settings_class(objective)(model="m", data="d", out="o", **settings))
    assert all(part in str(found.value) for part in parts), found.value
    assert len(str(found.value).splitlines()) == len(parts)


@pytest.mark.parametrize(
    ("objective", "name", "here"),
    [
        ("reward", "center_rewards_coefficient", "center_rewards"),
        ("policy", "entropy_coef", "entropy_weight"),
        ("policy", "importance_sampling_level", "ratio"),
        ("policy", "epsilon_high", "clip_high"),
    ],
)
def test_trls_names_are_answered_by_ours(objective: str, name: str, here: str) -> None:
    with pytest.raises(ConfigError, match=f"here it is '{here}'"):
        settings_class(objective)(model="m", data="d", out="o", **{name: 0.1})
