"""Every configuration that docs/train.md names runs, with a tiny model and rows of its own."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from runs import llama_folder, write_rows

from samestep.train.command import read_settings
from samestep.train.settings.paths import texts_of
from samestep.train.trainer import train

PAGE = Path(__file__).parents[2] / "docs" / "train.md"
FILES = dict(re.findall(r'```\w+ title="(.+?)"\n(.*?)```', PAGE.read_text("utf-8"), re.DOTALL))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama_folder(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize("name", [name for name in FILES if name.endswith(".yaml")])
def test_the_configuration_runs(
    name: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for file, content in FILES.items():
        Path(file).write_text(content, encoding="utf-8")
    config: dict[str, Any] = yaml.safe_load(FILES[name])
    sources = [*texts_of(config["data"]), *texts_of(config.get("eval_data"))]
    for source in sources:
        if source.endswith(".jsonl") and not Path(source).exists():
            write_rows(Path(source), 6)
    if Path("texts.jsonl").exists():
        text = Path("texts.jsonl").read_text("utf-8").replace('"completion"', '"text"')
        Path("texts.jsonl").write_text(text, "utf-8")
    if Path("questions.jsonl").exists():
        text = Path("questions.jsonl").read_text("utf-8")
        text = text.replace('"prompt"', '"question"').replace('"completion"', '"answer"')
        Path("questions.jsonl").write_text(text, "utf-8")
    begun = next((n for n in FILES if f"{_out(n)}/model" == config["model"]), None)
    if begun is not None:  # it goes on from what another one made
        train(read_settings([begun, "--model", str(tiny), "--steps", "1"]))
    model = config["model"] if begun else str(tiny)
    Path(name).write_text(
        yaml.safe_dump({**config, "model": model, "steps": 2, "batch_size": 4}), "utf-8"
    )
    summary = train(read_settings([name]))
    assert 0 < summary["steps"] <= 2
    assert (Path(config["out"]) / "model").is_dir()


def _out(name: str) -> str:
    return str(yaml.safe_load(FILES[name]).get("out")) if name.endswith(".yaml") else ""
