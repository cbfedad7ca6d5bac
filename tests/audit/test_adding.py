"""The example of docs/adding-an-axis.md runs from outside, and what is wrong with one is said."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from samestep.audit.axes.axis import Axis, Measurement
from samestep.audit.causes import Cause
from samestep.audit.check import check
from samestep.audit.experiments import Experiments
from samestep.errors import CheckError

PAGE = Path(__file__).parents[2] / "docs" / "adding-an-axis.md"


def test_the_example_runs_and_prints_what_the_page_says(tmp_path: Path) -> None:
    text = PAGE.read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (expected,) = re.findall(r"```text\n(.*?)```", text, re.DOTALL)
    (tmp_path / "audit.py").write_text(code, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "audit.py"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout == expected, done.stderr


class Loop:
    examples = [torch.ones(n, 2) for n in (1, 4, 2, 3)]  # noqa: RUF012
    model = staticmethod(lambda: nn.Linear(2, 1))
    collate = staticmethod(torch.cat)

    def step(self, model: nn.Module, micros: list[torch.Tensor]) -> None:
        for micro in micros:
            (model(micro).square().sum() / sum(map(len, micros))).backward()


def differs(experiments: Experiments) -> Measurement:
    return Measurement("nothing", relative_difference=1.0)


def refuses(experiments: Experiments) -> Measurement:
    raise CheckError("no such thing here")


def test_an_axis_skips_what_has_no_meaning_or_is_not_there() -> None:
    axes = [
        Axis("mine", "nothing", refuses),
        Axis("evaluated", "nothing", differs, needs=("evaluation",)),
        Axis("unknown", "nothing", differs),
    ]
    skipped, needy, unexplained = check(Loop, axes).axes
    assert (skipped.verdict, skipped.reason) == ("skipped", "no such thing here")
    assert needy.verdict == "skipped"
    assert "evaluate" in needy.reason
    assert (unexplained.verdict, unexplained.cause) == ("inexact", "unexplained")


@pytest.mark.parametrize(
    ("axes", "causes", "message"),
    [
        (["no-such-axis"], [], "no such axis: no-such-axis"),
        ([Axis("order", "nothing", differs)], [], "axes: order is taken"),
        ([Axis("mine", "nothing", differs)] * 2, [], "axes: mine is taken"),
        ([Axis("mine", "nothing", differs, cause="mine")], [], "there is no cause 'mine'"),
        (["order"], [Cause("rng", "a", "b")], "causes: 'rng' is taken"),
    ],
)
def test_wrong_axes_and_causes_are_refused(
    axes: list[Axis | str], causes: list[Cause], message: str
) -> None:
    with pytest.raises(CheckError, match=message):
        check(Loop, axes, causes=causes)


def test_weights_must_be_as_many_as_micro_batches() -> None:
    class Means(Loop):
        def step(self, model: nn.Module, micros: list[torch.Tensor]) -> None:
            for micro in micros:
                (model(micro).square().mean() * len(micro) ** 0.5 / len(micros)).backward()

    short = Cause("short", "a", "b", weights=lambda evidence: [1.0])
    (axis,) = check(Means, ["micro-batch"], causes=[short]).axes
    assert axis.cause == "unexplained"
    assert "weights gives 1 numbers" in axis.evidence
