"""Pages: what they are about, and no column that is cut without a word."""

import re
from pathlib import Path

import pytest
from study_results import make_arm, make_results

import samestep.audit.report
import samestep.study.report
from samestep.audit.charts import draw_axes, draw_weights
from samestep.study.charts import draw_figures
from samestep.study.report import render_page
from samestep.study.results import Results


def results() -> Results:
    losses = {0: 3.0, 1: 3.1}
    return make_results(
        [make_arm("32 x 1", losses, reference=True), make_arm("1 x 32", losses, difference=1e-7)],
        name="a study",
    )


def test_a_study_names_its_model_and_its_data() -> None:
    study = results()
    study.spec.update(model="org/tiny", data="rows & more.jsonl", eval_data="held-out.jsonl")
    page = render_page(study, draw_figures(study))
    for name in ("org/tiny", "rows &amp; more.jsonl", "held-out.jsonl"):
        assert f"<code>{name}</code>" in page


def test_two_points_are_no_line() -> None:
    marks = {}
    for name, figure in draw_figures(results()).items():
        spec = figure.chart.to_dict()
        points = spec["data"]["values"] if "data" in spec else spec["layer"][0]["data"]["values"]
        if "step" in points[0]:
            longest = max(sum(one["arm"] == each["arm"] for one in points) for each in points)
            kinds = {layer["mark"]["type"] for layer in spec["layer"]}
            marks[name] = (longest, "line" in kinds)
    assert any(longest <= 2 for longest, _ in marks.values())
    assert all(line == (longest > 2) for longest, line in marks.values())


@pytest.mark.parametrize("module", [samestep.audit.report, samestep.study.report])
def test_narrow_pages_say_that_there_is_more_to_the_right(module: object) -> None:
    page = (Path(str(vars(module)["__file__"])).parent / "page.html").read_text(encoding="utf-8")
    assert "@media (max-width: 640px) { .scroll::before" in page
    assert page.count("<table") == page.count('<div class="scroll"><table')


def check_report(**changes: object) -> dict[str, object]:
    axis = {
        "name": "micro-batch", "verdict": "inexact", "reason": "2+2 against 4", "ratio": 1.1,
        "cosine": 0.9, "relative_difference": 0.3, "noise_floor": 1e-16, "cause": "mean-of-means",
        "residual": 0.0, "evidence": "", "advice": "Divide once.",
        "worst": [["head.weight", 0.4], ["body.weight", 0.02]],
    }  # fmt: skip
    calm = {**axis, "name": "order", "verdict": "exact", "relative_difference": 2e-16}
    return {
        "subject": "loop.py", "verdict": "inexact", "examples": 4, "dtype": "float64", "seed": 0,
        "versions": {}, "axes": [axis, {**calm, "cause": None, "worst": []}], **changes,
    }  # fmt: skip


def test_the_chart_of_a_check_tells_exact_from_inexact_and_weight_from_weight() -> None:
    """Lengths in the picture follow the numbers: no bar is full whatever the difference."""
    axes = check_report()["axes"]
    marks = re.findall(r'aria-label="([^"]*)"', draw_axes(axes))
    assert any("order" in mark and "2e-16" in mark for mark in marks)
    bars = re.findall(r'aria-roledescription="bar" d="M0,[\d.]+h([\d.]+)v', draw_weights(axes[0]))
    longest, shortest = (float(length) for length in bars)
    assert longest / shortest == pytest.approx(20, rel=0.01)
    assert samestep.audit.report.render_page(check_report()).count("<svg") == 2
