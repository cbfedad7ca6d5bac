import os
from pathlib import Path
from typing import Any

import pytest

from samestep.errors import CheckpointError, ConfigError
from samestep.train.run_folder import RunFolder
from samestep.train.settings.base import finalize
from samestep.train.settings.language import CausalLMSettings


def config(folder: Path, **changes: object) -> CausalLMSettings:
    needed = {"model": "m", "data": "d", "out": str(folder)}
    return finalize(CausalLMSettings.model_validate({**needed, **changes}))


def test_a_new_folder_is_made_with_the_settings(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "a" / "b")
    folder.check(config(folder.root))
    assert not folder.root.exists()
    folder.open(config(folder.root))
    assert "model: m" in folder.config.read_text(encoding="utf-8")


def test_another_run_is_refused_and_told_what_to_do(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.open(config(tmp_path))
    with pytest.raises(ConfigError, match=r"--resume.*--overwrite"):
        folder.check(config(tmp_path))
    folder.check(config(tmp_path, overwrite=True))
    folder.check(config(tmp_path, resume=True))


def test_resume_names_every_changed_setting(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.open(config(tmp_path))
    with pytest.raises(ConfigError) as error:
        folder.check(config(tmp_path, resume=True, lr=0.5, batch_size=4, micro_batch=1))
    assert "lr: was 2e-05, is 0.5" in str(error.value)
    assert "batch_size: was 32, is 4" in str(error.value)
    assert "micro_batch: was" not in str(error.value)


def test_resume_may_change_what_cannot_change_the_step(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.open(config(tmp_path))
    folder.check(config(tmp_path, resume=True, micro_batch=1, padding="left", keep=5))


def test_overwrite_leaves_other_files_alone(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.open(config(tmp_path))
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    folder.checkpoints.mkdir()
    folder.open(config(tmp_path, overwrite=True))
    assert (tmp_path / "notes.txt").exists()
    assert not folder.checkpoints.exists()


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_text("", encoding="utf-8")
    with pytest.raises(ConfigError, match="is a file"):
        RunFolder(path).check(config(path))


def test_a_folder_that_is_only_checked_is_left_as_it_was(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "a" / "b")
    folder.hold(config(folder.root))
    assert folder.root.exists()
    folder.close()
    assert list(tmp_path.iterdir()) == []


def test_the_folder_is_locked_before_it_is_looked_at(tmp_path: Path) -> None:
    first, second = RunFolder(tmp_path / "out"), RunFolder(tmp_path / "out")
    first.hold(config(first.root))
    with pytest.raises(ConfigError, match="another run is writing to"):
        second.hold(config(first.root))
    first.open(config(first.root))
    first.close()
    with pytest.raises(ConfigError, match="already holds a run"):
        second.hold(config(first.root))
    first.hold(config(first.root, resume=True))


def test_a_folder_that_was_replaced_meanwhile_is_written_to_no_more(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "out")
    folder.open(config(folder.root))
    folder.check_held()
    folder.root.rename(tmp_path / "moved")
    with pytest.raises(CheckpointError, match="deleted or replaced"):
        folder.check_held()
    other = RunFolder(tmp_path / "out")
    other.open(config(folder.root))
    with pytest.raises(CheckpointError, match="deleted or replaced"):
        folder.check_held()
    other.check_held()


@pytest.mark.parametrize("field", ["model", "data", "eval_data", "tokenizer"])
@pytest.mark.parametrize("linked", [False, True])
def test_an_input_inside_of_what_is_replaced_is_refused(
    tmp_path: Path, field: str, linked: bool
) -> None:
    source = tmp_path / "out" / "model" / "part"
    source.mkdir(parents=True)
    given = tmp_path / "link" if linked else source
    if linked:
        given.symlink_to(source)
    folder = RunFolder(tmp_path / "out")
    with pytest.raises(ConfigError, match=rf"{field}: .* lies in .*out/model"):
        folder.hold(config(folder.root, overwrite=True, **{field: str(given)}))
    assert source.exists()


def test_rows_beside_what_a_run_writes_are_fine(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("", encoding="utf-8")
    RunFolder(tmp_path).hold(config(tmp_path, data=str(tmp_path / "rows.jsonl")))


@pytest.mark.parametrize(
    "name", ["log.jsonl", "config.yaml", "checkpoints", "model", "tracking", ".lock"]
)
def test_links_in_the_folder_are_not_written_through(tmp_path: Path, name: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).symlink_to(tmp_path / "elsewhere")
    folder = RunFolder(tmp_path / "out")
    with pytest.raises(ConfigError, match=r"link"):
        folder.hold(config(folder.root, overwrite=True))
    assert not (tmp_path / "elsewhere").exists()


DAMAGE: dict[str, Any] = {
    "half": lambda text: text[: text.rindex(b"\n", 0, len(text) // 2)],
    "no UTF-8": lambda text: b"\xff" + text,
    "no fields": lambda text: b"nothing",
    "no YAML": lambda text: b"a: [",
    "a pipe": None,
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_settings_do_not_stand_in_the_way(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = RunFolder(tmp_path)
    folder.open(config(tmp_path))
    folder.close()
    damage = DAMAGE[kind]
    if damage is None:
        folder.config.unlink()
        os.mkfifo(folder.config)
    else:
        folder.config.write_bytes(damage(folder.config.read_bytes()))
    folder.hold(config(tmp_path, resume=True, seed=0 if kind == "half" else 7))
    assert "resume: " in caplog.text
    assert ("is not known: not compared" in caplog.text) == (kind == "half")
