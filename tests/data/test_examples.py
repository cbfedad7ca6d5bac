import pytest
import torch

from samestep.data.examples import Example, Examples
from samestep.engine.targets import IGNORE, shifted_targets
from samestep.errors import DataError


def make(ids, mask, **keywords) -> Example:
    ids = torch.tensor(ids, dtype=torch.int64)
    labels = ids.where(torch.tensor(mask, dtype=torch.bool), IGNORE)
    return Example(input_ids=ids, labels=labels, **keywords)


@pytest.fixture
def examples() -> Examples:
    return Examples.from_examples(
        [
            make([5, 6, 7], [1, 0, 1], weight=0.25, row=3),
            make([8], [1], row=4),
            make([], [], row=5),
            make([9, 10], [0, 1], row=9),
        ],
        {"no target": 2},
    )


def test_reads_back_what_was_stored(examples):
    assert len(examples) == 4
    first = examples[0]
    assert first.input_ids.tolist() == [5, 6, 7]
    assert first.labels.tolist() == [5, IGNORE, 7]
    assert first.input_ids.dtype == first.labels.dtype == torch.int64
    assert (first.weight, first.row) == (0.25, 3)
    assert examples[-1].row == 9
    assert [one.row for one in examples] == [3, 4, 5, 9]
    assert [one.row for one in examples[1:3]] == [4, 5]
    with pytest.raises(IndexError):
        examples[4]


def test_targets_are_counted_after_the_shift(examples):
    assert examples.lengths == [3, 1, 0, 2]
    assert examples.targets == [1, 0, 0, 1]
    for one, count in zip(examples, examples.targets, strict=True):
        if len(one.labels):
            targets = shifted_targets({"labels": one.labels[None]})
            assert int((targets != IGNORE).sum()) == count


def test_highest_id(examples):
    assert examples.highest_id() == 10
    assert Examples.from_examples([]).highest_id() == -1


def test_shifted_labels_are_refused():
    ids = torch.tensor([1, 2, 3])
    with pytest.raises(DataError, match="row 7: labels must be the tokens themselves"):
        Examples.from_examples([Example(ids, torch.tensor([2, 3, IGNORE]), row=7)])


def test_save_and_load(examples, tmp_path):
    path = tmp_path / "some.safetensors"
    examples.save(path)
    again = Examples.load(path)
    assert again.dropped == {"no target": 2}
    assert again.fingerprint() == examples.fingerprint()
    assert again[0].labels.tolist() == examples[0].labels.tolist()
    assert [entry.name for entry in tmp_path.iterdir()] == ["some.safetensors"]
    empty = Examples.from_examples([], {"no target": 1})
    empty.save(path)
    assert len(Examples.load(path)) == 0


def test_weights_of_tokens_are_kept(tmp_path):
    weighed = make([5, 6], [0, 1], token_weights=torch.tensor([0.0, 0.5]))
    stored = Examples.from_examples([make([7], [1]), weighed])
    stored.save(tmp_path / "some.safetensors")
    again = Examples.load(tmp_path / "some.safetensors")
    assert [one.token_weights.tolist() for one in again] == [[1.0], [0.0, 0.5]]
    assert again.fingerprint() == stored.fingerprint()
    plain = Examples.from_examples([make([7], [1]), make([5, 6], [0, 1])])
    assert plain.fingerprint() != stored.fingerprint()


def test_fingerprint_sees_every_part(examples):
    base = [make([5, 6, 7], [1, 0, 1])]
    others = [
        [make([5, 6, 8], [1, 0, 1])],
        [make([5, 6, 7], [1, 1, 1])],
        [make([5, 6, 7], [1, 0, 1], weight=2.0)],
        [make([5, 6, 7], [1, 0, 1], row=1)],
        [make([5, 6], [1, 0]), make([7], [1], row=0)],
    ]
    prints = [Examples.from_examples(one).fingerprint() for one in [base, *others]]
    assert len(set(prints)) == len(prints)
    assert Examples.from_examples(base, {"no target": 1}).fingerprint() == prints[0]


def test_damage_is_found(examples, tmp_path):
    path = tmp_path / "some.safetensors"
    examples.save(path)
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(DataError, match="cannot be read"):
        Examples.load(path)
    # In the bytes of the tensors, which come last: only the checksum can tell.
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(DataError, match="damaged"):
        Examples.load(path)
    with pytest.raises(DataError, match="cannot be read"):
        Examples.load(tmp_path / "missing.safetensors")


def test_another_safetensors_file_is_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"ids": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(DataError, match="not a file of examples"):
        Examples.load(tmp_path / "other.safetensors")


def test_a_failed_save_leaves_the_old_file(examples, tmp_path, monkeypatch):
    path = tmp_path / "some.safetensors"
    examples.save(path)

    def fail(path):
        raise OSError("disk full")

    monkeypatch.setattr("samestep.data.examples.sync", fail)
    with pytest.raises(OSError, match="disk full"):
        Examples.from_examples([]).save(path)
    assert len(Examples.load(path)) == 4
    assert [entry.name for entry in tmp_path.iterdir()] == ["some.safetensors"]
