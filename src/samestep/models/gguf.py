"""Models in GGUF files: converted once, to a folder that transformers loads."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    modeling_gguf_pytorch_utils,
)

from samestep.errors import ConfigError
from samestep.models.files import made_in_cache
from samestep.utils.files import cache_folder, sha256_of
from samestep.utils.waiting import waiting

_log = logging.getLogger("samestep")


def convert_gguf(file: Path) -> Path:
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

    def write(folder: Path) -> None:
        _log.info("converting %s to safetensors (once)", file.name)
        with waiting(f"converting {file.name}"):
            _write_safetensors(file, folder)

    folder = cache_folder() / "gguf" / sha256_of(file)[:32]
    return made_in_cache(folder, write, failure=f"{file} could not be converted")


@contextmanager
def _without_bar() -> Iterator[None]:
    """Without the bar of transformers, which none of its settings turns off: ours stands there."""
    bar = modeling_gguf_pytorch_utils.tqdm
    modeling_gguf_pytorch_utils.tqdm = lambda tensors, **_: tensors
    try:
        yield
    finally:
        modeling_gguf_pytorch_utils.tqdm = bar


def _write_safetensors(file: Path, folder: Path) -> None:
    try:
        source = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
        tokenizer = AutoTokenizer.from_pretrained(**source)
        with _without_bar():
            model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    except (OSError, ValueError, KeyError, NotImplementedError) as error:
        raise ConfigError(f"model: {file} cannot be read as a GGUF model: {error}") from error
    # What is saved is plain float32; with these two set it would still claim to be quantised.
    model.hf_quantizer = None
    del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
