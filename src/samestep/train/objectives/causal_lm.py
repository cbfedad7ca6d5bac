"""Next-token cross entropy: texts, prompts with completions, conversations."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from samestep.errors import ConfigError
from samestep.train.config import TrainConfig

if TYPE_CHECKING:
    from samestep.data.records import Records
    from samestep.engine.terms import LossFn, Objective


def read_language(
    config: TrainConfig, source: str, tokenizer: Any, train_on: Literal["completion", "all"]
) -> "Records":
    """Rows of text, prompt and completion, messages, or token ids."""
    from samestep.data.load import load_rows
    from samestep.data.records import Records
    from samestep.data.tokenize import tokenize_rows
    from samestep.utils.files import cache_folder

    return Records(
        tokenize_rows(
            load_rows(source),
            tokenizer,
            max_length=config.max_length,
            append_eos=config.append_eos,
            train_on=train_on,
            cache=cache_folder() / "tokens",
            weigh_tokens=True,
        )
    )


class CausalLMConfig(TrainConfig):
    """Fine-tune a causal language model, with a step that does not depend on the split."""

    objective: Literal["causal_lm"] = "causal_lm"
    """What to optimise; `samestep train --objective NAME --help` lists what belongs to it."""
    train_on: Literal["completion", "all"] = "completion"
    """Targets: completions and assistant turns, or every token."""
    normalize: Literal["token", "sequence"] | float = "token"
    """Every token weighs the same, every sequence does, or divide by this constant."""
    loss: Literal["nll", "dft"] = "nll"
    """Cross entropy, or dynamic fine-tuning: each target's times its probability."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Share of the target probability that is spread over the vocabulary."""
    z_loss: float = Field(default=0.0, ge=0)
    """Factor of the squared logsumexp."""
    router_loss: Literal["window", "sequence"] | None = None
    """Mixtures of experts: equal loads over the whole batch, or within each sequence."""
    router_loss_weight: float = Field(default=0.001, gt=0)
    """Weight of the router loss."""
    router_z_loss: float = Field(default=0.0, ge=0)
    """Factor of the squared logsumexp of router logits."""
    router_bias_rate: float = Field(default=0.0, ge=0)
    """Step of the experts' biases against their loads, after each step of training."""

    def read(self, source: str, tokenizer: Any, like: "Records | None" = None) -> "Records":
        """Rows of text, prompt and completion, messages, or token ids."""
        return read_language(self, source, tokenizer, self.train_on)

    def build(self, model: Any, data: Sequence["Records"]) -> "Objective":
        """Cross entropy, normalised as asked, and what was asked of the routers."""
        from samestep.engine.terms import Objective, constant
        from samestep.objectives.language import DFT, CausalLMLoss

        value = self.normalize
        normalize = constant(value) if isinstance(value, float) else value
        loss: LossFn = CausalLMLoss(
            normalize=normalize, label_smoothing=self.label_smoothing, z_loss=self.z_loss
        )
        if self.loss == "dft":
            loss = DFT(normalize)
        if self.router_loss or self.router_z_loss or self.router_bias_rate:
            return self._with_routers(loss, model)
        return Objective(loss)

    def _with_routers(self, loss: "LossFn", model: Any) -> "Objective":
        from samestep.engine.terms import Objective
        from samestep.engine.two_pass import TwoPass
        from samestep.models.routers import router_biases, routers
        from samestep.objectives.routers import ROUTER_COUNTERS, RouterBias, RouterLosses

        if not routers(model):
            raise ConfigError(f"router settings: {type(model).__name__} has no routers")
        if self.router_bias_rate and len(router_biases(model)) < len(routers(model)):
            raise ConfigError(
                f"router_bias_rate: the routers of {type(model).__name__} have no bias to move; "
                "use router_loss"
            )
        bias = RouterBias(self.router_bias_rate) if self.router_bias_rate else None
        both = RouterLosses(
            loss,
            self.router_loss,
            balance_weight=self.router_loss_weight,
            z_weight=self.router_z_loss,
            bias=bias,
        )
        return Objective(
            TwoPass(both) if self.router_loss == "window" else both,
            ROUTER_COUNTERS if self.router_z_loss else {},
            after_step=None if bias is None else bias.after_step,
        )

    def problems(self) -> list[str]:
        """A constant that cannot divide, terms that dft does not have, biases in adapters."""
        found = []
        if isinstance(self.normalize, float) and not 0 < self.normalize < float("inf"):
            found.append(f"normalize: a constant must be above 0, not {self.normalize}")
        if self.loss == "dft" and (self.label_smoothing or self.z_loss):
            found.append("loss: dft goes with neither label_smoothing nor z_loss")
        if self.router_bias_rate and self.lora_rank is not None:
            found.append("router_bias_rate: adapters do not hold the biases; leave lora_rank out")
        return found
