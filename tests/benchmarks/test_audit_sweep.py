"""The sweep of heads: in processes that are limited, several at a time, and resumed."""

import importlib
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parents[2] / "benchmarks" / "audit"


def module(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(HERE))
    return importlib.import_module(name)


def work(name: str) -> dict[str, Any]:
    if name == "raises":
        raise ValueError("no such head")
    if name == "dies":
        os._exit(3)
    if name == "hangs":
        time.sleep(60)
    return {"verdict": "exact", "name": name}


def test_what_fails_dies_or_hangs_is_listed_and_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    forks = module("forks", monkeypatch)
    names = ["hangs", "raises", "dies", "one", "two"]
    found = dict(forks.in_forks(work, names, jobs=2, seconds=2))
    assert found.keys() == set(names)
    assert found["one"] == {"verdict": "exact", "name": "one"}
    assert [found[name]["why"] for name in ("hangs", "raises", "dies")] == [
        "stopped after 2 s",
        "no such head",
        "the process died with code 3",
    ]


def test_a_class_that_was_tried_is_not_tried_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sweep = module("sweep", monkeypatch)
    results = tmp_path / "heads.json"
    classes = {
        "Exact": {"verdict": "exact"},
        "Tried": {"verdict": "inexact", "with exact": {"verdict": "refused", "why": "two units"}},
        "New": {"verdict": "inexact"},
        "Newer": {"verdict": "inexact"},
    }
    results.write_text(json.dumps({"classes": classes}))
    monkeypatch.setattr(sweep, "HEADS", results)
    monkeypatch.setattr(sweep, "cure", lambda name: {"verdict": "exact", "left": [], "of": name})
    sweep.resume_cures(["Newer"])
    sweep.resume_cures(jobs=2)
    held = {
        name: found.get("with exact", {})
        for name, found in json.loads(results.read_text())["classes"].items()
    }
    assert [held[name].get("of") for name in classes] == [None, None, "New", "Newer"]
    assert held["Tried"]["why"] == "two units"
