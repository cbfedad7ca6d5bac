from pathlib import Path

import pytest

from samestep.errors import ConfigError
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
