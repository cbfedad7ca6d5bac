import json
import re
from pathlib import Path

import pytest
from study_results import make_arm, make_results

from samestep.errors import ConfigError
from samestep.study.charts import draw_figures
from samestep.study.comparison import compare_arms
from samestep.study.markdown import ARM_HEADERS, arm_table, render_markdown
from samestep.study.report import render_page, write_report
from samestep.study.results import NoiseSums, Results, load_results, round_floats, save_results

HOSTILE = "</script><script>alert(1)</script> *a* [b](c) | `d`"


def results() -> Results:
    noise = NoiseSums(signal=[0.1, 0.11, 0.09], variance=[100.0, 101.0, 99.0])
    arms = []
    for cut, group in ((0.0, "as they are"), (0.75, "75% cut")):
        place = {"cut": cut, "group": group}
        arms += [
            make_arm("32 x 1", {0: 3.0, 1: 3.1, 2: 2.9}, reference=True, **place),
            make_arm(
                "1 x 32",
                {0: 3.0, 1: 3.1, 2: 2.9},
                difference=1e-7,
                of_run={"noise": noise},
                **place,
            ),
            make_arm(
                HOSTILE,
                {0: 3.5, 1: 3.7, 2: 3.3},
                difference=0.4,
                normalisation="mean-of-means",
                **place,
            ),
        ]
    return make_results(arms, name=HOSTILE)


def test_a_report_holds_every_figure_and_verdict(tmp_path: Path) -> None:
    found = results()
    written = {path.name for path in write_report(found, tmp_path)}
    kinds = ("evaluation-loss", "train-loss", "gradient-difference", "gradient-norm")
    pictures = {f"{group}-{kind}.png" for group in (1, 2) for kind in kinds} | {"map.png"}
    assert written == pictures | {"report.html", "report.md"}
    for name in pictures:
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    for one in compare_arms(found):
        assert one.training in text
    for name in pictures:
        assert f"({name})" in text
    assert "arXiv:1812.06162" in (tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def html() -> str:
    return render_page(results(), draw_figures(results()))


def test_names_cannot_become_markup(html: str) -> None:
    assert "<script>alert" not in html
    assert "&lt;script&gt;alert(1)" in html
    text = render_markdown(results(), {})
    assert "<script" not in text
    assert "[b](c)" not in text
    rows = [line for line in text.splitlines() if line.startswith("| &lt;/script")]
    assert len(rows) == 2
    assert all(len(re.split(r"(?<!\\)\|", row)) == len(ARM_HEADERS) + 2 for row in rows)


def test_names_in_markdown_stay_names() -> None:
    from samestep.study.markdown import _escape

    assert _escape("&lt;b&gt;\x1b[2J\n") == "&amp;lt;b&amp;gt;\\\\x1b\\[2J "


def test_the_page_refers_to_nothing_outside_itself(html: str) -> None:
    start, end = html.index("<script>"), html.index('<script type="application/json"')
    own = html[:start] + html[end:]
    assert "vegaEmbed" in html[start:end]
    assert re.search(r"<link rel=.icon. href=.data:", own)
    assert not re.search(r"(src|href)=[\"'](?!data:,)", own)
    assert "url(" not in own
    assert "@import" not in own


def test_the_numbers_are_those_of_the_results() -> None:
    found = results()
    row = dict(zip(ARM_HEADERS, arm_table(found, "as they are")[2], strict=True))
    assert row["evaluation loss"] == "3.5000 ± 0.2000"
    assert row["vs reference"] == "+0.5000"
    assert row["gradient difference"] == "4.0e-01"
    assert row["cosine"] == "0.8000"
    assert row["length"] == "x 1 to 1.1"
    assert row["tokens/s"] == "2,000"
    assert row["peak memory"] == "0.25 GiB"


def test_bands_run_from_the_lowest_to_the_highest_seed() -> None:
    chart = draw_figures(results())["1-evaluation-loss"].chart.to_dict()
    rows = [row for row in chart["data"]["values"] if row["arm"] == HOSTILE]
    last = rows[-1]
    assert (last["step"], last["low"], last["mean"], last["high"]) == (3, 3.3, 3.5, 3.7)


def test_a_gradient_difference_of_zero_does_not_break_the_log_axis() -> None:
    arms = [make_arm("32 x 1", {0: 3.0}, reference=True), make_arm("b", {0: 3.0}, difference=0.0)]
    assert "1-gradient-difference" not in draw_figures(make_results(arms))
    arms[1] = make_arm("b", {0: 3.0, 1: 3.0}, difference=0.1)
    assert "1-gradient-difference" in draw_figures(make_results(arms))


def test_one_seed_and_divergence_are_said_in_the_report() -> None:
    gone = make_arm("gone", {0: 3.0}, difference=0.4, of_run={"diverged": "after 1 updates: nan"})
    arms = [make_arm("32 x 1", {0: 3.0}, reference=True), make_arm("b", {0: 3.2}), gone]
    text = render_markdown(make_results(arms), {})
    assert "one seed: no claim about noise" in text
    assert "1 of 1 runs diverged and are left out" in text
    assert "| gone | diverged |" in text


def test_results_survive_their_file(tmp_path: Path) -> None:
    found = results()
    save_results(tmp_path / "results.json", found)
    assert load_results(tmp_path / "results.json") == Results.model_validate(
        round_floats(found.model_dump(by_alias=True))
    )
    assert round_floats({"a": [1.23456789, 5]}) == {"a": [1.234568, 5]}


@pytest.mark.parametrize("text", [None, "", "{}", json.dumps({"format": 1}), "\xff"])
def test_a_file_that_holds_no_results_is_named(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "results.json"
    if text is not None:
        path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"results\.json"):
        load_results(path)
