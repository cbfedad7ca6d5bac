"""The card of an exported model: how it was made, from what, and by which versions."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from samestep.utils.files import user_path
from samestep.utils.messages import read_yaml
from samestep.utils.version import package_version

_PLACES = frozenset(
    {"out", "model", "data", "eval_data", "device", "tokenizer", "reference_model", "teacher"}
)
"""Settings that name folders of the machine that the run was on."""

_NUMBERS = ("steps", "examples", "tokens", "evaluation_before", "evaluation_after", "best")

_VERSIONS = ("samestep", "torch", "transformers", "peft", "bitsandbytes")


def model_card(run: str, *, adapters: bool) -> str:
    """How a model was made, as the README.md of its folder.

    Args:
        run: The run's folder.
        adapters: Whether what is exported is adapters alone.

    Returns:
        Markdown, with the metadata that the Hub reads; short where the folder is a model alone.
    """
    root = Path(run).expanduser()
    config, summary = root / "config.yaml", root / "summary.json"
    settings: dict[str, Any] = read_yaml(config) if config.is_file() else {}
    lines = ["---", yaml.safe_dump(_metadata(settings, adapters=adapters)).rstrip(), "---", ""]
    lines += [f"# {root.name}", ""]
    if settings:
        lines += _how(settings, adapters=adapters)
    if summary.is_file():
        lines += _numbers(json.loads(summary.read_text(encoding="utf-8")))
    return "\n".join([*lines, "", f"Exported by samestep {package_version()}.", ""])


def _metadata(settings: Mapping[str, Any], *, adapters: bool) -> dict[str, Any]:
    found = {"library_name": "peft" if adapters else "transformers", "tags": ["samestep"]}
    model = str(settings.get("model", ""))
    if model.count("/") == 1 and not model.startswith((".", "/", "~")) and _is_name(model):
        found["base_model"] = model
    return found


def _is_name(model: str) -> bool:
    """Whether a model was loaded from the Hub: nothing of that name lies here."""
    return not model.endswith(".gguf") and not user_path(model).exists()


def _how(settings: Mapping[str, Any], *, adapters: bool) -> list[str]:
    kept = {name: value for name, value in settings.items() if name not in _PLACES}
    base = Path(str(settings["model"])).name
    bits = settings.get("quantization")
    stored = f", held in {bits[0]} bits" if bits else ""
    what = f"Adapters over `{base}`{stored}, trained" if adapters else f"Trained from `{base}`"
    return [
        f"{what} by `samestep train`, objective `{settings['objective']}`. Every step is a "
        "function of its effective batch alone: micro-batches, padding and ranks could not change "
        "it.",
        *("", "```yaml", yaml.safe_dump(kept, sort_keys=False).rstrip(), "```", ""),
    ]


def _numbers(summary: Mapping[str, Any]) -> list[str]:
    lines = [f"- {name}: {summary[name]}" for name in _NUMBERS if summary.get(name) is not None]
    if summary.get("data"):
        lines.append(f"- training data, tokenised: SHA-256 {summary['data']}")
    versions = [f"{name} {summary[name]}" for name in _VERSIONS if summary.get(name)]
    return [*lines, f"- {', '.join(versions)}"]
