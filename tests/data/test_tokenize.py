import json
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import CHAT, CHAT_WITH_TAGS, build_tokenizer, tiny_tokenizer
from tokenizers import processors

from samestep.data.examples import Examples
from samestep.data.load import load_rows
from samestep.data.rows import Row
from samestep.data.tokenize import tokenize_rows
from samestep.engine.targets import IGNORE
from samestep.errors import ConfigError, DataError

TALK = [
    {"role": "system", "content": "Answer the question."},
    {"role": "user", "content": "How many forks?"},
    {"role": "assistant", "content": "16 + 3 = 19 "},
    {"role": "user", "content": "And treats?"},
    {"role": "assistant", "content": "  90,\nof course 🙂"},
]
TURNS = ["16 + 3 = 19 <|im_end|>", "  90,\nof course 🙂<|im_end|>"]


class SlowTokenizer:
    """Characters, but "ab" is one token: no offsets, no batch in parallel."""

    is_fast = False
    eos_token = "$"
    eos_token_id = 1
    chat_template = None

    def __init__(self, add_eos: bool = False) -> None:
        self.add_eos = add_eos

    def __call__(self, texts, *, add_special_tokens, return_offsets_mapping, **keywords):
        assert not return_offsets_mapping
        assert keywords["truncation"] is False
        assert keywords["padding"] is False
        return {"input_ids": [self.ids(text, add_special_tokens) for text in texts]}

    def ids(self, text, special):
        ids = [ord(char) for char in text.replace("ab", "\x02")]
        return [0, *ids, 1] if special and self.add_eos else ids


def rows(*values) -> list[Row]:
    return load_rows(list(values))


def target_runs(example, tokenizer) -> list[str]:
    """The text of each run of targets."""
    runs: list[list[int]] = [[]]
    for token in example.labels.tolist():
        if token != IGNORE:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    return [tokenizer.decode(run) for run in runs if run]


def error_of(values, tokenizer=None, **keywords) -> str:
    with pytest.raises(DataError) as caught:
        tokenize_rows(rows(*values), tokenizer or tiny_tokenizer(), **keywords)
    return str(caught.value)


# Text, and prompt with completion


def test_text_is_all_target_and_closed():
    tokenizer = tiny_tokenizer()
    (example,) = tokenize_rows(rows({"text": "The total, é🙂", "other": 1}), tokenizer)
    assert torch.equal(example.labels, example.input_ids)
    assert tokenizer.decode(example.input_ids) == "The total, é🙂<|im_end|>"


def test_eos_is_not_appended_twice_nor_when_unwanted():
    tokenizer = tiny_tokenizer()
    values = rows({"text": "The forks<|im_end|>"}, {"text": "The forks"})
    plain, closed = tokenize_rows(values, tokenizer)
    assert plain.input_ids.tolist() == closed.input_ids.tolist()
    open_ = tokenize_rows(values, tokenizer, append_eos=False)[1]
    assert open_.input_ids.tolist() == closed.input_ids.tolist()[:-1]


def test_only_the_completion_is_target():
    tokenizer = tiny_tokenizer()
    example = tokenize_rows(rows({"prompt": "How many?\n", "completion": "16 🙂"}), tokenizer)[0]
    assert target_runs(example, tokenizer) == ["16 🙂<|im_end|>"]
    assert tokenizer.decode(example.input_ids) == "How many?\n16 🙂<|im_end|>"
    whole = tokenize_rows(
        rows({"prompt": "How many? ", "completion": "16"}), tokenizer, train_on="all"
    )[0]
    assert torch.equal(whole.labels, whole.input_ids)


def test_a_token_across_the_border_is_a_target():
    tokenizer = tiny_tokenizer()
    joint = tokenizer("number treats").input_ids
    alone = tokenizer("number tre").input_ids
    assert alone != joint[: len(alone)]
    example = tokenize_rows(
        rows({"prompt": "number tre", "completion": "ats"}), tokenizer, append_eos=False
    )[0]
    assert example.input_ids.tolist() == joint
    # One token holds characters of both sides.
    assert target_runs(example, tokenizer) == [" treats"]


def test_trailing_space_of_the_prompt_merges_with_the_completion():
    tokenizer = tiny_tokenizer()
    example = tokenize_rows(rows({"prompt": "The ", "completion": "treats"}), tokenizer)[0]
    assert target_runs(example, tokenizer) == [" treats<|im_end|>"]


def test_pad_equal_to_eos_changes_nothing():
    values = rows(
        {"prompt": "Yes<|im_end|>", "completion": "<|im_end|>of course"},
        {"prompt": "a", "completion": ""},
    )
    one = tokenize_rows(values, build_tokenizer())
    other = tokenize_rows(values, build_tokenizer(pad="<|im_end|>"))
    assert one.fingerprint() == other.fingerprint()
    assert target_runs(other[0], tiny_tokenizer()) == ["<|im_end|>of course<|im_end|>"]
    assert target_runs(other[1], tiny_tokenizer()) == ["<|im_end|>"]


TEXT = st.text(alphabet="at the\n\t  é🙂1", max_size=12)


@pytest.mark.parametrize("trim", [None, False, True])
@given(prompt=TEXT, completion=TEXT)
@settings(max_examples=150, deadline=None)
def test_targets_begin_at_the_token_with_the_first_byte_of_the_completion(trim, prompt, completion):
    tokenizer = trimming_tokenizer(trim)
    values = {"prompt": prompt, "completion": completion, "weight": 1}
    padding = {"text": None, "prompt": "a", "completion": "forks"}  # so that some row has a target
    examples = tokenize_rows(rows(padding, values), tokenizer)
    if len(examples) == 1:
        assert examples.dropped == {"no target": 1}
        assert prompt == ""
        return
    example = examples[1]
    # A byte-level token has as many characters as it stands for bytes.
    *tokens, eos = tokenizer.convert_ids_to_tokens(example.input_ids.tolist())
    ends = np.cumsum([len(token) for token in tokens], dtype=np.int64)
    expected = [*(ends > len(prompt.encode())), True]
    assert eos == "<|im_end|>"
    # The first is never predicted; and trimmed offsets lose it if it is a space.
    assert (example.labels != IGNORE).tolist()[1:] == expected[1:]


@cache
def trimming_tokenizer(trim):
    tokenizer = build_tokenizer()
    if trim is not None:
        processor = processors.ByteLevel(trim_offsets=trim)
        tokenizer.backend_tokenizer.post_processor = processor
    return tokenizer


@pytest.mark.parametrize("completion", ["16", ""])
def test_tokens_that_the_tokenizer_adds(completion):
    values = rows({"prompt": "How many?", "completion": completion})
    bos = tokenize_rows(values, build_tokenizer(add="bos"))[0]
    both = tokenize_rows(values, build_tokenizer(add="bos eos"))[0]
    unasked = tokenize_rows(values, build_tokenizer(add="bos eos"), append_eos=False)[0]
    for example in (bos, both, unasked):
        assert example.input_ids.tolist()[0] == 0
        assert example.labels[0] == IGNORE
        assert example.input_ids.tolist().count(3) == 1
        assert target_runs(example, tiny_tokenizer()) == [f"{completion}<|im_end|>"]


def test_state_left_in_the_tokenizer_is_not_used():
    tokenizer = build_tokenizer()
    values = rows({"text": "The total number of forks"}, {"text": "Yes"})
    expected = tokenize_rows(values, build_tokenizer())
    tokenizer.backend_tokenizer.enable_truncation(2)
    tokenizer.backend_tokenizer.enable_padding(length=50)
    tokenizer.model_max_length = 3
    assert tokenize_rows(values, tokenizer).fingerprint() == expected.fingerprint()


def test_many_batches_equal_one_by_one(monkeypatch):
    values = rows(*({"prompt": f"{n} forks ", "completion": "Yes" * n} for n in range(7)))
    whole = tokenize_rows(values, tiny_tokenizer())
    monkeypatch.setattr("samestep.data.tokenize._BATCH", 2)
    assert tokenize_rows(values, tiny_tokenizer()).fingerprint() == whole.fingerprint()
    assert whole.rows.tolist() == list(range(7))


# A tokenizer without offsets


def test_slow_tokenizer_by_prefix():
    values = rows({"prompt": "xa", "completion": "cb"}, {"prompt": "", "completion": "xy"})
    first, second = tokenize_rows(values, SlowTokenizer())
    assert first.labels.tolist() == [IGNORE, IGNORE, ord("c"), ord("b"), 1]
    assert second.labels.tolist() == [ord("x"), ord("y"), 1]
    added = tokenize_rows(values, SlowTokenizer(add_eos=True))[0]
    assert added.labels.tolist() == [IGNORE, IGNORE, IGNORE, ord("c"), ord("b"), 1]


@pytest.mark.parametrize("add_eos", [False, True])
def test_slow_tokenizer_refuses_a_merge_across_the_border(add_eos):
    values = [{"prompt": "x", "completion": "y"}, {"prompt": "xa", "completion": "b"}]
    message = error_of(values, SlowTokenizer(add_eos))
    assert message.startswith("row 2: the tokens of its first 2 characters change")


# Truncation


def test_truncation_at_the_edge():
    tokenizer = tiny_tokenizer()
    value = {"prompt": "forks forks", "completion": " treats"}
    prompt = len(tokenizer("forks forks").input_ids)
    kept = tokenize_rows(rows(value), tokenizer, max_length=prompt + 1)
    assert kept.lengths == [prompt + 1]
    assert kept.targets == [1]
    both = rows(value, {"prompt": "", "completion": "treats treats"})
    cut = tokenize_rows(both, tokenizer, max_length=prompt)
    assert cut.dropped == {f"no target left after truncation to max_length {prompt}": 1}
    assert cut.rows.tolist() == [1]


def test_no_target_at_all():
    values = [{"text": "a"}, {"text": ""}, {"prompt": None, "text": ""}]
    message = error_of(values, append_eos=False)
    assert message == "no row has a target to learn (3 rows: no target)"
    value = {"prompt": "forks forks", "completion": "a"}
    message = error_of([value, {"prompt": "forks", "completion": ""}], max_length=2)
    assert "1 rows: no target left after truncation to max_length 2" not in message
    assert "2 rows: no target left after truncation to max_length 2" in message


def test_max_length_too_small():
    with pytest.raises(ConfigError, match="max_length=1"):
        tokenize_rows(rows({"text": "a"}), tiny_tokenizer(), max_length=1)


# Ids


def test_given_ids():
    ids = [5, 6, 7]
    examples = tokenize_rows(
        rows(
            {"input_ids": ids, "text": "ignored"},
            {"input_ids": ids, "labels": [IGNORE, 6, IGNORE]},
            {"input_ids": np.array(ids), "labels": torch.tensor([5, IGNORE, IGNORE])},
        ),
        tiny_tokenizer(),
    )
    assert [one.labels.tolist() for one in examples] == [ids, [IGNORE, 6, IGNORE]]
    assert examples.dropped == {"no target": 1}
    everything = tokenize_rows(
        rows({"input_ids": ids, "labels": [IGNORE] * 3}), tiny_tokenizer(), train_on="all"
    )
    assert everything[0].labels.tolist() == ids


@pytest.mark.parametrize(
    ("value", "part"),
    [
        ({"input_ids": [1, 2], "labels": [2, IGNORE]}, "labels[0] is 2 but input_ids[0] is 1"),
        ({"input_ids": [1, 2], "labels": [1]}, "2 input_ids but 1 labels"),
        ({"input_ids": [1, -2]}, "input_ids[1] is -2"),
        ({"input_ids": [1, 2**31]}, f"input_ids[1] is {2**31}"),
        ({"input_ids": np.array([1, 2], dtype=np.uint64)}, "no token ids"),
        ({"input_ids": [1, 2**70]}, "must be a list of integers"),
        ({"input_ids": [1.0]}, "must be a list of integers"),
        ({"input_ids": [[1], [1, 2]]}, "must be a list of integers"),
        ({"input_ids": "abc"}, "must be a list of integers"),
    ],
)
def test_wrong_ids(value, part):
    message = error_of([{"input_ids": [1, 2]}, value])
    assert message.startswith("row 2: ")
    assert part in message


def test_given_weights_of_tokens():
    ids = [5, 6, 7, 8]
    values = rows({"input_ids": ids, "token_weights": [1, 0, 0.5, 2]}, {"input_ids": ids})
    examples = tokenize_rows(values, tiny_tokenizer(), max_length=3, weigh_tokens=True)
    first, second = examples
    assert first.labels.tolist() == [5, IGNORE, 7]  # a weight of 0 is no target
    assert first.token_weights.tolist() == [1.0, 0.0, 0.5]
    assert second.token_weights.tolist() == [1.0, 1.0, 1.0]
    assert error_of([{"input_ids": ids, "token_weights": [1, 0, 1, 1]}]).startswith(
        "row 1: it has weights of tokens or messages, which this objective does not honour"
    )


@pytest.mark.parametrize("weights", [[1, 1], [1, -1, 1], [1, float("nan"), 1], "abc", 1])
def test_wrong_weights_of_tokens(weights):
    assert "token_weights" in error_of([{"input_ids": [5, 6, 7], "token_weights": weights}])


# Conversations


@pytest.mark.parametrize("tags", [False, True])
def test_weights_of_messages(tags):
    tokenizer = tiny_tokenizer(chat=True, generation_tags=tags)
    talk = [dict(message) for message in TALK]
    talk[2]["weight"] = 0
    talk[4]["weight"] = 0.25
    plain, weighed = tokenize_rows(
        rows({"messages": TALK}, {"messages": talk}), tokenizer, weigh_tokens=True
    )
    assert torch.equal(plain.input_ids, weighed.input_ids)
    assert target_runs(weighed, tokenizer) == TURNS[1:]
    of_targets = weighed.token_weights[weighed.labels != IGNORE]
    assert set(of_targets.tolist()) == {0.25}
    assert "train_on: all" in error_of([{"messages": talk}], tokenizer, train_on="all")


@pytest.mark.parametrize("weight", [-1, "much", True, float("inf")])
def test_wrong_weights_of_messages(weight):
    talk = [TALK[1], {**TALK[2], "weight": weight}]
    assert "the weight of a message must be" in error_of(
        [{"messages": talk}], tiny_tokenizer(chat=True)
    )


@pytest.mark.parametrize("tags", [False, True])
def test_turns_of_the_assistant_are_targets(tags):
    tokenizer = tiny_tokenizer(chat=True, generation_tags=tags)
    tools = [{"name": "count", "b": 1, "a": 2}]
    values = rows({"messages": TALK}, {"messages": TALK, "tools": tools})
    plain, with_tools = tokenize_rows(values, tokenizer)
    assert target_runs(plain, tokenizer) == TURNS
    assert target_runs(with_tools, tokenizer) == TURNS
    whole = tokenizer.apply_chat_template(TALK, tokenize=False)
    assert tokenizer.decode(plain.input_ids) == whole
    assert "<|im_start|>tools\n" in tokenizer.decode(with_tools.input_ids)


CONVERSATIONS = [
    {"messages": TALK},
    {"messages": TALK, "tools": [{"name": "count"}]},
    {"messages": TALK[1:], "tools": json.dumps([{"name": "count"}])},
    {"messages": TALK[:2]},
    {"messages": [TALK[2], TALK[1], TALK[4]]},
    {"messages": [TALK[1], TALK[2], TALK[4]]},
    {"messages": [*TALK[:2], {"role": "assistant", "content": "", "tool_calls": None}]},
]


def test_masks_with_and_without_tags_are_the_same():
    one, other = (
        tokenize_rows(rows(*CONVERSATIONS), tiny_tokenizer(chat=True, generation_tags=tags))
        for tags in (False, True)
    )
    assert one.fingerprint() == other.fingerprint()
    assert one.dropped == other.dropped == {"no target": 1}
    # A conversation may open with the assistant, and have two of its turns in a row.
    assert target_runs(one[3], tiny_tokenizer()) == TURNS
    assert target_runs(one[4], tiny_tokenizer()) == TURNS


@pytest.mark.parametrize("tags", [False, True])
def test_prompt_and_completion_as_messages(tags):
    tokenizer = tiny_tokenizer(chat=True, generation_tags=tags)
    values = rows(
        {"prompt": TALK[:2], "completion": TALK[2:]}, {"prompt": TALK[:4], "completion": TALK[4:]}
    )
    both, last = tokenize_rows(values, tokenizer)
    assert target_runs(both, tokenizer) == TURNS
    assert target_runs(last, tokenizer) == TURNS[1:]
    assert both.input_ids.tolist() == last.input_ids.tolist()
    everything = tokenize_rows(values, tokenizer, train_on="all")[1]
    assert torch.equal(everything.labels, everything.input_ids)


def test_keys_that_are_none_do_not_reach_the_template():
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.keys() | list }}{% endfor %}"
    value = {"messages": [{"role": "user", "content": "a", "tool_calls": None}]}
    example = tokenize_rows(rows(value), tokenizer, train_on="all")[0]
    assert tokenizer.decode(example.input_ids) == "['role', 'content']"


REWRITING = (
    "{% for m in messages %}[{{ m['role'] }}]"
    "{% if m['role'] != 'assistant' or loop.last %}{{ m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def test_template_that_rewrites_earlier_turns_is_refused():
    tokenizer = build_tokenizer()
    tokenizer.chat_template = REWRITING
    assert target_runs(tokenize_rows(rows({"messages": TALK[:3]}), tokenizer)[0], tokenizer) == [
        TALK[2]["content"]
    ]
    message = error_of([{"messages": TALK[:3]}, {"messages": TALK}], tokenizer)
    assert message.startswith("row 2: the chat template renders the conversation up to message 2")
    assert "{% generation %}" in message


@pytest.mark.parametrize("tags", [False, True])
def test_template_that_raises_names_the_rows(tags):
    tokenizer = build_tokenizer()
    raising = "{% if messages | length > 4 %}{{ raise_exception('too long') }}{% endif %}"
    tokenizer.chat_template = raising + (CHAT_WITH_TAGS if tags else CHAT)
    values = [{"messages": TALK[:3]}, {"messages": TALK}, {"messages": []}]
    lines = error_of(values, tokenizer).split("\n")
    assert lines == [
        "row 2: the chat template cannot take this conversation: too long",
        "row 3: messages must be a list of messages, at least one",
    ]


def test_tokenizer_without_a_template():
    with pytest.raises(ConfigError, match="no chat template"):
        tokenize_rows(rows({"messages": TALK}), tiny_tokenizer())


# Columns and weights


def test_weight():
    values = rows({"text": "Yes", "weight": 2}, {"text": "Yes"}, {"text": "Yes", "weight": "0.5"})
    examples = tokenize_rows(values, tiny_tokenizer())
    assert examples.weights.tolist() == [2.0, 1.0, 0.5]


@pytest.mark.parametrize("weight", [-1, float("nan"), float("inf"), True, "much", [1]])
def test_wrong_weight(weight):
    message = error_of([{"text": "Yes"}, {"text": "Yes", "weight": weight}])
    assert message == f"row 2: weight must be a finite number of at least 0, found {weight!r}"


def test_wrong_columns():
    message = error_of([{"question": "a", "answer": "b"}, {"prompt": "a", "completion": None}])
    lines = message.split("\n")
    assert lines[0] == "row 1: found the columns question, answer"
    assert lines[1] == "row 2: found the columns prompt (completion: null)"
    assert lines[2].startswith("accepted columns: input_ids")


def test_mixed_forms():
    message = error_of([{"text": "a"}, {"prompt": "a", "completion": "b"}, {"text": 3}])
    assert "row 2: has prompt and completion, but row 1 has text" in message
    assert "row 3: text must be text, found int" in message
    message = error_of([{"prompt": "a", "completion": TALK}])
    assert "prompt is str and completion is list" in message


@pytest.mark.parametrize(
    ("value", "part"),
    [
        ({"messages": ["hello"]}, "messages[0] must be an object, found str"),
        ({"messages": [{"from": "human"}]}, "messages[0] has no role; its keys: from"),
        ({"messages": TALK, "tools": "{"}, "tools is text that is not JSON"),
        ({"messages": TALK, "tools": {"a": 1}}, "tools must be a list, found dict"),
    ],
)
def test_wrong_messages(value, part):
    message = error_of([{"messages": TALK}, value], tiny_tokenizer(chat=True))
    assert message.startswith("row 2: ")
    assert part in message


def test_problems_are_collected_over_batches_and_cut_at_ten(monkeypatch):
    monkeypatch.setattr("samestep.data.tokenize._BATCH", 3)
    lines = error_of([{"text": "Yes"}] + [{"text": "half \ud83d"}] * 12).split("\n")
    assert lines[0] == "row 2: character 5 is half of a surrogate pair, which is no text"
    assert lines[10] == "and 2 more"


def test_no_rows():
    with pytest.raises(DataError, match="no rows"):
        tokenize_rows([], tiny_tokenizer())


# Cache


def test_cache_hit_equals_miss(tmp_path, monkeypatch):
    values = rows({"prompt": "a", "completion": "forks"}, {"prompt": "How many", "completion": "b"})
    keywords = {"max_length": 3, "cache": tmp_path / "tokens"}
    miss = tokenize_rows(values, tiny_tokenizer(), **keywords)

    def fail(*args, **keywords):
        raise AssertionError("tokenised again")

    monkeypatch.setattr("samestep.data.row_formats.tokenize_texts", fail)
    hit = tokenize_rows(values, tiny_tokenizer(), **keywords)
    assert hit.fingerprint() == miss.fingerprint()
    assert hit.dropped == miss.dropped != {}


def test_a_cache_hit_refuses_weights_that_are_not_honoured(tmp_path):
    talk = [TALK[1], {**TALK[2], "weight": 0.5}]
    values, tokenizer = rows({"messages": talk}), tiny_tokenizer(chat=True)
    kept = tokenize_rows(values, tokenizer, cache=tmp_path, weigh_tokens=True)
    again = tokenize_rows(values, tokenizer, cache=tmp_path, weigh_tokens=True)
    assert torch.equal(again.token_weights, kept.token_weights)
    with pytest.raises(DataError, match="row 1: it has weights of tokens or messages"):
        tokenize_rows(values, tokenizer, cache=tmp_path)


def test_damaged_cache_is_written_again(tmp_path, caplog):
    values = rows({"text": "forks"})
    expected = tokenize_rows(values, tiny_tokenizer(), cache=tmp_path)
    (path,) = tmp_path.iterdir()
    for damage in (b"", path.read_bytes()[:-1], path.read_bytes()[:-1] + b"\x07"):
        path.write_bytes(damage)
        again = tokenize_rows(values, tiny_tokenizer(), cache=tmp_path)
        assert again.fingerprint() == expected.fingerprint()
        assert Examples.load(path).fingerprint() == expected.fingerprint()
    assert "tokenising again" in caplog.text


def test_cache_key_knows_what_matters(tmp_path):
    def entries(value, tokenizer, **keywords) -> int:
        tokenize_rows(rows(value), tokenizer, cache=tmp_path, **keywords)
        return len(list(tmp_path.iterdir()))

    used = build_tokenizer()
    assert entries({"text": "forks", "id": 1}, used) == 1
    assert entries({"text": "forks", "id": 2}, used) == 1
    used.backend_tokenizer.enable_truncation(2)
    assert entries({"text": "forks"}, used) == 1
    assert entries({"text": "forks", "weight": 2}, used) == 2
    assert entries({"text": "forks "}, used) == 3
    assert entries({"text": "forks"}, used, max_length=2) == 4
    assert entries({"text": "forks"}, used, append_eos=False) == 5
    assert entries({"text": "forks"}, build_tokenizer(add="bos")) == 6
    assert entries({"messages": TALK}, tiny_tokenizer(chat=True)) == 7
    assert entries({"messages": TALK}, tiny_tokenizer(chat=True, generation_tags=True)) == 8
    assert entries({"prompt": "forks", "completion": ""}, used) == 9


def test_cache_that_cannot_be_written_stops_nothing(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    tokenize_rows(rows({"text": "forks"}), tiny_tokenizer(), cache=tmp_path / "file" / "tokens")
    assert "cannot write" in caplog.text
