from pathlib import Path

import torch
from cases import ragged
from runs import write_rows
from tiny import tiny_tokenizer

from samestep.data.load import load_rows
from samestep.data.tokenize import tokenize_rows
from samestep.study.rows import cut_completions, describe_lengths, read_examples, write_examples

EXAMPLES = ragged(200, weighted=True)


def targets(example: object) -> int:
    return int((example.labels[1:] != -100).sum())  # type: ignore[attr-defined]


def test_cut_examples_keep_their_first_targets_and_end_there() -> None:
    for whole, short in zip(EXAMPLES, cut_completions(EXAMPLES, 1.0, keep=4), strict=True):
        assert targets(short) == min(4, targets(whole))
        length = len(short.labels)
        assert torch.equal(short.labels, whole.labels[:length])
        assert torch.equal(short.input_ids, whole.input_ids[:length])
        assert (short.weight, short.row) == (whole.weight, whole.row)
        if targets(whole) > 4:
            assert short.labels[-1] != -100


def test_a_larger_share_cuts_the_same_examples_and_more() -> None:
    changed = []
    for share in (0.0, 0.3, 0.7, 1.0):
        short = cut_completions(EXAMPLES, share, keep=1)
        changed.append(
            {at for at, one in enumerate(short) if len(one.labels) < len(EXAMPLES[at].labels)}
        )
    assert not changed[0]
    assert changed[0] < changed[1] < changed[2] < changed[3]
    assert 0.2 < len(changed[1]) / len(changed[3]) < 0.4


def test_written_examples_are_read_back_as_they_were(tmp_path: Path) -> None:
    learned = [example for example in EXAMPLES[:20] if targets(example)]
    write_examples(tmp_path / "rows.jsonl", learned)
    back = tokenize_rows(load_rows(tmp_path / "rows.jsonl"), tiny_tokenizer())
    assert len(back) == len(learned)
    for one, other in zip(back, learned, strict=True):
        assert torch.equal(one.input_ids, other.input_ids)
        assert torch.equal(one.labels, other.labels)
        assert one.weight == other.weight


def test_rows_can_be_limited(tmp_path: Path) -> None:
    file = str(write_rows(tmp_path / "rows.jsonl", 9))
    examples = read_examples(file, tiny_tokenizer(), rows=5, max_length=30)
    assert 1 <= len(examples) <= 5
    assert max(examples.lengths) == 30


def test_the_spread_is_the_standard_deviation_over_the_mean() -> None:
    found = describe_lengths(EXAMPLES, cut=0.25)
    numbers = torch.tensor([float(targets(example)) for example in EXAMPLES])
    assert found.targets == int(numbers.sum())
    assert abs(found.spread - float(numbers.std(correction=0) / numbers.mean())) < 1e-6
    assert (found.cut, found.rows) == (0.25, 200)
