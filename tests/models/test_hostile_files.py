"""Files of models and images that would run something, or take what there is: refused."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import llama_folder
from safetensors.torch import load_file

from samestep.data.readers import images
from samestep.data.readers.classification import _all_classes
from samestep.data.rows import Row, RowError
from samestep.errors import ConfigError, DataError
from samestep.models.load import load_model


class Mark:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["x.bin", "../x.safetensors", "x.safetensors.bin"])
def test_an_index_may_name_safetensors_beside_it_alone(tmp_path: Path, name: str) -> None:
    folder = llama_folder(tmp_path / "tiny")
    weights = load_file(folder / "model.safetensors")
    torch.save({"a": Mark(tmp_path / "ran")}, folder / "x.bin")
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, name)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"index.json of .* names .*safetensors files beside it"):
        load_model(str(folder))
    assert not (tmp_path / "ran").exists()


def test_a_pickle_with_another_name_is_not_read(tmp_path: Path) -> None:
    folder = llama_folder(tmp_path / "tiny")
    torch.save({"a": Mark(tmp_path / "ran")}, folder / "model.safetensors")
    with pytest.raises(ConfigError, match="could not be loaded"):
        load_model(str(folder))
    assert not (tmp_path / "ran").exists()


def test_an_adapter_beside_weights_is_refused(tmp_path: Path) -> None:
    folder = llama_folder(tmp_path / "tiny")
    (folder / "adapter_config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ConfigError, match="holds an adapter"):
        load_model(str(folder))


@pytest.mark.parametrize("name", ["x.eps", "x.png"])
def test_no_image_starts_a_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    pytest.importorskip("PIL")
    text = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
    (tmp_path / name).write_text(text, encoding="utf-8")

    def started(*_: object, **__: object) -> None:
        raise AssertionError("a program was started")

    monkeypatch.setattr(subprocess, "Popen", started)
    with pytest.raises(RowError, match="none of the formats that are read"):
        images._open_image(tmp_path / name)


@pytest.mark.parametrize("kind", ["DDS", "SGI", "PPM", "TGA", "ICO", "PCX"])
def test_other_formats_are_refused_by_name(tmp_path: Path, kind: str) -> None:
    Image = pytest.importorskip("PIL.Image")
    Image.new("RGB", (16, 16)).save(tmp_path / "x", format=kind)
    with pytest.raises(RowError, match="none of the formats"):
        images._open_image(tmp_path / "x")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_damaged_images_are_errors_of_their_row(tmp_path: Path, kind: str) -> None:
    Image = pytest.importorskip("PIL.Image")
    Image.linear_gradient("L").resize((32, 32)).save(tmp_path / "x", format=kind)
    whole = (tmp_path / "x").read_bytes()
    assert images._open_image(tmp_path / "x").size == (32, 32)
    for at in range(0, len(whole), max(1, len(whole) // 150)):
        content = bytearray(whole)
        content[at] ^= 0xFF
        (tmp_path / "x").write_bytes(content)
        try:
            images._open_image(tmp_path / "x")
        except RowError as error:
            assert "x: " in str(error)


def test_a_pipe_is_no_image(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.png")
    with pytest.raises(RowError, match="not a regular file"):
        images._open_image(tmp_path / "x.png")


@pytest.mark.parametrize("label", ["20000000", "9" * 4000])
def test_one_large_number_does_not_make_as_many_classes(label: str) -> None:
    rows = [Row({}, f"rows.jsonl:{number}") for number in (1, 2)]
    with pytest.raises(DataError, match=r"rows.jsonl:2: class (20000000|9+): numbered classes"):
        _all_classes(rows, [["0"], [label]])


def test_numbered_classes_may_have_gaps_and_digits_of_other_scripts_are_names() -> None:
    assert _all_classes([], [["0"], ["999"]]) == [str(number) for number in range(1000)]
    assert _all_classes([], [["²"], ["1"]]) == ["1", "²"]
