"""Pages: what they are about, and no column that is cut without a word."""

from pathlib import Path

import pytest
from study_results import make_arm, make_results

import samestep.audit.report
import samestep.study.report
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
