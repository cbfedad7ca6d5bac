"""Next-token cross entropy: texts, prompts with completions, conversations."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from samestep.train.config import TrainConfig

if TYPE_CHECKING:
    from samestep.data.records import Records
    from samestep.objective import Objective


class CausalLMConfig(TrainConfig):
    """Fine-tune a causal language model, with a step that does not depend on the split."""

    objective: Literal["causal_lm"] = "causal_lm"
    """What to optimise; `samestep train --objective NAME --help` lists what belongs to it."""
    train_on: Literal["completion", "all"] = "completion"
    """Targets: completions and assistant turns, or every token."""
    normalize: Literal["token", "sequence"] | float = "token"
    """Every token weighs the same, every sequence does, or divide by this constant."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Share of the target probability that is spread over the vocabulary."""
    z_loss: float = Field(default=0.0, ge=0)
    """Factor of the squared logsumexp."""

    def read(self, source: str, tokenizer: Any, like: "Records | None" = None) -> "Records":
        """Rows of text, prompt and completion, messages, or token ids."""
        from samestep.data.load import load_rows
        from samestep.data.records import Records
        from samestep.data.tokenize import tokenize_rows
        from samestep.files import cache_folder

        return Records(
            tokenize_rows(
                load_rows(source),
                tokenizer,
                max_length=self.max_length,
                append_eos=self.append_eos,
                train_on=self.train_on,
                cache=cache_folder() / "tokens",
            )
        )

    def build(self, model: Any, data: Sequence["Records"]) -> "Objective":
        """Cross entropy, normalised as asked."""
        from samestep.causal_lm import CausalLMLoss
        from samestep.objective import Objective
        from samestep.terms import constant

        normalize = self.normalize
        return Objective(
            CausalLMLoss(
                normalize=constant(normalize) if isinstance(normalize, float) else normalize,
                label_smoothing=self.label_smoothing,
                z_loss=self.z_loss,
            )
        )

    def problems(self) -> list[str]:
        """A constant that cannot divide."""
        if isinstance(self.normalize, float) and not 0 < self.normalize < float("inf"):
            return [f"normalize: a constant must be above 0, not {self.normalize}"]
        return []
