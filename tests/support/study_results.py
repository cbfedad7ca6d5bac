"""Results of a study, made up to the last number."""

from collections.abc import Mapping, Sequence
from typing import Any

from samestep.study.results import (
    ArmResult,
    Evaluations,
    Gradients,
    Lengths,
    NoiseSums,
    Results,
    Run,
    Steps,
)


def make_run(seed: int, final: float, **changes: Any) -> Run:
    """A run of three steps that ends at an evaluation loss."""
    values: dict[str, Any] = {
        "seed": seed,
        "key": f"{seed:032d}",
        "padding": "none",
        "steps": Steps(
            loss=[4.0, 3.5, 3.0],
            objective=[4.0, 3.5, 3.0],
            grad_norm=[1.0, 0.9, 0.8],
            targets=[100, 110, 90],
            seconds=[0.1, 0.1, 0.1],
            tokens=[200, 210, 190],
        ),
        "evaluations": Evaluations(step=[0, 3], loss=[4.0, final]),
        "gradients": Gradients(),
        "noise": NoiseSums(),
        "travelled": 2.0,
        "tokens_per_second": 2000.0,
        "peak_bytes": 2**28,
        "diverged": None,
    }
    return Run(**{**values, **changes})


def make_arm(label: str, finals: Mapping[int, float], **changes: Any) -> ArmResult:
    """An arm, with the final loss of each seed; ``difference`` is its gradient's."""
    difference = changes.pop("difference", None)
    of_run = changes.pop("of_run", {})
    if difference is not None:
        of_run = {
            "gradients": Gradients(
                step=[0, 2], relative_difference=[difference] * 2, cosine=[0.9, 0.8], ratio=[1.1, 1]
            ),
            **of_run,
        }
    values: dict[str, Any] = {
        "label": label,
        "group": "batch 32",
        "reference": False,
        "batch": 32,
        "split": "1 x 32",
        "normalisation": "exact",
        "lr": 1e-3,
        "cut": 0.0,
        "runs": [make_run(seed, final, **of_run) for seed, final in finals.items()],
    }
    return ArmResult(**{**values, **changes})


def make_results(
    arms: Sequence[ArmResult], *, name: str = "A study", dtype: str = "float32"
) -> Results:
    """Results around arms."""
    return Results(
        name=name,
        spec={
            "steps": 3,
            "optimizer": "adamw",
            "schedule": "linear",
            "max_grad_norm": 1.0,
            "dtype": dtype,
            "init": "random",
        },
        machine={"cores": 2},
        versions={"samestep": "0"},
        lengths=[
            Lengths(cut=cut, rows=20, targets=200, p10=5, p50=9, p90=15, spread=0.5 + cut)
            for cut in sorted({arm.cut for arm in arms})
        ],
        arms=list(arms),
    )
