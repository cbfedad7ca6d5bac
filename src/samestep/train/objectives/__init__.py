"""The objectives of `samestep train`: for each its settings, its rows, its model and its loss."""

import difflib
from importlib import import_module

from samestep.errors import ConfigError
from samestep.train.config import TrainConfig

HOME = {
    "causal_lm": "causal_lm:CausalLMConfig",
    "vision_language": "vision_language:VisionLanguageConfig",
    "dpo": "preference:DPOConfig",
    "simpo": "preference:SimPOConfig",
    "cpo": "preference:CPOConfig",
    "orpo": "preference:ORPOConfig",
    "flow_matching": "flow_matching:FlowMatchingConfig",
    "kto": "kto:KTOConfig",
    "policy": "policy:PolicyConfig",
    "distillation": "distillation:DistillationConfig",
    "reward": "classification:RewardConfig",
    "classification": "classification:ClassificationConfig",
    "regression": "classification:RegressionConfig",
    "token_classification": "classification:TokenClassificationConfig",
    "embedding": "texts:EmbeddingConfig",
    "masked_lm": "texts:MaskedLMConfig",
    "seq2seq": "texts:Seq2SeqConfig",
    "question_answering": "classification:QuestionAnsweringConfig",
}
"""Where the settings of each objective are defined, beside this file."""


def config_class(objective: str) -> type[TrainConfig]:
    """The settings of an objective.

    Args:
        objective: A name, or "file.py:name" for a function of the user's own.

    Returns:
        The class that holds them; importing it does not load PyTorch.

    Raises:
        ConfigError: There is no such objective.
    """
    name = "custom" if ".py:" in objective else objective
    home = "custom:CustomConfig" if name == "custom" else HOME.get(name)
    if home is None:
        near = difflib.get_close_matches(name, HOME, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(
            f"objective: there is no {objective!r}{hint} Known: {', '.join(HOME)}, or file.py:name "
            "for one of your own"
        )
    module, _, attribute = home.partition(":")
    found: type[TrainConfig] = getattr(import_module(f"{__name__}.{module}"), attribute)
    return found
