"""A small version of any configuration of `transformers`, found by the names of its fields."""

import re
from typing import Any

VOCABULARY = 128
FIRST_WORD = 40
"""Token ids below are special in some model; text uses those from here on."""

LAYERS, HEADS, WIDTH, HEAD, FORWARD = 2, 4, 64, 16, 96

RULES: list[tuple[str, int]] = [
    (r"type_vocab_size|num_labels|num_channels|in_channels|_stride|kernel|conv", -1),
    (r"vocab|n_words|num_embeddings", VOCABULARY),
    (r"num_nextn|num_kv_shared|mtp|num_experts_offset", 0),
    (r"first_k_dense|n_shared_experts|num_shared_experts|moe_layer_freq", 1),
    (r"n_group$|topk_group|n_groups$|num_expert_group", 1),
    (r"experts_per_tok|top_k|topk|moe_k$|num_selected|moe_top", 2),
    (r"num_experts|num_local_experts|routed_experts|n_experts|num_zero_experts", 4),
    (r"key_value_heads|kv_heads|num_kv|n_head_kv|num_key_heads|num_value_heads", 2),
    (r"qk_rope_head_dim|rope_head_dim", HEAD),
    (r"qk_head_dim", HEAD + 8),
    (r"d_latents|bottleneck_size", WIDTH),
    (r"num_latents", 16),
    (r"rotary_dim", 8),
    (r"qk_nope_head_dim", 8),
    (r"mamba_n_heads|mamba_num_heads", 4),
    (r"mamba_d_head|mamba_head_dim", 32),
    (r"mamba_d_ssm", 2 * WIDTH),
    (r"head_dim|d_kv|d_head|head_size|kv_channels|dim_head|attention_key|head_width", HEAD),
    (r"lora_rank|_rank$|time_step_rank|rank_dim|lora_dim|_lora", 16),
    (r"state_size|d_state|ssm_state", 8),
    (r"attention_heads|num_heads|n_heads?$|^heads$|encoder_heads|n_head$|attn_heads", HEADS),
    (r"layers?$|depth$|num_blocks|n_block|_layers_|num_hidden_groups|num_stages", LAYERS),
    (r"intermediate|ffn|d_ff|n_inner|mlp_dim|feedforward|feed_forward|mlp_size|d_inner", FORWARD),
    (r"image_size|img_size", 32),
    (r"patch_size", 8),
    (r"max_position|n_positions|n_ctx|max_source|max_target|max_seq|context_length|seq_len", 256),
    (r"sliding_window|attention_window|window_size|block_size|chunk_size", 16),
    (
        r"hidden_size|d_model|n_embd|^dim$|embed_dim|hidden_dim|embedding_size|embed_proj|d_embed"
        r"|proj_dim|projection_dim|embedding_dim|emb_dim|hidden_channels|model_dim|width|lru_width|units",
        WIDTH,
    ),
]
"""The first pattern that a field's name matches gives its value; -1 leaves it."""

UNSET: dict[str, Any] = {
    "head_dim": HEAD,
    "num_key_value_heads": HEADS,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "vocab_size": VOCABULARY,
    "vocabulary_map": {"<image>": FIRST_WORD - 1},
    "moe_intermediate_size": FORWARD,
    "n_shared_experts": 1,
}
"""Fields that some configurations leave to a checkpoint."""


def small(config_class: Any, *, fields: dict[str, Any] | None = None, **changes: Any) -> Any:
    """A configuration a few thousand times smaller than the default.

    Args:
        config_class: Of `transformers`.
        fields: Of the configuration to shrink; by default those of the class.
        **changes: Fields to set at the top, such as the number of labels.

    Returns:
        The configuration; special tokens have small ids of their own.
    """
    large = config_class().to_dict() if fields is None else fields
    shrunk = _shrink(large, ids=iter(range(3, FIRST_WORD)))
    shrunk.update(changes)
    config = config_class.from_dict(shrunk)
    for one in {id(part): part for part in (config, config.get_text_config())}.values():
        one.pad_token_id, one.bos_token_id, one.eos_token_id = 0, 1, 2
        one.use_cache = False
    if config.is_encoder_decoder:
        config.decoder_start_token_id = 0
    _sections(config.get_text_config())
    return config


def _sections(config: Any) -> None:
    """Rotary sections of image and text positions, which some models read with a large default."""
    rope = getattr(config, "rope_parameters", None)
    if isinstance(rope, dict) and "rope_type" in rope:
        share = rope.get("partial_rotary_factor", 1.0)
        half = int((getattr(config, "head_dim", None) or HEAD) * share) // 2
        rope["mrope_section"] = [half - 2 * (half // 3), half // 3, half // 3]


def _shrink(fields: dict[str, Any], *, ids: Any) -> dict[str, Any]:
    layers = _layers(fields)
    made = {key: _field(key, value, layers=layers, ids=ids) for key, value in fields.items()}
    made.update({key: value for key, value in UNSET.items() if key in made and made[key] is None})
    heads = fields.get("num_attention_heads")
    if fields.get("num_key_value_heads") == heads and "num_key_value_heads" in made:
        made["num_key_value_heads"] = HEADS
    if "expand" in made and "state_size" in made and "num_heads" in made:
        made["head_dim"] = made["expand"] * WIDTH // HEADS
    for key in ("layer_types", "layers_block_type", "mlp_layer_types", "attention_layers"):
        if isinstance(made.get(key), list):
            made[key] = made[key][: layers[1]]
    if "attention_types" in made:
        made["attention_types"] = [[["global", "local"], layers[1] // 2]]
    if "axial_pos_embds" in made:
        made["axial_pos_embds"] = False  # they need rows of one length
    if isinstance(made.get("per_layer_config"), dict):
        made["per_layer_config"] = {}
    return made


def _layers(fields: dict[str, Any]) -> tuple[int, int]:
    """The number of layers of a configuration, before and after: all kinds of layer remain."""
    kinds = fields.get("layer_types") or fields.get("layers_block_type") or []
    last = max((kinds.index(kind) for kind in set(kinds)), default=0)
    known = fields.get("num_hidden_layers") or len(kinds)
    return (known if isinstance(known, int) else 0), max(LAYERS, min(last + 1, 8))


def _field(key: str, value: Any, *, layers: tuple[int, int], ids: Any) -> Any:
    before, after = layers
    if isinstance(value, dict):
        return _rope(value) if "rope" in key else _shrink(value, ids=ids)
    if key in ("pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id"):
        return {"p": 0, "b": 1, "e": 2, "s": 2}[key[0]]
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, int) and re.search(r"token_id$|token_index$|token_id_|_id$", key):
        return next(ids)
    if isinstance(value, list):
        if before and len(value) == before:
            return [_in_list(key, one) for one in value[:after]]
        return [_in_list(key, one) for one in value]
    if isinstance(value, int):
        return after if key == "num_hidden_layers" else _number(key, value)
    return value


def _in_list(key: str, value: Any) -> Any:
    plain = isinstance(value, int) and not isinstance(value, bool) and "size" in key
    return _number(key, value) if plain else value


def _number(key: str, value: int) -> int:
    for pattern, chosen in RULES:
        if re.search(pattern, key):
            return value if chosen < 0 else min(value, chosen)
    return value


def _rope(value: dict[str, Any]) -> dict[str, Any]:
    """Sections and factors that fit half a head."""
    half = HEAD // 2
    changed = dict(value)
    for name in ("short_factor", "long_factor"):
        if isinstance(value.get(name), list):
            changed[name] = value[name][:half]
    return {key: _rope(one) if isinstance(one, dict) else one for key, one in changed.items()}


def parameters(model: Any) -> int:
    """Number of weights."""
    return sum(weight.numel() for weight in model.parameters())
