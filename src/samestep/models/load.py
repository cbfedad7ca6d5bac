"""Models and tokenizers from a Hub name, a folder or a GGUF file."""

import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError

from samestep.errors import ConfigError
from samestep.models.gguf import model_folder

log = logging.getLogger("samestep")

LOOSE_NOISE = (
    *("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob"),
    "router_jitter_noise",
)
"""What configs call randomness that cannot be tied to examples."""

NEW_HEADS = (
    "AutoModel",
    "AutoModelForQuestionAnswering",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
)
"""Classes whose head may be missing in the weights: it then starts from random values."""


def resolve(model: str) -> str:
    """The folder or Hub name that transformers loads; a .gguf file is converted first.

    Raises:
        ConfigError: A path that does not exist, or a GGUF file that cannot be read.
    """
    if model.endswith(".gguf"):
        return str(model_folder(Path(model)))
    looks_like_a_path = model.startswith((".", "/", "~")) or model.count("/") > 1
    if looks_like_a_path and not Path(model).expanduser().is_dir():
        raise ConfigError(f"model: there is no folder {model}")
    folder = Path(model).expanduser()
    if folder.is_dir() and not (folder / "config.json").exists():
        found = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
        raise ConfigError(f"model: {model} has no config.json (it holds: {found})")
    return str(folder) if folder.is_dir() else model


def load_tokenizer(source: str, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer beside a model, or by itself.

    Args:
        source: What `resolve` gave.
        trust_remote_code: Run Python code that comes with it.

    Returns:
        A transformers tokenizer.

    Raises:
        ConfigError: There is none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"tokenizer: none could be loaded from {source}: {_first_line(error)}. "
            "Name one by tokenizer (a folder or a Hub name)"
        ) from error


def load_processor(source: str, *, trust_remote_code: bool = False) -> Any:
    """The processor of texts and images beside a model.

    Args:
        source: What `resolve` gave.
        trust_remote_code: Run Python code that comes with it.

    Returns:
        A transformers processor.

    Raises:
        ConfigError: There is none, it cannot be read, or it takes no images.
    """
    from transformers import AutoProcessor, ProcessorMixin

    try:
        processor = AutoProcessor.from_pretrained(source, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise ConfigError(
            f"tokenizer: no processor of texts and images could be loaded from {source}: "
            f"{_first_line(error)}. Name one by tokenizer (a folder or a Hub name)"
        ) from error
    if not isinstance(processor, ProcessorMixin):
        raise ConfigError(f"tokenizer: {source} holds {type(processor).__name__}, no processor")
    return processor


def load_model(
    source: str,
    *,
    auto_class: str = "AutoModelForCausalLM",
    init: Literal["pretrained", "random"] = "pretrained",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    trust_remote_code: bool = False,
    settings: Mapping[str, Any] | None = None,
) -> Any:
    """A model of transformers, its attention dropout off.

    Dropout of attention probabilities happens inside fused kernels, where random numbers cannot be
    tied to examples; it would make the step depend on the split. So does the jitter of routers. The
    other kinds of dropout stay.

    Args:
        source: What `resolve` gave.
        auto_class: The class of transformers that builds it. Weights of a language model may
            serve any: what is not in them, a new head, then starts from random values.
        init: "pretrained" weights (safetensors alone: pickles are not read) or "random" ones.
        dtype: Of the weights.
        seed: Of random weights.
        trust_remote_code: Run Python code that comes with the model.
        settings: Changes of its config.

    Returns:
        A transformers model on the CPU, in train mode.

    Raises:
        ConfigError: The config or the weights are missing, incomplete or of an unknown kind.
    """
    import transformers

    auto = getattr(transformers, auto_class)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    try:
        config = transformers.AutoConfig.from_pretrained(source, **options, **(settings or {}))
        for part in _parts(config):
            for name in LOOSE_NOISE:
                if part.to_dict().get(name):
                    setattr(part, name, 0.0)
        torch.manual_seed(seed)
        if init == "random":
            model = auto.from_config(config, dtype=dtype, **options)
        else:
            model, loading = auto.from_pretrained(
                source,
                config=config,
                dtype=dtype,
                use_safetensors=True,
                output_loading_info=True,
                **options,
            )
            _check_complete(source, model, loading["missing_keys"], auto_class in NEW_HEADS)
        if dtype == torch.float64:
            model.set_experts_implementation("eager")  # PyTorch's grouped products lack float64
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ConfigError(
            f"model: {source} could not be loaded: {_first_line(error)}. It takes a folder with "
            "config.json and *.safetensors, a Hub name, or a .gguf file"
            + (" (config.json is enough with init random)" if init == "pretrained" else "")
        ) from error
    if dtype == torch.float64:
        # The grouped products that transformers prefers for experts have no float64.
        model.set_experts_implementation("eager")
    return model.train()


def _parts(config: Any) -> Iterator[Any]:
    """A config and those inside it, such as that of the text model."""
    yield config
    for name in config.sub_configs:
        part = getattr(config, name)
        if part is not None:
            yield from _parts(part)


def _check_complete(source: str, model: Any, keys: Iterable[str], new_head: bool) -> None:
    """No weight may be missing; but the head, where a new one is what is wanted."""
    missing = sorted(keys)
    if new_head:
        body = f"{model.base_model_prefix}."
        head = [key for key in missing if not key.startswith(body) or ".pooler." in key]
        missing = [key for key in missing if key not in head]
        if head:
            log.info("the head starts from random values: %s", ", ".join(head))
    if missing:
        raise ConfigError(
            f"model: {source} lacks {len(missing)} of the model's weights ({', '.join(missing[:3])}"
            f"{', …' if len(missing) > 3 else ''}): they would start from random values"
        )


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0].rstrip(".")


def check_tokens(model: Any, data: Mapping[str, Any]) -> None:
    """Refuse tokens or positions that a model has no embedding for.

    Args:
        model: A model of transformers.
        data: `samestep.data.records.Records` by the setting that names them.

    Raises:
        ConfigError: Every one that does not fit.
    """
    config = model.config.get_text_config()
    positions = config.to_dict().get("max_position_embeddings")
    vocabulary = model.get_input_embeddings().num_embeddings
    problems = []
    for name, records in data.items():
        longest, highest = records.longest_sequence(), records.highest_id()
        if positions and longest > positions:
            problems.append(
                f"{name}: the longest row has {longest} tokens, but the model has {positions} "
                f"positions: set max_length to {positions} or less"
            )
        if highest >= vocabulary:
            problems.append(
                f"{name}: the tokenizer gives id {highest}, but the model has {vocabulary} "
                "embeddings: this tokenizer belongs to another model"
            )
    if problems:
        raise ConfigError("\n".join(problems))
