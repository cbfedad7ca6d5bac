"""Every configuration in docs/objectives.md runs, and every test that a page names is there."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from diffusion import video_folder
from experts import FAMILIES, experts_folder
from objective_rows import ROWS, write_rows_of
from runs import bert_folder, llama_folder, read_lines, t5_folder
from transformers import GotOcr2Processor
from vision import got_folder

from samestep.train.command import read_settings
from samestep.train.trainer import train

PAGE = Path(__file__).parents[1] / "docs" / "objectives.md"
CONFIGS: list[dict[str, Any]] = [
    yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", PAGE.read_text(), re.DOTALL)
]


def tiny_model(folder: Path, name: str) -> Path:
    """A tiny model of the same kind."""
    for family in FAMILIES:
        if family.replace("_", "") in name.lower().replace("-", ""):
            return experts_folder(folder, family)
    kinds = {"bert": bert_folder, "t5": t5_folder, "GOT-OCR": got_folder, "hunyuan": video_folder}
    return next((make for kind, make in kinds.items() if kind in name), llama_folder)(folder)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config["objective"])
def test_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: dict[str, Any]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(GotOcr2Processor, "num_image_tokens", 16)  # of tiny images
    Path("my_objective.py").write_text(
        "import samestep\n\nloss = samestep.CausalLMLoss()\n", encoding="utf-8"
    )
    kind = "taught" if config["data"] == "taught.jsonl" else config["objective"]
    tiny = {
        "model": str(tiny_model(tmp_path / "tiny", config["model"])),
        "data": write_rows_of(kind, tmp_path / "rows.jsonl", 8),
        "out": "out",
        **({"teacher": "tiny"} if "teacher" in config else {}),
        "steps": 1,
    }
    Path("run.yaml").write_text(yaml.safe_dump({**config, **tiny}), encoding="utf-8")
    train(read_settings(["run.yaml"]))
    assert read_lines(Path("out/log.jsonl"))[0]["loss"] != 0


def test_every_objective_has_a_configuration() -> None:
    from samestep.train.settings.objectives import OBJECTIVES

    assert set(OBJECTIVES) <= {config["objective"] for config in CONFIGS}
    assert set(OBJECTIVES) <= set(ROWS)


ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]


def test_every_test_that_a_page_names_is_there() -> None:
    named = {name for page in PAGES for name in re.findall(r"`(tests/[^`* ]+)`", page.read_text())}
    missing = []
    for name in named:
        file, _, function = name.partition("::")
        path = ROOT / file
        is_there = path.exists() and (not function or f"def {function}(" in path.read_text())
        missing += [] if is_there else [name]
    assert len(named) > 20
    assert not missing
