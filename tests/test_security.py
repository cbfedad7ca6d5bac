"""What docs/security.md promises about code, pickles and paths."""

import ast
import json
from pathlib import Path

import pytest
from runs import llama_folder, run_config, write_rows
from transformers import dynamic_module_utils

from samestep.errors import ConfigError
from samestep.train.command import read_settings
from samestep.train.trainer import train

SOURCE = Path(__file__).parent.parent / "src" / "samestep"
FORBIDDEN = {
    *("pickle.load", "pickle.loads", "pickle.Unpickler", "torch.load", "torch.jit.load"),
    *("marshal.loads", "shelve.open", "joblib.load", "yaml.load", "yaml.unsafe_load"),
    *("eval", "exec", "os.system", "os.popen"),
}
ALLOWED = {("audit/adapters/processes.py", "pickle.loads")}
"""The auditor reads what its own child processes have written for it."""


def name_of(function: ast.expr) -> str:
    if isinstance(function, ast.Attribute):
        return f"{name_of(function.value)}.{function.attr}"
    return function.id if isinstance(function, ast.Name) else ""


def dangers(text: str) -> set[str]:
    """The forbidden calls in a source, and shells."""
    calls = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
    names = {name_of(call.func) for call in calls} & FORBIDDEN
    shell = any(keyword.arg == "shell" for call in calls for keyword in call.keywords)
    return names | ({"shell"} if shell else set())


def test_nothing_unpickles_or_runs_text() -> None:
    found = {
        (str(path.relative_to(SOURCE)), name)
        for path in SOURCE.rglob("*.py")
        for name in dangers(path.read_text(encoding="utf-8"))
    }
    assert found == ALLOWED


def test_the_search_finds_what_it_looks_for() -> None:
    assert dangers("torch.load(x)\nsubprocess.run(y, shell=True)") == {"torch.load", "shell"}


def test_yaml_makes_no_objects(tmp_path: Path) -> None:
    mark = tmp_path / "made"
    path = tmp_path / "run.yaml"
    path.write_text(f"model: !!python/object/apply:pathlib.Path.touch [{mark}]\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="not YAML"):
        read_settings([str(path)])
    assert not mark.exists()


REMOTE = """
from pathlib import Path
from transformers import LlamaForCausalLM
Path({mark!r}).touch()
class Remote(LlamaForCausalLM):
    pass
"""


def test_code_beside_a_model_runs_only_when_trusted_and_the_log_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    mark, folder = tmp_path / "ran", llama_folder(tmp_path / "tiny")
    (folder / "remote.py").write_text(REMOTE.format(mark=str(mark)), encoding="utf-8")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["auto_map"] = {"AutoModelForCausalLM": "remote.Remote"}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    train(run_config(tmp_path, steps=1))
    assert not mark.exists()
    assert "trust_remote_code" not in caplog.text
    train(run_config(tmp_path, steps=1, overwrite=True, trust_remote_code=True))
    assert mark.exists()
    assert "trust_remote_code: Python code that comes with the model will run" in caplog.text


def test_a_run_writes_into_its_folder_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Paths in rows and in names do not become paths of files."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setenv("SAMESTEP_CACHE", str(tmp_path / "cache"))
    llama_folder(work / "tiny")
    rows = write_rows(work / "rows..%2f..jsonl", 9)
    evil = {"prompt": "../../evil", "completion": "/etc/../evil\x00", "weight": 1}
    with rows.open("a", encoding="utf-8") as file:
        file.write(json.dumps(evil) + "\n")
    settings = {"model": str(work / "tiny"), "data": str(rows), "out": "deep/out"}
    config = run_config(work, steps=2, save_every=1, **settings)
    before = set(tmp_path.rglob("*"))
    train(config)
    inside = (work / "deep", tmp_path / "cache")
    outside = [
        path
        for path in set(tmp_path.rglob("*")) - before
        if not any(path.is_relative_to(folder) for folder in inside)
    ]
    assert outside == []
