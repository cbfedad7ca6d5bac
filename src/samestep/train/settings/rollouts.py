"""Settings of rollouts that are generated: what is asked, how it is sampled, who rewards it."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from samestep.train.settings.adapters import Names
from samestep.utils.flags import leaf

_OF_GENERATION = (
    *("reward_weights", "num_generations", "max_completion_length", "generation_batch"),
    *("reward_timeout", "sampler", "sampler_timeout", "log_completions"),
)
"""What is read by runs alone that generate."""


class RolloutFields(BaseModel):
    """Where rollouts come from; without ``reward_funcs`` the rows bring them."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    temperature: float = Field(default=1.0, gt=0)
    """Of the policy, in sampling and in the loss: logits are divided by it."""
    reward_funcs: Annotated[Names, leaf("FILE:NAME ...", many=True)] = ()
    """Generate the rollouts, to the rows' prompts, and reward them by these functions (prompts,
    completions, **columns) to a number each: file.py:name or package.module:name."""
    reward_weights: tuple[float, ...] = ()
    """A factor of each reward function; by default 1."""
    num_generations: int = Field(default=8, ge=2)
    """Completions of each prompt: the group that a reward is compared with. A step has batch_size
    prompts."""
    max_completion_length: int = Field(default=256, ge=1)
    """Tokens that a completion has at most."""
    generation_batch: int = Field(default=4, ge=1)
    """Prompts whose completions are generated together. Speed and memory, not the step."""
    reward_timeout: float = Field(default=60.0, gt=0)
    """Seconds that a reward function may take for the completions of a prompt."""
    sampler: str | None = None
    """What generates in the place of the model itself, such as a server: file.py:name or
    package.module:name of a function."""
    sampler_timeout: float = Field(default=300.0, ge=0)
    """Seconds for which a sampler that cannot be reached is asked again."""
    log_completions: bool = True
    """Write every rollout to OUT/rollouts.jsonl."""


ROLLOUTS_MAY_CHANGE = frozenset({"reward_timeout", "sampler_timeout", "log_completions"})
"""Those that a resumed run may change, beside ``generation_batch``, which bits depend on."""


def unread_without_generation() -> tuple[str, ...]:
    """The fields that nothing reads where rows bring the rollouts."""
    return _OF_GENERATION


def problems_of_generation(settings: RolloutFields) -> list[str]:
    """Contradictions between the settings of rollouts that are generated, a line each.

    Args:
        settings: Each field right by itself, ``reward_funcs`` given.

    Returns:
        The lines.
    """
    problems = []
    functions, weights = settings.reward_funcs, settings.reward_weights
    if weights and len(weights) != len(functions):
        problems.append(
            f"reward_weights: {len(weights)} for {len(functions)} reward_funcs: give one for each"
        )
    if weights and not any(weights):
        problems.append("reward_weights: all are 0, so that nothing is rewarded")
    names = reward_names(functions)
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        problems.append(f"reward_funcs: {', '.join(twice)} is there twice")
    return problems


def reward_names(functions: tuple[str, ...]) -> list[str]:
    """What the log calls reward functions: their own names, where those are not the same.

    Args:
        functions: As ``reward_funcs``.

    Returns:
        A name each.
    """
    short = [function.rpartition(":")[2] for function in functions]
    return short if len({*short}) == len(short) else list(functions)
