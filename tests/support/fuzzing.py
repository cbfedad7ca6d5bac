"""Inputs that no one would write, and the two ways that they may end: right, or by our error.

Each kind of input has a function that makes one of them from a source of random numbers, gives it
to samestep, and returns whether it was taken (True), or refused by an error of samestep's own.
Anything else that comes out is a fault.
"""

import gzip
import json
import random
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from objective_rows import ROWS
from safetensors.numpy import save_file
from tiny import build_tokenizer, tiny_tokenizer

from samestep.data.examples import Example, Examples
from samestep.data.load import load_rows
from samestep.data.readers import images
from samestep.data.readers.latents import read_tensors
from samestep.data.rows import RowError
from samestep.data.tokenize import read_cache, write_cache
from samestep.errors import SamestepError
from samestep.train import checkpoint
from samestep.train.command import read_settings
from samestep.train.log import keep_steps
from samestep.train.micro_tokens import Costs, cached_costs
from samestep.train.progress import DataFingerprint, Progress
from samestep.train.recipes.base import recipe_for
from samestep.train.settings.base import finalize
from samestep.train.settings.objectives import settings_class

REFUSED = (SamestepError, RowError)
"""Samestep's own errors; that of a row becomes a line of one."""

NUMBERS = [
    *(0, 1, -1, 2, 7, 10**18, 2**63, 2**64, 10**400, -(10**400), 0.5, -0.0, 1e308, 1e-320),
    *(float("nan"), float("inf"), float("-inf")),
]
TEXTS = [
    *("", " ", "a", "²", "\ud83d", "half \udc00", "\x00", "\x1b[2J", "日本", "-100", "1e5", "true"),
    *("null", "user", "assistant", "text", "image", "~nobody/x", "/dev/null", "a" * 3000),
    *("<|im_end|>", "Human: a", "\n\nHuman: a\n\nAssistant: b", '{"a": 1}', "[1"),
]
KEYS = [
    *("role", "content", "type", "text", "image", "weight", "tool_calls", "function", "arguments"),
    *("answer_start", "from", "value", "name", "messages", "x"),
]


def anything(draw: random.Random, depth: int = 0) -> Any:
    """A value as JSON may hold it."""
    kind = draw.randrange(6 if depth < 3 else 3)
    if kind == 0:
        return draw.choice([None, True, False])
    if kind == 1:
        return draw.choice([draw.choice(NUMBERS), draw.randint(-9, 300)])
    if kind == 2:
        return draw.choice(TEXTS)
    if kind == 3:
        return {draw.choice(KEYS): anything(draw, depth + 1) for _ in range(draw.randint(0, 3))}
    size = draw.randint(0, 3)
    if kind == 4:
        return [anything(draw, depth + 1)] * size
    return [anything(draw, depth + 1) for _ in range(size)]


def spoiled(draw: random.Random, value: Any, depth: int = 0) -> Any:
    """A value with something else in one place of it."""
    if depth and draw.random() < 0.3:
        return anything(draw, depth)
    if isinstance(value, dict) and value:
        key = draw.choice(sorted(value))
        changed = {**value, key: spoiled(draw, value[key], depth + 1)}
        if draw.random() < 0.1:
            del changed[key]
        return changed
    if isinstance(value, list) and value:
        at = draw.randrange(len(value))
        return [*value[:at], spoiled(draw, value[at], depth + 1), *value[at + 1 :]]
    return anything(draw, depth)


def damaged(draw: random.Random, content: bytes) -> bytes:
    """Bytes with bits flipped, a part gone, twice or at random; or something else altogether."""
    for _ in range(draw.randint(1, 3)):
        if not content:
            return draw.choice([b"", b"\x00" * 9, b"[" * 5000])
        at, kind = draw.randrange(len(content)), draw.randrange(6)
        size = draw.randint(1, 1 + len(content) // 4)
        if kind < 2:
            flipped = bytes([content[at] ^ (1 << draw.randrange(8))])
            content = content[:at] + flipped + content[at + 1 :]
        elif kind == 2:
            content = content[:at]
        elif kind == 3:
            content = content[:at] + content[at + size :]
        elif kind == 4:
            content = content[:at] + content[at : at + size] * 2 + content[at + size :]
        else:
            content = content[:at] + draw.randbytes(size) + content[at + size :]
    return content


def fuzz_settings(folder: Path, draw: random.Random) -> bool:
    """Fields of an objective with anything in them."""
    kind = settings_class(draw.choice([name for name in ROWS if name != "taught"]))
    values: dict[str, Any] = {"model": "m", "data": "d", "out": "o"}
    for _ in range(draw.randint(1, 4)):
        values[draw.choice([*kind.model_fields, "batch_sise"])] = anything(draw)
    return taken(lambda: finalize(kind(**values)))


YAML = """model: tiny
data: [rows.jsonl, more.jsonl]
out: runs/one
objective: causal_lm
batch_size: 8   # rows
steps: 6
lr: 1e-2
precision: float64
track: []
"""
PIECES = [
    *("!!python/object/apply:os.system [ls]\n", "a: &a [*a]\n", "steps: 2026-01-01\n", "- x\n"),
    *("steps: 7\n", "batch-size: 9\n", "lr: .nan\n", "lr: 1e999\n", "? [a]\n: b\n", "\t", "{", "["),
    *("lora_targets: {a: b}\n", "<<: *x\n", "x: !!binary aGk=\n", "seed: 0x" + "f" * 40 + "\n"),
    *("%YAML 9.9\n---\n", "--- \n---\n", "'", '"', "\x00", "\x85", "[" * 2000, "a: " * 300),
]


def fuzz_yaml(folder: Path, draw: random.Random) -> bool:
    """A file of settings with lines put in, and bytes changed."""
    lines = YAML.splitlines(keepends=True)
    for _ in range(draw.randint(0, 2)):
        lines.insert(draw.randint(0, len(lines)), draw.choice(PIECES))
    content = "".join(lines).encode()
    file = folder / "run.yaml"
    file.write_bytes(damaged(draw, content) if draw.random() < 0.6 else content)
    return taken(lambda: read_settings([str(file)]))


FAMILIES = [name for name in ROWS if name not in ("vision_language", "flow_matching")]


@cache
def _tokenizer(masked: bool) -> Any:
    return build_tokenizer(mask="<|im_start|>") if masked else tiny_tokenizer(chat=True)


def fuzz_rows(folder: Path, draw: random.Random) -> bool:
    """A file of rows of an objective, one or two of them spoiled: read, and made a micro-batch."""
    family = draw.choice(FAMILIES)
    rows: list[Any] = [ROWS[family](draw) for _ in range(draw.randint(2, 4))]
    if draw.random() < 0.3 and family in ("causal_lm", "classification", "dpo", "kto", "policy"):
        rows = [_as_messages(row) for row in rows]
    for _ in range(draw.randint(1, 2)):
        at = draw.randrange(len(rows))
        extra = draw.choice(["weight", "label", "tools", "group", "old_log_p", "margin", "tags"])
        if draw.random() < 0.25:
            rows[at] = {**rows[at], extra: anything(draw)} if isinstance(rows[at], dict) else 3
        else:
            rows[at] = spoiled(draw, rows[at])
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    file = folder / "rows.jsonl"
    file.write_bytes(damaged(draw, content) if draw.random() < 0.1 else content)
    return taken(lambda: _read_and_collate(family, file))


def fuzz_files(folder: Path, draw: random.Random) -> bool:
    """A file of rows in each of the formats, damaged."""
    rows = [{"prompt": "What is 1 + 1?", "completion": f"{at}", "weight": 1.5} for at in range(4)]
    suffix = draw.choice([".csv", ".tsv", ".json", ".jsonl", ".jsonl.gz", ".csv.gz", ".parquet"])
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    tab = "\t" if suffix == ".tsv" else ","
    table = "".join(tab.join(map(str, row)) + "\n" for row in [[*rows[0]], *map(dict.values, rows)])
    content = (lines if "jsonl" in suffix else table).encode()
    if suffix == ".json":
        content = json.dumps(rows).encode()
    elif suffix == ".parquet":
        content = _parquet()
    elif suffix.endswith(".gz"):
        content = gzip.compress(content, mtime=0)
    file = folder / f"rows{suffix}"
    file.write_bytes(damaged(draw, content))
    return taken(lambda: load_rows(file))


@cache
def _parquet() -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    into = BytesIO()
    columns = {"prompt": ["a", "b"], "completion": ["c", "d"], "messages": [[{"role": "x"}], []]}
    pq.write_table(pa.table(columns), into)
    return into.getvalue()


def _as_messages(row: dict[str, Any]) -> dict[str, Any]:
    changed = dict(row)
    for name in row.keys() & {"prompt", "completion", "chosen", "rejected"}:
        role = "user" if name == "prompt" else "assistant"
        changed[name] = [{"role": role, "content": row[name]}]
    if "text" in row:
        changed["messages"] = [{"role": "user", "content": changed.pop("text")}]
    return changed


def _read_and_collate(family: str, file: Path) -> None:
    objective = "distillation" if family == "taught" else family
    more = {} if family != "distillation" else {"teacher": "m"}
    kind = settings_class(objective)
    recipe = recipe_for(
        finalize(kind(model="m", data=str(file), out="o", objective=objective, **more))
    )
    records = recipe.read(str(file), _tokenizer(family == "masked_lm"))
    assert records.report is not None
    records.report.render("rows.jsonl").encode("utf-8", "backslashreplace")
    indices = list(range(len(records)))
    recipe.collate(records, indices, padding="right", pad_id=1, key=(0, 0))


@cache
def _images() -> list[bytes]:
    from PIL import Image

    made = []
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "DDS", "EPS"):
        into = BytesIO()
        Image.linear_gradient("L").resize((24, 24)).convert("RGB").save(into, format=kind)
        made.append(into.getvalue())
    return made


def fuzz_images(folder: Path, draw: random.Random) -> bool:
    """A file of an image, damaged."""
    file = folder / f"x.{draw.choice(['png', 'jpg', 'eps', 'txt'])}"
    file.write_bytes(damaged(draw, draw.choice(_images())))
    return taken(lambda: images._open_image(file))


def fuzz_latents(folder: Path, draw: random.Random) -> bool:
    """A file of latents, damaged."""
    file = folder / f"x{draw.choice(['.npz', '.safetensors'])}"
    latents = {"latents": np.ones((2, 3, 3), dtype=np.float32)}
    if file.suffix == ".npz":
        np.savez_compressed(file, **latents)
    else:
        save_file(latents, file)
    file.write_bytes(damaged(draw, file.read_bytes()))
    return taken(lambda: read_tensors(file))


def network(value: float) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """Four weights of a value, and an optimizer with state."""
    model = torch.nn.Linear(2, 1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.fill_(value)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    return model, optimizer


def _saved(folder: Path) -> Path:
    """Two checkpoints, of steps 1 and 2, with weights of that value."""
    place = folder / "saved"
    if not place.exists():
        for step in (1, 2):
            model, optimizer = network(float(step))
            data = DataFingerprint(fingerprint="abc", records=3, tokens=10, blocks=["d"])
            progress = Progress(step=step, tokens=0, seconds=0.0, skipped=0, data=data)
            checkpoint.save(place, model, optimizer=optimizer, progress=progress, keep=2)
    return place


def fuzz_checkpoints(folder: Path, draw: random.Random) -> bool:
    """Checkpoints with files damaged, deleted, exchanged or added: whole or not loaded."""
    place = folder / "checkpoints"
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(_saved(folder), place)
    for _ in range(draw.randint(1, 3)):
        files = sorted(path for path in place.rglob("*") if path.is_file())
        file, kind = draw.choice(files), draw.randrange(6)
        if kind < 3:
            file.write_bytes(damaged(draw, file.read_bytes()))
        elif kind == 3:
            file.unlink()
        elif kind == 4:
            file.write_bytes(draw.choice(files).read_bytes())
        else:
            copy = file.with_name(draw.choice(["x.safetensors", "copy.txt", ".x"]))
            copy.write_bytes(file.read_bytes())
        if not any(path.is_file() for path in place.rglob("*")):
            break
    model, optimizer = network(-1.0)

    def load() -> None:
        newest = checkpoint.newest_intact(place)
        if newest is None:
            return
        progress = checkpoint.load(newest, model, optimizer=optimizer)
        values = {x for weight in model.parameters() for x in weight.detach().flatten().tolist()}
        assert values == {float(progress.step)}, f"step {progress.step} with the weights {values}"

    return taken(load)


def fuzz_logs(folder: Path, draw: random.Random) -> bool:
    """A damaged log, cut back to the steps of a checkpoint: whole lines stay, and nothing else."""
    file = folder / "log.jsonl"
    lines = [json.dumps({"step": step, "loss": 1 / step, "why": "²"}) for step in range(1, 9)]
    content = "".join(line + "\n" for line in lines).encode()
    file.write_bytes(damaged(draw, content))
    done = draw.randint(0, 9)

    def cut() -> None:
        keep_steps(file, done)
        kept = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        assert all(type(line["step"]) is int and line["step"] <= done for line in kept)

    return taken(cut)


def fuzz_caches(folder: Path, draw: random.Random) -> bool:
    """Damaged files of tokens and of costs: as they were written, or as if they were not there."""
    file = folder / "cache"
    with suppress(FileNotFoundError):
        file.unlink()
    if draw.random() < 0.5:
        costs = Costs(0.5, 0.25, 1e6, 10.0)
        file.write_bytes(damaged(draw, json.dumps(asdict(costs)).encode()))
        found = cached_costs(file, lambda: costs)
        assert found is not None
        return found == costs
    row = Example.without_targets(torch.arange(5), weight=1.0, row=0)
    examples = Examples.from_examples([row])
    write_cache(file, examples)
    file.write_bytes(damaged(draw, file.read_bytes()))
    read = read_cache(file)
    assert read is None or read.fingerprint() == examples.fingerprint()
    return read is not None


KINDS: dict[str, Callable[[Path, random.Random], bool]] = {
    "settings": fuzz_settings,
    "YAML": fuzz_yaml,
    "rows": fuzz_rows,
    "files": fuzz_files,
    "images": fuzz_images,
    "latents": fuzz_latents,
    "checkpoints": fuzz_checkpoints,
    "logs": fuzz_logs,
    "caches": fuzz_caches,
}
"""Every kind of input."""


def taken(work: Callable[[], Any]) -> bool:
    """Whether an input was taken; False if an error of samestep's own refused it."""
    try:
        work()
    except REFUSED as error:
        assert str(error).strip(), "an error without a message"
        return False
    return True
