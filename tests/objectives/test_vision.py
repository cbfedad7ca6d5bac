"""Images in conversations: the same step under every split, and the value of a row by itself."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import gradients
from PIL import Image
from torch import Tensor
from torch.nn.functional import cross_entropy
from vision import (
    FAMILIES,
    FULL,
    WRAPPED,
    build_processor,
    build_vision,
    draw_text,
    write_illustrated_rows,
)

import samestep
from samestep.data.load import load_rows
from samestep.data.readers.vision import collate_image_records, image_records
from samestep.data.records import Records
from samestep.engine.counts import count_units
from samestep.engine.terms import Term
from samestep.errors import DataError

NUMBER = 7
SPLITS: list[tuple[int, Any]] = [(NUMBER, "right"), (1, "right"), (3, "left"), (2, "right")]
BOUND = {"ernie4_5_vl_moe": 1e-6, FULL: 1e-6, WRAPPED: 1e-6, "minicpmv4_6": 5e-4}
"""Whatever the weights are, the routers of ERNIE and Kimi, MiniCPM's norms and its linear attention
are in float32; and the latter's decay has a gradient of differences that nearly cancel."""


def read(folder: Path, family: str, **options: Any) -> Records:
    rows = load_rows(str(write_illustrated_rows(folder, NUMBER, plain=4)))
    return image_records(rows, build_processor(family), folder=folder, **options)


def cut(
    records: Records, size: int, padding: Any, dtype: torch.dtype = torch.float64
) -> list[dict[str, Any]]:
    order = list(range(len(records)))
    parts = [order[start : start + size] for start in range(0, len(order), size)]
    return [
        collate_image_records(records, part, padding=padding, pad_id=1, dtype=dtype)
        for part in parts
    ]


def plain_nll(folder: Path, processor: Any, model: Any) -> Tensor:
    """The loss from transformers' own chat inputs, row by row, from whole logits."""
    total, targets = torch.zeros((), dtype=model.dtype), 0
    for line in (folder / "rows-0.jsonl").read_text(encoding="utf-8").splitlines():
        question, answer = json.loads(line)["messages"]
        images = [Image.open(folder / p["image"]) for p in question["content"] if "image" in p]
        question["content"] = [
            {"type": "image"} if p["type"] == "image" else p for p in question["content"]
        ]
        answer["content"] = [{"type": "text", "text": answer["content"]}]
        text = processor.apply_chat_template([question, answer])
        if images:
            inputs = dict(processor(text=[text], images=images, return_tensors="pt"))
            inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
        else:
            inputs = dict(processor.tokenizer([text], return_tensors="pt"))
        ids = inputs["input_ids"]
        tail = processor.tokenizer(answer["content"][0]["text"] + "<|im_end|>")["input_ids"]
        after = processor.tokenizer("\n")["input_ids"]
        end = ids.shape[1] - len(after)
        assert ids[0, end - len(tail) : end].tolist() == tail
        logits = model(**inputs, use_cache=False).logits[0, end - len(tail) - 1 : end - 1]
        total = total + cross_entropy(logits, torch.tensor(tail), reduction="sum")
        targets += len(tail)
    return total / targets


def worst(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """The largest relative difference of a weight that has a gradient.

    That of a key's bias, which a softmax does not feel, is nothing but rounding.
    """
    norms = {name: float(gradient.norm()) for name, gradient in wanted.items()}
    learned = [name for name, norm in norms.items() if norm > 1e-7 * max(norms.values())]
    assert len(learned) > 0.8 * len(norms)
    return max(
        float((found[name].double() - wanted[name].double()).norm()) / norms[name]
        for name in learned
    )


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    known: dict[str, Any] = {}

    def of(family: str) -> Any:
        if family not in known:
            folder = tmp_path_factory.mktemp(family)
            records = read(folder, family)
            model, processor = build_vision(family)
            loss = plain_nll(folder, processor, model)
            loss.backward()
            known[family] = records, loss.item(), gradients(model)
        return known[family]

    return of


@pytest.mark.sampled(3)
@pytest.mark.parametrize("family", [*FAMILIES, FULL, WRAPPED])
def test_every_split_gives_the_rows_own_value(truth: Any, family: str) -> None:
    records, value, wanted = truth(family)
    model, _ = build_vision(family)
    bound = BOUND.get(family, 1e-12)
    for size, padding in SPLITS:
        loss, _ = samestep.backward(model, cut(records, size, padding), samestep.CausalLMLoss())
        assert loss == pytest.approx(value, rel=bound)
        assert worst(gradients(model), wanted) < bound, (size, padding)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("family", FAMILIES)
def test_float32(truth: Any, family: str) -> None:
    """The full gradient within 2e-6, and each weight's by itself within its own rounding."""
    records, _, wanted = truth(family)
    model, _ = build_vision(family, torch.float32)
    everything = torch.cat([gradient.flatten() for gradient in wanted.values()])
    for size, padding in SPLITS:
        micros = cut(records, size, padding, torch.float32)
        samestep.backward(model, micros, samestep.CausalLMLoss())
        found = gradients(model)
        whole = torch.cat([gradient.double().flatten() for gradient in found.values()])
        assert float((whole - everything).norm() / everything.norm()) < 2e-6
        assert worst(found, wanted) < max(5e-6, BOUND.get(family, 0)), (size, padding)


@pytest.mark.parametrize("kind", ["mean of means", "flat positions", "images as targets"])
def test_wrong_steps_are_caught(truth: Any, kind: str) -> None:
    records, _, wanted = truth("qwen3_vl")
    model, processor = build_vision("qwen3_vl")
    micros, loss = cut(records, 3, "right"), samestep.CausalLMLoss()

    def mean(model: Any, micro: Any) -> Term:
        return Term(loss(model, micro)["nll"].total / count_units([micro])["token"], "part")

    if kind == "mean of means":
        samestep.backward(model, micros, mean, counters={"part": lambda _: 1})
    else:
        for micro in micros:
            if kind == "flat positions":
                micro["position_ids"] = torch.arange(micro["labels"].shape[1]).expand_as(
                    micro["labels"]
                )
            else:
                is_image = micro["input_ids"] == processor.image_token_id
                micro["labels"] = micro["input_ids"].where(is_image, micro["labels"])
                del micro["target_positions"]
        samestep.backward(model, micros, loss)
    assert worst(gradients(model), wanted) > 1e-3


@pytest.mark.sampled(3)
@pytest.mark.parametrize("family", FAMILIES)
def test_it_learns_to_read(tmp_path: Path, family: str) -> None:
    """Two pictures with the same question: only who looks at them can answer."""
    rows = []
    for name, shade in (("black", 0), ("white", 255)):
        Image.new("RGB", (32, 32), (shade, 128, 255 - shade)).save(tmp_path / f"{name}.png")
        parts = [{"type": "image", "path": f"{name}.png"}, {"type": "text", "text": "Which?"}]
        answer = {"role": "assistant", "content": name[0]}
        rows.append({"messages": [{"role": "user", "content": parts}, answer]})
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    model, processor = build_vision(family, torch.float32)
    records = image_records(load_rows(str(path)), processor, folder=tmp_path)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    micros = cut(records, 1, "right", torch.float32)
    for _ in range(40):
        report = samestep.step(model, optimizer, micros, samestep.CausalLMLoss(), max_grad_norm=1.0)
        if report.terms["accuracy"] == 1.0:
            break
    assert report.terms["accuracy"] == 1.0


@pytest.mark.parametrize("family", FAMILIES)
def test_targets_are_the_answers_and_never_images(tmp_path: Path, family: str) -> None:
    records, processor = read(tmp_path, family), build_processor(family)
    lines = (tmp_path / "rows-0.jsonl").read_text(encoding="utf-8").splitlines()
    for record, line in zip(records, lines, strict=True):
        example = record.sequences[0]
        answer = json.loads(line)["messages"][1]["content"]
        learned = processor.tokenizer.decode(example.labels[example.labels != -100])
        assert learned == answer + "<|im_end|>"
    everything = read(tmp_path, family, train_on="all")
    for record in everything:
        example = record.sequences[0]
        image = example.input_ids == processor.image_token_id
        assert (example.labels[image] == -100).all()
        assert (example.labels != -100).sum() > len(example.labels) - image.sum() - 40


def test_images_that_do_not_fit_are_dropped_and_counted(tmp_path: Path) -> None:
    records = read(tmp_path, "smolvlm", max_length=30)
    assert records.dropped == {"an image does not fit in max_length 30": 5}
    assert len(records) == 2
    whole, short = read(tmp_path, "got_ocr2"), read(tmp_path, "got_ocr2", max_length=49)
    assert max(short.lengths) == 49 < max(whole.lengths)
    micro = collate_image_records(short, range(len(short)), padding="right", pad_id=1)
    assert micro["input_ids"].shape[1] == 49
    with pytest.raises(DataError, match="no row has a target to learn"):
        read(tmp_path, "got_ocr2", max_length=3)


def spoil(folder: Path, kind: str) -> str:
    """Break the second row; returns what the error must say."""
    path = folder / "rows-0.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines()
    row = json.loads(lines[1])
    part = row["messages"][0]["content"][0]
    file = folder / part["image"]
    message = f"rows-0.jsonl:2: image {file}"
    if kind == "missing":
        file.unlink()
        message += ": no such file"
    elif kind == "no image":
        file.write_text("hello", encoding="utf-8")
        message += ": none of the formats that are read"
    elif kind == "cut short":
        file.write_bytes(file.read_bytes()[:60])
        message += ": cannot be read"
    elif kind == "remote":
        part["image"] = "https://somewhere/x.png"
        message = "rows-0.jsonl:2: image https://somewhere/x.png: images come from files"
    elif kind == "unnamed":
        del part["image"]
        message = "rows-0.jsonl:2: an image part names no file"
    elif kind == "token in the text":
        row["messages"][0]["content"][1]["text"] = "<imgpad>"
        message = "rows-0.jsonl:2: its text has 2 image tokens '<imgpad>' for 1 images"
    else:
        row["images"] = [part["image"]]
        message = "rows-0.jsonl:2: images names 1 files more than there are image parts"
    lines[1] = json.dumps(row)
    path.write_text("\n".join(lines), encoding="utf-8")
    return message


@pytest.mark.parametrize(
    "kind",
    ["missing", "no image", "cut short", "remote", "unnamed", "token in the text", "too many"],
)
def test_images_that_cannot_be_used_name_the_row(tmp_path: Path, kind: str) -> None:
    path = write_illustrated_rows(tmp_path, 3)
    message = spoil(tmp_path, kind)
    with pytest.raises(DataError) as error:
        image_records(load_rows(str(path)), build_processor("got_ocr2"), folder=tmp_path)
    assert message in str(error.value)


def test_images_may_be_listed_beside_the_messages(tmp_path: Path) -> None:
    draw_text("1", (16, 16)).save(tmp_path / "a.png")
    draw_text("2", (16, 16)).save(tmp_path / "b.png")
    parts = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Which?"}]
    answer = {"role": "assistant", "content": "2"}
    row = {"messages": [{"role": "user", "content": parts}, answer], "images": ["a.png", "b.png"]}
    records = image_records(load_rows([row]), build_processor("qwen3_vl"), folder=tmp_path)
    files = records.meta["gallery"].rows[0].files
    assert [file.name for file in files] == ["a.png", "b.png"]
    micro = collate_image_records(records, [0], padding="right", pad_id=1)
    assert len(micro["image_grid_thw"]) == 2


def test_the_fingerprint_knows_the_pixels(tmp_path: Path) -> None:
    first = read(tmp_path, "got_ocr2")
    assert read(tmp_path, "got_ocr2").fingerprint() == first.fingerprint()
    draw_text("9", (24, 16)).save(tmp_path / "0-1.png")
    rows = load_rows(str(tmp_path / "rows-0.jsonl"))
    again = image_records(rows, build_processor("got_ocr2"), folder=tmp_path)
    assert again.fingerprint() != first.fingerprint()
