"""`samestep certificate`: what it writes, and what it notices when code or versions change."""

import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from samestep.audit.certificate import badge
from samestep.cli import main

LOOP = """
import torch
from helper_of_the_loop import share
examples = [torch.full((n, 2), float(n)) for n in (1, 4, 2, 3)]
model = lambda: torch.nn.Linear(2, 1)
collate = torch.cat
def step(model, micro_batches):
    for micro in micro_batches:
        (model(micro).square().sum() * share(micro, micro_batches)).backward()
"""
HELPER = "def share(micro, micros):\n    return 1 / sum(map(len, micros))\n"


def test_a_certificate_speaks_of_all_files_of_the_subject(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    loop, helper = tmp_path / "loop.py", tmp_path / "helper_of_the_loop.py"
    loop.write_text(LOOP, encoding="utf-8")
    helper.write_text(HELPER, encoding="utf-8")
    (tmp_path / "sub").mkdir()
    given = ["--out", "sub/c.json", "--badge", "sub/c.svg", "--axes", "micro-batch,order"]
    assert main(["certificate", "loop.py", *given]) == 0
    found = json.loads(Path("sub/c.json").read_text(encoding="utf-8"))
    assert set(found["source"]["files"]) == {"loop.py", "helper_of_the_loop.py"}
    assert (found["subject"], found["verdict"]) == ("../loop.py", "exact")
    assert [axis["name"] for axis in found["axes"]] == ["micro-batch", "order"]
    assert all(axis["noise_floor"] for axis in found["axes"])
    assert {"torch", "samestep", "python"} <= set(found["versions"])
    assert "exact on 2 axes" in Path("sub/c.svg").read_text(encoding="utf-8")
    verify = ["certificate", "--verify", "sub/c.json"]
    assert main(verify) == 0
    helper.write_text(HELPER.replace("1 /", "1.0 /"), encoding="utf-8")
    assert main(verify) == 1
    assert "helper_of_the_loop.py: it has changed" in capsys.readouterr().out
    loop.unlink()
    assert main(verify) == 1
    assert "loop.py: it is gone" in capsys.readouterr().out


def written(path: Path, **changes: Any) -> Path:
    content = {
        "format": "samestep certificate 1", "subject": "loop.py", "name": "loop",
        "verdict": "exact", "axes": [], "versions": {"torch": "0.1"},
        "source": {"sha256": "0", "files": {}}, **changes,
    }  # fmt: skip
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def test_other_versions_and_forged_hashes_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path / "c.json")
    assert main(["certificate", "--verify", str(path)]) == 1
    out = capsys.readouterr().out
    assert "torch 0.1: now 2" in out
    assert "its hash is not that of its files" in out
    for changes in ({"format": "x"}, {"source": 3}):
        assert main(["certificate", "--verify", str(written(path, **changes))]) == 2
    path.write_text("{", encoding="utf-8")
    assert main(["certificate", "--verify", str(path)]) == 2


def test_what_could_not_be_written_is_refused_before_the_work(tmp_path: Path) -> None:
    same = ["--out", f"{tmp_path}/x", "--badge", f"{tmp_path}/x"]
    assert main(["certificate", f"{tmp_path}/never_read.py", *same]) == 2
    assert main(["certificate"]) == 2


def test_a_badge_is_well_formed_whatever_the_name() -> None:
    axes = [{"verdict": "inexact"}, {"verdict": "exact"}, {"verdict": "skipped"}]
    text = badge({"axes": axes, "verdict": "inexact", "name": "a <b> & \x1b\"'"})
    root = ET.fromstring(text)
    assert root.get("role") == "img"
    assert "inexact on 1 of 2" in text
    assert "#b91c1c" in text
