"""Random plans, micro-batches and settings (10,000 with `make thorough`): right, or one error."""

import itertools
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from thorough import examples

from samestep.data.batching import pack_micro_batches, plan_steps, shard_by_cost
from samestep.data.collate import collate_examples
from samestep.data.examples import Example
from samestep.engine.counts import count_units
from samestep.engine.targets import IGNORE, shifted_targets
from samestep.errors import ConfigError
from samestep.train.settings.base import finalize
from samestep.train.settings.language import CausalLMSettings

LENGTHS = st.lists(st.integers(1, 40) | st.integers(1, 4000), min_size=1, max_size=40)
LIMITS = st.none() | st.integers(-1, 60) | st.integers(1, 9000)


@settings(max_examples=examples(4000))
@given(
    lengths=LENGTHS,
    seed=st.integers(0, 2**63),
    batch_size=LIMITS,
    batch_tokens=LIMITS,
    ranks=st.integers(1, 9),
    micro_batch=LIMITS,
    micro_tokens=LIMITS,
    padded=st.booleans(),
)
def test_an_epoch_holds_every_example_once_within_the_budget(
    lengths: list[int],
    seed: int,
    batch_size: int | None,
    batch_tokens: int | None,
    ranks: int,
    micro_batch: int | None,
    micro_tokens: int | None,
    padded: bool,
) -> None:
    sizes = [size for size in (batch_size, batch_tokens) if size is not None]
    cuts = [size for size in (micro_batch, micro_tokens) if size is not None]
    right = len(sizes) == len(cuts) == 1 and sizes[0] > 0 and cuts[0] > 0
    seen: list[int] = []
    try:
        plans = plan_steps(lengths, seed=seed, batch_size=batch_size, batch_tokens=batch_tokens)
        for plan in itertools.takewhile(lambda plan: plan.epoch == 0, plans):
            of_step = [lengths[example] for example in plan.examples]
            if batch_size is None:
                assert sum(of_step) <= (batch_tokens or 0) or len(of_step) == 1
            else:
                assert len(of_step) <= batch_size
            for hand in shard_by_cost(of_step, ranks=ranks):
                own = [of_step[at] for at in hand]
                for micro in pack_micro_batches(
                    own, micro_batch=micro_batch, micro_tokens=micro_tokens, padded=padded
                ):
                    costs = [own[at] for at in micro]
                    cost = max(costs) * len(costs) if padded else sum(costs)
                    assert micro_tokens is None or cost <= micro_tokens or len(micro) == 1
                    assert micro_batch is None or len(micro) <= micro_batch
                    seen += [plan.examples[hand[at]] for at in micro]
    except ConfigError as error:
        assert not right
        assert "give exactly one, at least 1" in str(error)
    else:
        assert right
        assert sorted(seen) == list(range(len(lengths)))


@settings(max_examples=examples(1000))
@given(lengths=LENGTHS, ranks=st.integers(1, 9))
def test_no_rank_has_much_more_than_its_part(lengths: list[int], ranks: int) -> None:
    """Longest processing time first: within 4/3 of the best possible, bounded from below here."""
    tokens, squares = sum(lengths), sum(length**2 for length in lengths)
    costs = [length / tokens + length**2 / squares for length in lengths]
    hands = shard_by_cost(lengths, ranks=ranks)
    assert sorted(itertools.chain(*hands)) == list(range(len(lengths)))
    loads = [sum(costs[at] for at in hand) for hand in hands]
    # Greedy: the heaviest rank was the lightest one when it got its last, smallest sequence.
    heaviest = max(range(ranks), key=lambda rank: loads[rank])
    last = min(costs[at] for at in hands[heaviest])
    assert loads[heaviest] - last <= sum(costs) / ranks + 1e-9


ROWS = st.lists(
    st.lists(st.tuples(st.integers(0, 96), st.booleans()), min_size=1, max_size=12),
    min_size=1,
    max_size=6,
)


@settings(max_examples=examples(2000))
@given(rows=ROWS, padding=st.sampled_from(["none", "right", "left"]), pad_id=st.integers(0, 96))
def test_a_micro_batch_has_the_targets_of_its_rows(
    rows: list[list[tuple[int, bool]]], padding: Any, pad_id: int
) -> None:
    """Counted by hand: every masked-in token but the first of its row, whatever the pad id is."""
    examples = []
    for number, row in enumerate(rows):
        ids = torch.tensor([token for token, _ in row])
        mask = torch.tensor([is_target for _, is_target in row])
        examples.append(Example(ids, ids.where(mask, IGNORE), 1.0, number))
    micro = collate_examples(examples, padding=padding, pad_id=pad_id)
    targets = shifted_targets(micro)
    wanted = [token for row in rows for token, is_target in row[1:] if is_target]
    assert targets[targets != IGNORE].tolist() == wanted
    assert count_units([micro])["token"] == len(wanted)
    assert count_units([micro])["sequence"] == sum(any(on for _, on in row[1:]) for row in rows)
    assert micro["example_ids"].tolist() == list(range(len(rows)))


ANYTHING = (
    st.none()
    | st.booleans()
    | st.integers(-(2**40), 2**40)
    | st.floats()
    | st.sampled_from(["auto", "none", "fsdp2", "token", "adamw", "skip", "1e-3"])
    | st.text(max_size=5)
    | st.lists(st.text(max_size=3), max_size=2)
)
FIELDS = st.sampled_from([*CausalLMSettings.model_fields, "batch_sise", "lerning_rate", ""])


@settings(max_examples=examples(3000))
@given(values=st.dictionaries(FIELDS, ANYTHING, max_size=5))
def test_settings_are_taken_or_refused_by_name(values: dict[str, Any]) -> None:
    needed = {"model": "m", "data": "d", "out": "o"}
    try:
        config = finalize(CausalLMSettings(**{**needed, **values}))
    except ConfigError as error:
        assert any(name in str(error) for name in values)
        return
    assert (config.batch_size is None) != (config.batch_tokens is None)
    assert (config.steps is None) != (config.epochs is None)
    assert type(config)(**config.saved()).saved() == config.saved()
