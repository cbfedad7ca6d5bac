"""What was generated for a step: rollouts compared within their groups, records, numbers, lines."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, TypeVar

import torch

from samestep.data.examples import Example, Examples
from samestep.data.readers.prompts import PromptRows
from samestep.data.readers.rollouts import Baseline, advantages_of
from samestep.data.records import Records
from samestep.engine.evaluate import EvalReport
from samestep.engine.step import StepReport
from samestep.engine.targets import IGNORE
from samestep.errors import RolloutError
from samestep.train.sampling import Completion

Report = TypeVar("Report", StepReport, EvalReport)


@dataclass(frozen=True)
class Asked:
    """A prompt of a step.

    Attributes:
        place: In the step, from 0: what a reward is compared with has the same place.
        at: Its index in the training records.
        turn: How often the step had the same prompt before; a mix may repeat rows.
    """

    place: int
    at: int
    turn: int

    @classmethod
    def all_of(cls, examples: Sequence[int]) -> "list[Asked]":
        """The prompts of a step, in order.

        Args:
            examples: Their indices in the training records.
        """
        seen: dict[int, int] = {}
        found = []
        for place, at in enumerate(examples):
            found.append(cls(place, at, seen.get(at, 0)))
            seen[at] = seen.get(at, 0) + 1
        return found


@dataclass(frozen=True)
class Rollout:
    """A completion with its reward.

    Attributes:
        asked: The prompt.
        sample: Which of its completions, from 0.
        completion: What was written.
        text: The same as text.
        rewards: By reward function.
        reward: Their weighted sum.
        advantage: The reward compared with those of the group.
    """

    asked: Asked
    sample: int
    completion: Completion
    text: str
    rewards: Mapping[str, float]
    reward: float
    advantage: float = 0.0

    @classmethod
    def from_json(
        cls,
        asked: Sequence[int],
        sample: int,
        completion: Mapping[str, Any],
        text: str,
        rewards: Mapping[str, float],
        reward: float,
    ) -> "Rollout":
        """A rollout from its fields, as ranks tell each other of them."""
        ids, log_p = tuple(completion["ids"]), tuple(completion["log_p"])
        written = Completion(ids, completion["ended"], log_p)
        return cls(Asked(*asked), sample, written, text, rewards, reward)


@dataclass(frozen=True)
class StepRollouts:
    """All rollouts of a step, the same on every rank.

    Attributes:
        rollouts: Prompt by prompt, in the order of the step.
        rows: Those of all prompts.
        records: The same, to be learned from.
        terms: What is logged of them: means over completions, by the weights of their rows.
        weight: The sum of those weights.
        seconds: That it took.
    """

    rollouts: Sequence[Rollout]
    rows: PromptRows
    records: Records
    terms: Mapping[str, float]
    weight: float
    seconds: float = 0.0

    def added_to(self, report: Report) -> Report:
        """The report of a step or an evaluation that also says what was generated for it."""
        return replace(
            report,
            terms={**report.terms, **self.terms},
            counts={**report.counts, "completion": self.weight},
            seconds=report.seconds + self.seconds,
        )

    def names(self) -> list[str]:
        """What messages call each rollout."""
        return [
            f"{self.rows[each.asked.at].origin}, completion {each.sample + 1}"
            for each in self.rollouts
        ]

    def lines(self, step: int) -> Iterator[dict[str, Any]]:
        """The rollouts as lines of ``rollouts.jsonl``.

        Args:
            step: Steps done with this one.

        Yields:
            An object each.
        """
        for each in self.rollouts:
            row, rewarded = self.rows[each.asked.at], {}
            if each.rewards:
                rewarded = {
                    "rewards": dict(each.rewards),
                    "reward": each.reward,
                    "advantage": each.advantage,
                }
            yield {
                "step": step,
                "row": row.origin,
                "sample": each.sample + 1,
                "prompt": row.prompt,
                "completion": each.text,
                **rewarded,
                "tokens": len(each.completion.ids),
                "truncated": not each.completion.ended,
            }


def compared(
    found: Sequence[Rollout], prompts: Records, *, rows: PromptRows, baseline: Baseline | None
) -> StepRollouts:
    """Rollouts with their advantages, each over the whole of its group.

    Args:
        found: All of a step, in any order.
        prompts: The training records.
        rows: Theirs.
        baseline: As for `samestep.data.readers.rollouts.advantages_of`; None: there are no rewards.

    Returns:
        Them, in the order of the step.

    Raises:
        RolloutError: A reward is too large to compare.
    """
    found = sorted(found, key=lambda each: (each.asked.place, each.sample))
    groups = [str(each.asked.place) for each in found]
    try:
        rewards = [each.reward for each in found]
        advantages = (
            [0.0] * len(found)
            if baseline is None
            else advantages_of(rewards, groups, baseline=baseline)
        )
        terms = _terms(found, [prompts[each.asked.at].sequences[0].weight for each in found])
    except OverflowError:
        largest = max(found, key=lambda each: abs(each.reward))
        raise RolloutError(
            f"{rows[largest.asked.at].origin}: reward {largest.reward:g} is too large: its "
            "square, or a sum over its group, is no finite number"
        ) from None
    rollouts = [
        replace(each, advantage=advantage)
        for each, advantage in zip(found, advantages, strict=True)
    ]
    records = _records(rollouts, prompts)
    weight = math.fsum(records.sequences.weights.tolist())
    return StepRollouts(rollouts, rows, records, terms, weight)


def _records(rollouts: Sequence[Rollout], prompts: Records) -> Records:
    number = 1 + max(each.sample for each in rollouts)
    rows = 1 + max(prompts.first_rows())
    examples = []
    for each in rollouts:
        prompt = prompts[each.asked.at].sequences[0]
        completion = torch.tensor(each.completion.ids, dtype=torch.int64)
        examples.append(
            Example(
                torch.cat([prompt.input_ids, completion]),
                torch.cat([torch.full_like(prompt.input_ids, IGNORE), completion]),
                prompt.weight,
                # What dropout is keyed to: another number for each completion of the step.
                row=(each.asked.turn * rows + prompt.row) * number + each.sample,
            )
        )
    advantages = torch.tensor([each.advantage for each in rollouts], dtype=torch.float64)
    return Records(
        Examples.from_examples(examples),
        fields={"advantage": advantages},
        token_fields=_old_log_p(rollouts, prompts),
    )


def _old_log_p(rollouts: Sequence[Rollout], prompts: Records) -> dict[str, torch.Tensor]:
    """What the sampler says of its tokens, where they stand; nothing if it was the policy."""
    told = [len(each.completion.log_p) > 0 for each in rollouts]
    if not any(told):
        return {}
    if not all(told):
        raise RolloutError("sampler: some completions have log_p, and others have none")
    values = [
        [*[0.0] * prompts.lengths[each.asked.at], *each.completion.log_p] for each in rollouts
    ]
    return {"old_log_p": torch.tensor(list(chain(*values)), dtype=torch.float64)}


def _terms(rollouts: Sequence[Rollout], weights: Sequence[float]) -> dict[str, float]:
    """Means over completions by their weights."""
    total = math.fsum(weights)

    def mean(values: Sequence[float]) -> float:
        return math.fsum(w * value for w, value in zip(weights, values, strict=True)) / total

    written = {
        "completion_length": mean([float(len(each.completion.ids)) for each in rollouts]),
        "truncated": mean([float(not each.completion.ended) for each in rollouts]),
    }
    names = list(rollouts[0].rewards)
    if not names:
        return written
    groups: dict[int, list[float]] = {}
    for each in rollouts:
        groups.setdefault(each.asked.place, []).append(each.reward)
    spread = {place: _deviation(rewards) for place, rewards in groups.items()}
    deviations = [spread[each.asked.place] for each in rollouts]
    parts = {
        f"rewards/{name}": mean([each.rewards[name] for each in rollouts])
        for name in (names if len(names) > 1 else ())
    }
    return {
        "reward": mean([each.reward for each in rollouts]),
        **parts,
        "reward_std": mean(deviations),
        "frac_reward_zero_std": mean([float(deviation == 0) for deviation in deviations]),
        **written,
    }


def _deviation(values: Sequence[float]) -> float:
    middle = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((value - middle) ** 2 for value in values) / (len(values) - 1))
