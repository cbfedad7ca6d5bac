import pytest
import torch
from tiny import tiny_tokenizer

from samestep.data.describe import with_report
from samestep.data.records import Records
from samestep.data.rows import Row
from samestep.data.splitting import split_texts
from samestep.data.tokenize import tokenize_rows
from samestep.errors import ConfigError, DataError
from samestep.train.settings.base import finalize
from samestep.train.settings.language import CausalLMSettings, VisionLanguageSettings

TEXTS = ["James has 475 euros. " * 3, "a", "", "Stop.", "She hid 90 treats; her friends found 40."]


def rows() -> list[Row]:
    return [
        Row({"text": text, "weight": 1 + at}, f"t.jsonl:{at + 1}") for at, text in enumerate(TEXTS)
    ]


@pytest.mark.parametrize("length", [2, 3, 7, 8, 1000])
def test_every_token_but_the_first_of_a_text_is_a_target_once(length: int) -> None:
    tokenizer = tiny_tokenizer()
    whole = tokenize_rows(rows(), tokenizer)
    pieces = split_texts(rows(), tokenizer, max_length=length, append_eos=True)
    split = tokenize_rows(pieces, tokenizer, max_length=length)
    assert not split.cut
    assert max(split.lengths) <= length
    targets: dict[str, list[int]] = {}
    weights: dict[str, set[float]] = {}
    for example in split:
        origin = pieces[example.row].origin.partition(" part")[0]
        learned = example.labels[1:][example.labels[1:] != -100]
        targets.setdefault(origin, []).extend(learned.tolist())
        weights.setdefault(origin, set()).add(example.weight)
    expected = {f"t.jsonl:{each.row + 1}": each.input_ids[1:].tolist() for each in whole}
    assert targets == expected
    assert weights == {f"t.jsonl:{each.row + 1}": {each.weight} for each in whole}
    # Cutting without the token before would leave targets out.
    plain = sum(len(part) - 1 for each in whole for part in each.input_ids.split(length))
    assert sum(map(len, targets.values())) > plain or max(whole.lengths) <= length
    assert sum(split.dropped.values()) == sum(whole.dropped.values()) > 0


def test_a_report_names_pieces(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="samestep")
    tokenizer = tiny_tokenizer()
    pieces = split_texts(rows(), tokenizer, max_length=8, append_eos=True)
    assert pieces[0].origin.startswith("t.jsonl:1 part 1 of ")
    assert "2 texts of more than 8 tokens are learned in pieces" in caplog.text
    records = with_report(
        Records(tokenize_rows(pieces, tokenizer)), pieces, tokenizer, format="token ids"
    )
    assert records.report is not None
    assert "text in pieces of at most 8 tokens, read as token ids" in records.report.format


def test_long_rows_are_dropped_by_name() -> None:
    tokenizer = tiny_tokenizer()
    kept = tokenize_rows(rows(), tokenizer, max_length=8, drop_long=True)
    assert kept.dropped["longer than 8 tokens"] == 2
    assert kept.dropped.rows["longer than 8 tokens"] == [0, 4]
    cut = tokenize_rows(rows(), tokenizer, max_length=8)
    short = [each for each in cut if each.row not in (0, 4)]
    assert all(
        torch.equal(one.input_ids, other.input_ids) for one, other in zip(kept, short, strict=True)
    )


def test_rows_that_are_no_texts_are_refused_by_name() -> None:
    others = [*rows(), Row({"prompt": "a", "completion": "b"}, "u.jsonl:1")]
    with pytest.raises(DataError, match=r"u.jsonl:1: it has prompt, completion(.|\n)*cut or drop"):
        split_texts(others, tiny_tokenizer(), max_length=8, append_eos=True)


def test_what_long_text_needs() -> None:
    places = {"model": "m", "data": "d", "out": "o"}
    with pytest.raises(ConfigError, match="long_text: split needs max_length"):
        finalize(CausalLMSettings(**places, long_text="split"))
    with pytest.raises(ConfigError, match="rows with images are cut"):
        finalize(VisionLanguageSettings(**places, long_text="drop", max_length=9))
