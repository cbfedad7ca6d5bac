"""Loading models and tokenizers from a Hub name, a folder, adapters, or a GGUF file."""

import hashlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoProcessor,
    AutoTokenizer,
    ProcessorMixin,
)

from samestep.errors import ConfigError
from samestep.models.files import (
    check_complete,
    check_finite,
    check_finite_files,
    check_parts,
    check_safetensors,
    made_in_cache,
)
from samestep.models.gguf import convert_gguf
from samestep.models.load_quantized import adopt_quantized, quantization_options, read_quantized
from samestep.models.lora import num_embeddings
from samestep.models.placement import DRAWN, building, made_for_files, reading
from samestep.models.quantized import Quantization
from samestep.models.saved_adapter import continue_lora
from samestep.models.weightless import is_weightless
from samestep.utils.adapter_folder import ADAPTER_WEIGHTS, is_adapter, read_adapter
from samestep.utils.files import cache_folder, sha256_of, user_path
from samestep.utils.hub import find_on_hub
from samestep.utils.waiting import waiting

_log = logging.getLogger("samestep")

_UNKEYED_NOISE = (
    *("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob"),
    "router_jitter_noise",
)
"""Settings of configs for randomness that cannot be tied to examples."""

_NEW_HEAD_CLASSES = (
    "AutoModel",
    "AutoModelForQuestionAnswering",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
)
"""Classes whose head may be missing from the weights: it then starts from random values."""


def resolve_source(model: str, *, kind: Literal["model", "tokenizer"] = "model") -> str:
    """The folder or Hub name that transformers loads.

    A .gguf file is converted first, and adapters are folded into their base; both are done once,
    and kept in the cache.

    Args:
        model: A Hub name, a folder with config.json, one of adapters, or a .gguf file.
        kind: What is wanted of it: a tokenizer may stand in a folder of its own.

    Returns:
        A folder or a Hub name.

    Raises:
        ConfigError: A path that does not exist, a name that the Hub does not have or cannot be
            asked for, or a GGUF file that cannot be read.
    """
    if model.endswith(".gguf"):
        return str(convert_gguf(Path(model)))
    looks_like_a_path = model.startswith((".", "/", "~")) or model.count("/") > 1
    if looks_like_a_path and not user_path(model).is_dir():
        raise ConfigError(f"model: there is no folder {model}")
    folder = user_path(model)
    alone = kind == "tokenizer" and (folder / "tokenizer_config.json").exists()
    if not alone and is_adapter(model):
        return base_of(model) if kind == "tokenizer" else str(merge_adapter(model))
    if folder.is_dir() and not alone and not (folder / "config.json").exists():
        content = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
        raise ConfigError(f"model: {model} has no config.json (it holds: {content})")
    if folder.is_dir():
        return str(folder)
    try:
        return find_on_hub(model, kind="model")
    except LookupError as error:
        raise ConfigError(
            f"model: {model} cannot be loaded: there is no such folder here, and {error}"
        ) from None


def base_of(adapter: str) -> str:
    """The folder or Hub name of the model that adapters were trained on.

    Args:
        adapter: Their folder.

    Returns:
        What `resolve_source` gives for it.

    Raises:
        ConfigError: The folder cannot be used, or the base cannot be found.
    """
    base = read_adapter(adapter)["base_model_name_or_path"]
    try:
        return resolve_source(base)
    except ConfigError as error:
        raise ConfigError(
            f"model: the adapter in {adapter} was trained on {base}, which cannot be loaded: "
            f"{str(error).removeprefix('model: ')}. If the base lies elsewhere now, set "
            "base_model_name_or_path in its adapter_config.json"
        ) from error


def merge_adapter(adapter: str) -> Path:
    """The folder of a language model whose adapters were folded into its weights, in float32.

    Args:
        adapter: The folder of the adapters.

    Returns:
        The folder, in the cache, by the content of adapters and base.

    Raises:
        ConfigError: As for `base_of`; or the adapters do not fit the base, or are not those of a
            causal language model.
    """
    base, task = base_of(adapter), read_adapter(adapter).get("task_type")
    if task != "CAUSAL_LM":
        raise ConfigError(
            f"model: the adapter in {adapter} is of task_type {task}: those of CAUSAL_LM alone can "
            "be folded into their base"
        )
    folder = user_path(adapter)

    def write(target: Path) -> None:
        _log.info("folding the adapter in %s into its base (once)", adapter)
        with made_for_files(), waiting("folding an adapter into its base"):
            model = continue_lora(load_model(base), folder)
            model.merge_and_unload(safe_merge=True).save_pretrained(target)
            load_tokenizer(resolve_source(adapter, kind="tokenizer")).save_pretrained(target)

    files = [folder / "adapter_config.json", folder / ADAPTER_WEIGHTS]
    if Path(base).is_dir():
        files += sorted([*Path(base).glob("*.json"), *Path(base).glob("*.safetensors")])
    else:  # of the Hub's cache: the path has the commit
        files += [Path(str(transformers.utils.cached_file(base, "config.json")))]
    facts = "\n".join([base, *(f"{sha256_of(file)} {file}" for file in files)])
    target = cache_folder() / "merged" / hashlib.sha256(facts.encode()).hexdigest()[:32]
    return made_in_cache(target, write, failure=f"{adapter} could not be folded into its base")


def load_tokenizer(source: str, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer beside a model, or by itself.

    Args:
        source: What `resolve_source` returned.
        trust_remote_code: Run Python code that comes with it.

    Returns:
        A transformers tokenizer.

    Raises:
        ConfigError: There is none, or it cannot be read.
    """
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise ConfigError(
            f"tokenizer: none could be loaded from {source}: {first_line(error)}. "
            "Name one by tokenizer (a folder or a Hub name)"
        ) from error


def load_processor(source: str, *, trust_remote_code: bool = False) -> Any:
    """The processor of texts and images beside a model.

    Args:
        source: What `resolve_source` returned.
        trust_remote_code: Run Python code that comes with it.

    Returns:
        A transformers processor.

    Raises:
        ConfigError: There is none, it cannot be read, or it takes no images.
    """
    try:
        processor = AutoProcessor.from_pretrained(source, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise ConfigError(
            f"tokenizer: no processor of texts and images could be loaded from {source}: "
            f"{first_line(error)}. Name one by tokenizer (a folder or a Hub name)"
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
    quantization: Quantization | None = None,
) -> Any:
    """A model of transformers, its attention dropout off.

    Dropout of attention probabilities happens inside fused kernels, where random numbers cannot be
    tied to examples; it would make the step depend on the split. So does the jitter of routers. The
    other kinds of dropout stay.

    It is made where `samestep.models.placement.made_on` says, on the CPU by default: weights are
    drawn by that device's generator, or read straight into its memory. Those that are stored in few
    bits are on the CPU in any case, where they are the same for every device.

    Args:
        source: What `resolve_source` returned.
        auto_class: The class of transformers that builds it. Weights of a language model may
            serve any class: a new head, which is not in them, starts from random values.
        init: "pretrained" weights (safetensors alone: pickles are not read) or "random" ones.
        dtype: Of the weights.
        seed: Of random weights.
        trust_remote_code: Run Python code that comes with the model.
        settings: Changes of its config.
        quantization: How its linear layers but the head are stored; they do not train.

    Returns:
        A transformers model in train mode; ``stored_dtype`` is the type that its
        config says its weights have in the files, or None.

    Raises:
        ConfigError: The config or the weights are missing, incomplete or of an unknown kind.
    """
    auto = getattr(transformers, auto_class)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(source, **options, **(settings or {}))
        for nested in _nested_configs(config):
            check_parts(nested.to_dict())
            for name in _UNKEYED_NOISE:
                if nested.to_dict().get(name):
                    setattr(nested, name, 0.0)
        stored = config.dtype
        torch.manual_seed(seed)
        drawn = init == "random"
        if drawn or is_weightless():
            with building():
                model = auto.from_config(config, dtype=dtype, **options)
        else:
            check_safetensors(source, "model.safetensors.index.json")
            few_bits = quantization_options(config, quantization, source=source)
            if few_bits:
                check_finite_files(source)

            def read(config: Any, **more: Any) -> tuple[Any, dict[str, Any]]:
                torch.manual_seed(seed)
                found: tuple[Any, dict[str, Any]] = auto.from_pretrained(
                    source,
                    config=config,
                    use_safetensors=True,
                    output_loading_info=True,
                    **{"dtype": dtype, **reading(), **more, **options},
                )
                return found

            model, loading = read_quantized(read, config, few_bits) if few_bits else read(config)
            new_head, drawn = auto_class in _NEW_HEAD_CLASSES, bool(loading["missing_keys"])
            check_complete(source, model, missing=loading["missing_keys"], new_head=new_head)
            if few_bits:
                adopt_quantized(model, dtype)
            else:
                check_finite(source, model)
        if dtype == torch.float64:
            # The grouped products that transformers prefers for experts have no float64.
            model.set_experts_implementation("eager")
    except Exception as error:
        if isinstance(error, ConfigError):
            raise
        # Libraries raise whatever values of a wrong type make them trip over.
        raise ConfigError(
            f"model: {source} could not be loaded: {first_line(error)}. It takes a folder with "
            "config.json and *.safetensors, a Hub name, or a .gguf file"
            + (" (config.json is enough with init random)" if init == "pretrained" else "")
        ) from error
    setattr(model, DRAWN, drawn)
    # What its weights were before they became `dtype`: they are saved as they came.
    model.stored_dtype = stored if init == "pretrained" else None
    return model.train()


def _nested_configs(config: Any) -> Iterator[Any]:
    """A config and those inside it, such as that of the text model."""
    yield config
    for name in config.sub_configs:
        nested = getattr(config, name)
        if nested is not None:
            yield from _nested_configs(nested)


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    return str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__


def check_token_range(model: Any, data: Mapping[str, Any]) -> None:
    """Refuse tokens or positions that a model has no embedding for.

    Args:
        model: A model of transformers.
        data: `samestep.data.records.Records` by the name of their setting.

    Raises:
        ConfigError: Some data do not fit; the message lists all of them.
    """
    config = model.config.get_text_config()
    positions = config.to_dict().get("max_position_embeddings")
    vocabulary = num_embeddings(model)
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
