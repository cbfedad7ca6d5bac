"""GGUF files as ordinary model folders: converted once, then cached."""

import logging
import shutil
from pathlib import Path

import torch

from samestep.errors import ConfigError
from samestep.utils.files import cache_folder, sha256_of, sync

log = logging.getLogger("samestep")


def model_folder(file: Path) -> Path:
    """The folder of safetensors, config and tokenizer that a .gguf file was converted to.

    The first call dequantises to float32, which takes a while; later ones find the result in the
    cache, by the content of the file.

    Args:
        file: A .gguf file of an architecture that transformers reads.

    Returns:
        The folder.

    Raises:
        ConfigError: The file is missing or cannot be read as a model.
    """
    if not file.is_file():
        raise ConfigError(f"model: there is no file {file}")
    folder = cache_folder() / "gguf" / sha256_of(file)[:32]
    if folder.is_dir():
        return folder
    log.info("converting %s to safetensors (once)", file.name)
    aside = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        _convert(file, aside)
        for path in (*aside.iterdir(), aside):
            sync(path)
        aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder


def _convert(file: Path, target: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        where = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
        tokenizer = AutoTokenizer.from_pretrained(**where)
        model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    except (OSError, ValueError, KeyError, NotImplementedError) as error:
        raise ConfigError(f"model: {file} cannot be read as a GGUF model: {error}") from error
    # What is saved is plain float32: without these two it would claim to be quantised still.
    model.hf_quantizer = None
    del model.config.quantization_config
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
