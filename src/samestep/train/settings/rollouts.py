"""Settings of what a run generates to learn from: what is asked, how it is sampled, its rewards."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from samestep.train.settings.adapters import Names
from samestep.utils.flags import leaf

OF_GENERATION = (
    *("max_completion_length", "generation_batch"),
    *("sampler", "sampler_timeout", "log_completions"),
)
"""What is read by runs alone that generate."""

OF_REWARDS = ("reward_weights", "num_generations", "reward_timeout")
"""What is read by those alone that reward it."""


class GenerationFields(BaseModel):
    """How completions are generated, where a run generates."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    max_completion_length: int = Field(default=256, ge=1)
    """Tokens that a completion has at most."""
    generation_batch: int = Field(default=4, ge=1)
    """Prompts whose completions are generated together. Speed and memory, not the step."""
    sampler: str | None = None
    """What generates in the place of the model itself, such as a server: file.py:name or
    package.module:name of a function."""
    sampler_timeout: float = Field(default=300.0, ge=0)
    """Seconds for which a sampler that cannot be reached is asked again."""
    log_completions: bool = True
    """Write every completion to OUT/rollouts.jsonl."""

    @property
    def generates(self) -> bool:
        """Whether the run generates what it learns from."""
        return False

    @property
    def completions(self) -> int:
        """Completions of each prompt."""
        return 1


class RolloutFields(GenerationFields):
    """Where rollouts come from; without ``reward_funcs`` the rows bring them."""

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
    reward_timeout: float = Field(default=60.0, gt=0)
    """Seconds that a reward function may take for the completions of a prompt."""

    @property
    def generates(self) -> bool:
        """Whether the run generates what it learns from."""
        return bool(self.reward_funcs)

    @property
    def completions(self) -> int:
        """Completions of each prompt."""
        return self.num_generations


ROLLOUTS_MAY_CHANGE = frozenset({"reward_timeout", "sampler_timeout", "log_completions"})
"""Those that a resumed run may change, beside ``generation_batch``, which bits depend on."""


def generates(settings: Any) -> bool:
    """Whether a run generates what it learns from.

    Args:
        settings: Of any objective.

    Returns:
        The answer.
    """
    return isinstance(settings, GenerationFields) and settings.generates


def problems_of_generation(settings: Any, *, by: str) -> list[str]:
    """Contradictions in a run that generates, a line each.

    Args:
        settings: Of an objective with `GenerationFields`, each field right by itself.
        by: The field that asks for it.

    Returns:
        The lines.
    """
    problems = []
    if settings.batch_tokens is not None:
        problems.append("batch_tokens: how long completions get is not known: give batch_size")
    if settings.max_length is not None:
        problems.append(
            "max_length: prompts are not cut, and max_completion_length bounds completions"
        )
    if settings.parallel == "fsdp2":
        problems.append(f"{by}: nothing is generated under parallel fsdp2")
    if settings.bitwise and settings.sampler is not None:
        problems.append("bitwise: what a sampler of your own answers has no bits to keep")
    default = GenerationFields.model_fields["sampler_timeout"].default
    if settings.sampler is None and settings.sampler_timeout != default:
        problems.append("sampler_timeout: it has no effect without sampler")
    return problems


def problems_of_rewards(settings: RolloutFields) -> list[str]:
    """Contradictions between the settings of rewards, a line each.

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
