"""What a run depends on and its checkpoints do not hold: files of models, references, tokenizers.

A resumed run must find them as they were, or it would go on as another run and not say so: base
weights under adapters, a reference, how the model computes (config.json), how it reads and writes.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError

from samestep.engine.parallel import is_sharded
from samestep.models.load import base_of, resolve_source
from samestep.models.placement import has_drawn_weights
from samestep.models.quantized import quantized_layers
from samestep.train.settings.base import TrainSettings
from samestep.utils.adapter_folder import ADAPTER_WEIGHTS, is_adapter
from samestep.utils.files import open_regular, sha256_of, user_path

_MODELS = ("model", "reference_model", "teacher")
"""Settings that name models."""

_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "chat_template.json", "vocab.json", "vocab.txt", "merges.txt"),
    *("tokenizer.model", "spiece.model", "preprocessor_config.json", "processor_config.json"),
)

_NOT_COMPUTED_WITH = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache"}
"""Fields of config.json that say nothing about what a model computes here."""

_DRAWN_ON = "model: random weights, drawn on"

_ASSUMED = {_DRAWN_ON: "cpu"}
"""What is true of checkpoints that do not say it: earlier versions drew on the CPU alone."""

_SHOWN = 80
"""Characters of a value that is kept as it is; a longer one is kept as its digest."""


def origin_of(settings: TrainSettings, model: Any) -> dict[str, str]:
    """Fingerprints of all files that the run depends on.

    Args:
        settings: They name models and a tokenizer.
        model: The one that trains. The files of its weights count if some of them are frozen, or
            if they are the reference: checkpoints hold all others.

    Returns:
        For each file, or field of config.json, its name with that of the setting, and a short
        value or a digest.
    """
    found: dict[str, str] = {}
    values = settings.model_dump()
    for setting in _MODELS:
        if values.get(setting) is None:
            continue
        file = user_path(values[setting])
        if file.suffix == ".gguf":
            found[f"{setting}: {file.name}"] = sha256_of(file)
            continue
        adapter = is_adapter(values[setting])
        if adapter:
            found |= _digests(setting, file, ("adapter_config.json", ADAPTER_WEIGHTS))
        folder = _folder(base_of(values[setting]) if adapter else values[setting])
        if folder is not None:
            found |= {f"{setting}: {name}": value for name, value in _config(folder).items()}
            if setting != "model" or adapter or _needs_base_weights(values, model):
                weights = sorted(path.name for path in folder.glob("*.safetensors"))
                found |= _digests(setting, folder, weights)
    # Rows of new tokens and a new head train, and are in the checkpoints, unless they refer.
    refers = _refers_to_start(values) and has_drawn_weights(model)
    if refers or (settings.init == "random" and _needs_base_weights(values, model)):
        found[_DRAWN_ON] = _generator(model)
    few_bits = quantized_layers(model)
    if few_bits:  # another release of what quantises them may round otherwise
        digest = hashlib.sha256()
        for layer in few_bits.values():
            for stored in layer.buffers():
                digest.update(stored.cpu().numpy().tobytes())
        found["model: quantised weights"] = digest.hexdigest()
    folder = _folder(settings.tokenizer or settings.model)
    return found if folder is None else found | _digests("tokenizer", folder, _TOKENIZER_FILES)


def differences(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """What differs between two results of `origin_of`, a line each."""
    lines = []
    for name in sorted({*before, *now}):
        was, has = (each.get(name, _ASSUMED.get(name)) for each in (before, now))
        if was is None or has is None:
            lines.append(f"{name}: {'was not there' if was is None else 'is not there any more'}")
        elif was != has:
            opaque = 64 in (len(was), len(has))  # a digest
            lines.append(f"{name}: {'other content' if opaque else f'was {was}, is {has}'}")
    return lines


def _needs_base_weights(values: Mapping[str, Any], model: Any) -> bool:
    return _refers_to_start(values) or not all(
        weight.requires_grad for weight in model.parameters()
    )


def _refers_to_start(values: Mapping[str, Any]) -> bool:
    """Whether the model that a run starts from is its reference as well."""
    return "reference_model" in values and values["reference_model"] is None


def _generator(model: Any) -> str:
    """Whose random numbers the weights are: devices draw others from the same seed."""
    device = next(model.parameters()).device
    if is_sharded(model):  # made on the CPU
        return "cpu"
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _folder(source: str) -> Path | None:
    """Where a model's files lie on this machine."""
    if source.endswith(".gguf"):
        return None
    resolved = resolve_source(source, kind="tokenizer")
    if Path(resolved).is_dir():
        return Path(resolved)
    try:
        return Path(snapshot_download(resolved, local_files_only=True))
    except (OSError, ValueError, HfHubHTTPError):
        return None  # not a model of the Hub's cache


def _config(folder: Path) -> dict[str, str]:
    """The fields of config.json that decide what the model computes."""
    try:
        with open_regular(folder / "config.json") as file:
            fields = json.loads(file.read())
    except (OSError, ValueError):
        return {}
    texts = {name: json.dumps(value, sort_keys=True) for name, value in sorted(fields.items())}
    return {
        f"config.json: {name}": text if len(text) <= _SHOWN else _digest(text)
        for name, text in texts.items()
        if name not in _NOT_COMPUTED_WITH
    }


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _digests(setting: str, folder: Path, names: Iterable[str]) -> dict[str, str]:
    there = [name for name in names if (folder / name).is_file()]
    with ThreadPoolExecutor() as threads:
        digests = threads.map(lambda name: sha256_of(folder / name), there)
    return {f"{setting}: {name}": digest for name, digest in zip(there, digests, strict=True)}
