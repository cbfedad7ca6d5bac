"""`samestep export --push`: what is uploaded, and that nothing is lost where it cannot be."""

import json
import re
from pathlib import Path
from typing import Any
from unittest.mock import Mock, create_autospec

import pytest
import yaml
from huggingface_hub import HfApi, RepoUrl
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
from runs import llama_folder, run_config, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from samestep.cli import main
from samestep.train.trainer import train


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("push")
    llama_folder(path / "tiny")
    write_rows(path / "rows.jsonl", 6)
    train(run_config(path, out=str(path / "run"), lora_rank=2, steps=1, micro_batch=8))
    return path


def refusal(status: int) -> HfHubHTTPError:
    return HfHubHTTPError(f"{status} says no", response=Mock(status_code=status))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A stand-in with the signatures of the client, that takes everything."""
    api = create_autospec(HfApi, instance=True)
    api.whoami.return_value = {"name": "me", "auth": {"accessToken": {"role": "write"}}}
    api.create_repo.return_value = RepoUrl("https://huggingface.co/me/sums")
    monkeypatch.setattr("samestep.train.push.HfApi", lambda: api)
    monkeypatch.setattr("samestep.train.push.is_offline", lambda: False)
    return api


def export(folder: Path, out: str, *more: str) -> int:
    return main(["export", str(folder / "run"), "--out", str(folder / out), *more])


def test_what_is_uploaded_loads_and_says_how_it_was_made(
    folder: Path, hub: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    taken = {}

    def upload(**given: Any) -> None:
        path = Path(given["folder_path"])
        taken.update(given, files={each.name for each in path.iterdir()})

    hub.upload_folder.side_effect = upload
    assert export(folder, "whole", "--merge", "--push", "me/sums", "--private") == 0
    assert "uploaded: https://huggingface.co/me/sums" in capsys.readouterr().out
    assert hub.create_repo.call_args.kwargs == {"private": True, "exist_ok": True}
    assert taken["repo_id"] == "me/sums"
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= taken["files"]
    assert "*.safetensors" in taken["delete_patterns"]
    out = folder / "whole"
    AutoModelForCausalLM.from_pretrained(out)
    AutoTokenizer.from_pretrained(out)
    card = (out / "README.md").read_text("utf-8")
    head = yaml.safe_load(card.split("---")[1])
    assert head == {"library_name": "transformers", "tags": ["samestep"]}
    summary = json.loads((folder / "run" / "summary.json").read_text("utf-8"))
    assert re.fullmatch("[0-9a-f]{64}", summary["data"])
    assert f"SHA-256 {summary['data']}" in card
    for name in ("samestep", "torch", "transformers", "peft"):
        assert f"{name} {summary[name]}" in card
    assert "could not change it" in card
    assert "lora_rank: 2" in card
    assert str(folder) not in card


def test_adapters_name_their_base(folder: Path, hub: Any, caplog: pytest.LogCaptureFixture) -> None:
    assert export(folder, "adapters", "--push", "me/sums") == 0
    assert "others do not have the model under these adapters" in caplog.text
    assert hub.create_repo.call_args.kwargs == {"private": None, "exist_ok": True}
    card = (folder / "adapters" / "README.md").read_text("utf-8")
    assert "library_name: peft" in card
    assert "Adapters over `tiny`" in card
    config = folder / "run" / "config.yaml"
    text = config.read_text("utf-8")
    config.write_text(text.replace(str(folder / "tiny"), "owner/base"), "utf-8")
    try:
        assert export(folder, "named") == 0
    finally:
        config.write_text(text, "utf-8")
    assert "base_model: owner/base" in (folder / "named" / "README.md").read_text("utf-8")


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("me/s ms", None, "push: 'me/s ms' is no name of a model on the Hub"),
        ("a/b/c", None, "push: 'a/b/c' is no name of a model on the Hub"),
        ("me/sums", LocalTokenNotFoundError("none"), "push: there is no token of the Hub: log in"),
        ("me/sums", refusal(401), "the Hub does not know the token: log in"),
        ("me/sums", refusal(500), "the Hub refused it (500)"),
        ("me/sums", OSError("no route\nmore"), "cannot be asked (no route)"),
        ("me/sums", "read", "push: the token of me may read alone"),
        ("me/sums", "offline", "offline mode is on (HF_HUB_OFFLINE)"),
    ],
    ids=str,
)
def test_what_cannot_be_is_said_before_any_work(
    folder: Path,
    hub: Any,
    name: str,
    error: Any,
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if error == "read":
        hub.whoami.return_value["auth"]["accessToken"]["role"] = "read"
    elif error == "offline":
        monkeypatch.setattr("samestep.train.push.is_offline", lambda: True)
    else:
        hub.whoami.side_effect = error
    assert export(folder, "none", "--push", name) == 2
    assert message in capsys.readouterr().err
    assert not (folder / "none").exists()
    assert not hub.create_repo.called


@pytest.mark.parametrize(
    ("where", "error", "message"),
    [
        ("create_repo", refusal(403), "the token may not write there"),
        ("create_repo", refusal(404), "the Hub refused it (404)"),
        ("upload_folder", TimeoutError("timed out"), "cannot be asked (timed out)"),
        ("upload_folder", ValueError("a bug"), "it failed (ValueError: a bug)"),
    ],
)
def test_nothing_is_lost_where_an_upload_fails(
    folder: Path,
    hub: Any,
    where: str,
    error: Exception,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    getattr(hub, where).side_effect = error
    name = f"lost-{message[:9].split()[0]}-{where}-{message[-4:-1]}"
    assert export(folder, name, "--merge", "--push", "me/sums") == 1
    found = capsys.readouterr()
    assert message in found.err
    assert f"to go on: hf upload me/sums {folder / name}" in found.err.replace("'", "")
    AutoModelForCausalLM.from_pretrained(folder / name)


def test_private_asks_for_push(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export(folder, "none", "--private") == 2
    assert "private is given without push" in capsys.readouterr().err
