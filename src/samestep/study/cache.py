"""Finished runs on disk, under a key of everything that they depend on."""

import hashlib
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from samestep.study.results import FORMAT, Run
from samestep.train.config import TrainConfig
from samestep.utils.files import sha256_of, write_atomically

_NOT_CONTENT = {"model", "data", "eval_data", "tokenizer", "out", "device", "resume", "overwrite"}
"""Settings that name places; what stands there counts by its content."""


def fingerprint(model: str) -> str:
    """What stands for a model's content: the digests of its files, or a Hub name and its commit.

    Args:
        model: What `samestep.models.load.resolve` gave.
    """
    folder = Path(model)
    if folder.is_dir():
        kept = (".json", ".safetensors", ".jinja", ".model", ".txt")
        files = sorted(path for path in folder.iterdir() if path.suffix in kept)
        return json.dumps([[path.name, sha256_of(path)] for path in files])
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(model, "config.json")
    # .../snapshots/COMMIT/config.json
    return f"{model}@{Path(found).parent.name if isinstance(found, str) else 'unknown'}"


def run_key(config: TrainConfig, **content: Any) -> str:
    """A key that changes whenever the run could.

    Args:
        config: Its settings.
        content: All else that it depends on, as plain values.

    Returns:
        32 hexadecimal digits.
    """
    versions = [version(package) for package in ("samestep", "torch", "transformers")]
    settings = config.model_dump(mode="json", exclude=_NOT_CONTENT, exclude_unset=True)
    everything = json.dumps([FORMAT, versions, settings, content], sort_keys=True)
    return hashlib.sha256(everything.encode()).hexdigest()[:32]


def write_run(path: Path, run: Run) -> None:
    """Keep a finished run, with a digest of its content."""
    body = run.model_dump_json()
    digest = hashlib.sha256(body.encode()).hexdigest()
    write_atomically(path, json.dumps({"sha256": digest}) + "\n" + body + "\n")


def read_run(path: Path, key: str) -> Run | None:
    """A kept run.

    Args:
        path: Its file.
        key: The key that it must carry.

    Returns:
        The run, or None if there is none.

    Raises:
        ValueError: The file is damaged.
    """
    if not path.exists():
        return None
    try:
        head, body = path.read_text(encoding="utf-8").splitlines()
        run = Run.model_validate_json(body)
        if json.loads(head)["sha256"] != hashlib.sha256(body.encode()).hexdigest():
            raise ValueError("its digest does not match")
    except (OSError, UnicodeDecodeError, KeyError, TypeError, ValidationError) as error:
        raise ValueError(str(error).split("\n", 1)[0]) from None
    if run.key != key:
        raise ValueError("it belongs to another run")
    return run
