"""What docs/studies says is what its results say."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from samestep.study.charts import figures
from samestep.study.report import caption
from samestep.study.results import load_results
from samestep.study.words import markdown

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
    assert publish.filled(text, HOME) == text
    for study in STUDIES:
        assert f"<!-- {study} -->" in text


@pytest.mark.parametrize("study", STUDIES)
def test_the_reports_are_drawn_from_the_results(study: str) -> None:
    results = load_results(HOME / study / "results.json")
    drawn = figures(results)
    pictures = {f"{name}.png": caption(figure) for name, figure in drawn.items()}
    assert (HOME / study / "report.md").read_text(encoding="utf-8") == markdown(results, pictures)
    assert {path.name for path in (HOME / study).glob("*.png")} == set(pictures)


@pytest.mark.parametrize("study", STUDIES)
def test_no_path_of_a_machine_is_published(study: str) -> None:
    results = load_results(HOME / study / "results.json")
    places = [results.spec[name] for name in ("model", "data", "eval_data")]
    assert not any(Path(place).is_absolute() for place in places)
