"""What docs/studies says is what its results say."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from samestep.study.charts import draw_figures
from samestep.study.comparison import compare_arms
from samestep.study.markdown import render_markdown
from samestep.study.results import load_results

ROOT = Path(__file__).parents[2]
HOME = ROOT / "docs" / "studies"
STUDIES = sorted(path.parent.name for path in HOME.glob("*/results.json"))


@pytest.fixture(scope="module")
def publish() -> ModuleType:
    spec = importlib.util.spec_from_file_location("publish", ROOT / "studies" / "publish.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_tables_are_those_of_the_results(publish: ModuleType) -> None:
    text = (HOME / "README.md").read_text(encoding="utf-8")
    assert publish.fill_tables(text, HOME) == text
    for study in STUDIES:
        assert f"<!-- {study} -->" in text


@pytest.mark.parametrize("study", STUDIES)
def test_the_reports_are_drawn_from_the_results(study: str) -> None:
    results = load_results(HOME / study / "results.json")
    figures = draw_figures(results)
    pictures = {f"{name}.png": figure.caption for name, figure in figures.items()}
    assert (HOME / study / "report.md").read_text(encoding="utf-8") == render_markdown(
        results, pictures
    )
    assert {path.name for path in (HOME / study).glob("*.png")} == set(pictures)


@pytest.mark.parametrize("study", ["accumulation-llama", "accumulation-qwen2"])
def test_what_was_seen_is_in_the_results(study: str) -> None:
    results = load_results(HOME / study / "results.json")
    normalisation = {arm.label: arm.normalisation for arm in results.arms}
    cut = {arm.group: arm.cut for arm in results.arms}
    for one in compare_arms(results):
        if normalisation[one.arm] == "exact":
            assert one.same_step is True
            assert one.change == pytest.approx(0, abs=1e-4)
        if normalisation[one.arm] == "sum":
            assert one.ratio is not None
            assert one.ratio[0] > 2000
            assert one.cosine == pytest.approx(1, abs=1e-4)
            assert one.outcome == ("better" if study == "accumulation-llama" else "small")
    wrong = [one for one in compare_arms(results) if normalisation[one.arm] == "mean-of-means"]
    wrong.sort(key=lambda one: cut[one.group])
    assert [cut[one.group] for one in wrong] == [0, 0.5, 0.75, 0.95]
    cosines = [one.cosine for one in wrong if one.cosine is not None]
    assert cosines == sorted(cosines, reverse=True)
    assert len(set(cosines)) == 4
    assert all((one.gradient_difference or 0) > 0.3 for one in wrong)
    assert all((one.change or 0) > 0 for one in wrong[1:])
    told = [cut[one.group] for one in wrong if one.outcome != "unresolved"]
    assert told == ([0.75] if study == "accumulation-llama" else [])
    if study == "accumulation-llama":
        assert (wrong[3].change or 0) < (wrong[2].change or 0)


def test_what_was_seen_on_the_real_model_is_in_its_results() -> None:
    results = load_results(HOME / "accumulation" / "results.json")
    normalisation = {arm.label: arm.normalisation for arm in results.arms}
    found = {one.arm: one for one in compare_arms(results)}
    assert {one.outcome for one in found.values()} == {"one seed"}
    for arm, one in found.items():
        if normalisation[arm] == "exact":
            assert one.same_step is True
            assert one.change == pytest.approx(0, abs=3.5e-07)
        if normalisation[arm] == "mean-of-means":
            assert one.gradient_difference == pytest.approx(0.25, abs=0.03)
            assert one.ratio is not None
            assert one.ratio[0] == pytest.approx(1.2, abs=0.05)
            assert one.change is not None
            assert -0.03 < one.change < 0


@pytest.mark.parametrize("study", STUDIES)
def test_no_path_of_a_machine_is_published(study: str) -> None:
    results = load_results(HOME / study / "results.json")
    places = [results.spec[name] for name in ("model", "data", "eval_data")]
    assert not any(Path(place).is_absolute() for place in places)
