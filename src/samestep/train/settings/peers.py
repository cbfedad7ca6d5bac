"""What other trainers call things, and what each is here: one table, for YAML, flags and messages.

A name that is here unknown but known elsewhere is answered by its meaning, not by its spelling.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple


class Meaning(NamedTuple):
    """What a name of another trainer is here.

    Attributes:
        field: The field; None where there is none.
        note: What else to know.
    """

    field: str | None
    note: str = ""

    def text(self, *, flag: bool = False) -> str:
        """In words, the field written as in YAML or as a flag."""
        if self.field is None:
            return self.note
        name = f"--{self.field.replace('_', '-')}" if flag else repr(self.field)
        return f"here it is {name}" + (f" ({self.note})" if self.note else "")


def _same(field: str, names: str, note: str = "") -> dict[str, Meaning]:
    return {name: Meaning(field, note) for name in names.split()}


def _none(names: str, note: str) -> dict[str, Meaning]:
    return {name: Meaning(None, note) for name in names.split()}


PEER_FIELDS: Mapping[str, Meaning] = {
    **_same(
        "model",
        "model_name_or_path model_name model_id base_model model_path checkpoint "
        "pretrained_model_name_or_path pretrained_model",
    ),
    **_same("tokenizer", "tokenizer_name tokenizer_name_or_path tokenizer_path processing_class"),
    **_same(
        "data",
        "dataset dataset_name datasets dataset_path train_file train_files train_data "
        "train_dataset data_path data_files",
    ),
    **_same("columns", "column_mapping rename_columns field_mapping columns_mapping"),
    **_same("eval_data", "eval_dataset eval_file validation_file validation_data val_data"),
    **_same("out", "output_dir out_dir save_dir output"),
    **_same("lr", "learning_rate peak_lr max_lr"),
    **_same("batch_size", "train_batch_size global_batch_size total_batch_size effective_batch"),
    **_same(
        "micro_batch",
        "per_device_train_batch_size per_device_batch_size per_gpu_train_batch_size "
        "per_device_eval_batch_size micro_batch_size eval_batch_size",
        "it cannot change the step; the examples of a whole step are batch_size",
    ),
    **_none(
        "gradient_accumulation_steps grad_accum gradient_accumulation accumulate_grad_batches",
        "there is nothing to accumulate by hand: batch_size is the examples of a whole step, and "
        "micro_batch, or memory, decides how it is cut",
    ),
    **_same("max_length", "max_seq_length max_seq_len cutoff_len sequence_len block_size"),
    **_same("long_text", "group_texts truncation sample_packing_drop", "cut, split or drop"),
    **_same("max_length", "model_max_length seq_length context_length"),
    **_same("epochs", "num_train_epochs num_epochs max_epochs n_epochs"),
    **_same("steps", "max_steps num_steps train_steps num_train_steps"),
    **_same(
        "warmup",
        "warmup_steps warmup_ratio num_warmup_steps warmup_fraction",
        "a share of the steps if below 1, else a number of steps",
    ),
    **_same("schedule", "lr_scheduler_type lr_scheduler scheduler lr_schedule"),
    **_same("optimizer", "optim optimizer_name optimizer_type"),
    **_same("weight_decay", "wd decay"),
    **_same("max_grad_norm", "gradient_clipping max_norm clip_grad_norm gradient_clip_val"),
    **_same("save_every", "save_steps save_interval checkpoint_every"),
    **_same("eval_every", "eval_steps eval_interval val_check_interval"),
    **_same("keep", "save_total_limit max_checkpoints"),
    **_same("best", "metric_for_best_model load_best_model_at_end save_best", "loss, a metric"),
    **_same("best_is", "greater_is_better", "lowest or highest"),
    **_same("patience", "early_stopping_patience early_stopping", "evaluations, with best"),
    **_same("min_improvement", "early_stopping_threshold min_delta"),
    **_same("metrics", "compute_metrics eval_metrics"),
    **_same("resume", "resume_from_checkpoint"),
    **_same("overwrite", "overwrite_output_dir"),
    **_same("track", "report_to logger use_wandb"),
    **_none(
        "logging_steps log_every logging_dir log_interval",
        "there is nothing to set: every step is in OUT/log.jsonl",
    ),
    **_none(
        "save_strategy eval_strategy evaluation_strategy logging_strategy",
        "there is nothing to set: save_every and eval_every count steps",
    ),
    **_none("do_train do_eval do_predict", "there is nothing to set: eval_data asks to evaluate"),
    **_same("precision", "torch_dtype bf16", "mixed, float32, bfloat16 or float64"),
    **_none("fp16", "float16 is not offered: precision takes mixed, float32, bfloat16 or float64"),
    **_same(
        "quantization",
        "load_in_4bit load_in_8bit quantization_bit quantize",
        "4bit or 8bit, with lora_rank",
    ),
    **_none(
        "bnb_4bit_quant_type bnb_4bit_use_double_quant use_bnb_nested_quant double_quantization "
        "bnb_4bit_compute_dtype quantization_type bnb_config_kwargs",
        "there is nothing to set: quantization 4bit is NF4 with quantised scales, and products "
        "have the type of precision",
    ),
    **_same("deterministic", "full_determinism use_deterministic_algorithms"),
    **_same("compile", "torch_compile compile_model", "layers compiles each decoder layer"),
    **_same("lora_rank", "lora_r use_peft use_lora peft adapter"),
    **_same("lora_alpha", "lora_scaling"),
    **_same("lora_targets", "lora_target_modules target_modules lora_target"),
    **_same("target_parameters", "lora_target_parameters"),
    **_same("use_rslora", "peft_use_rslora rslora rank_stabilized"),
    **_same("use_dora", "peft_use_dora dora"),
    **_same("loraplus_lr_ratio", "lora_plus_lr_ratio lora_plus loraplus"),
    **_same("modules_to_save", "lora_modules_to_save additional_target"),
    **_same("trainable_token_indices", "peft_trainable_token_indices trainable_tokens"),
    **_same("stream", "streaming"),
    **_same("shuffle_buffer", "buffer_size shuffle_buffer_size shuffle_merged_datasets"),
    **_same("model", "adapter_name_or_path lora_model_dir"),
    **_same("model_adapter", "create_new_adapter"),
    **_same("add_tokens", "new_tokens added_tokens resize_vocab"),
    **_same("add_special_tokens", "new_special_tokens additional_special_tokens"),
    **_same("merge", "merge_lora merge_adapter"),
    **_same(
        "train_on",
        "completion_only_loss assistant_only_loss train_on_inputs train_on_completions_only "
        "train_on_prompt mask_prompt",
        "completion, the default, or all",
    ),
    **_same("padding", "packing sample_packing padding_free", "none packs without padding"),
    **_same("parallel", "deepspeed fsdp strategy", "ddp or fsdp2"),
    **_same("ranks", "nproc_per_node num_processes world_size n_gpus num_gpus devices"),
    **_same("seed", "data_seed random_seed"),
    **_same("label_smoothing", "label_smoothing_factor"),
    **_same("reference_model", "ref_model ref_model_name_or_path model_ref"),
    **_same("beta", "dpo_beta kl_beta"),
    **_same("center_rewards", "center_rewards_coefficient"),
    **_same("entropy_weight", "entropy_coef entropy_coeff entropy_bonus"),
    **_same("ratio", "importance_sampling_level", "token or sequence"),
    **_same("clip_low", "epsilon epsilon_low cliprange clip_eps"),
    **_same("clip_high", "epsilon_high", "how far above 1, of cispo too"),
    **_same("kl_weight", "kl_coef kl_coeff"),
    **_same("reward_funcs", "reward reward_fn reward_function reward_model rewards"),
    **_same("num_generations", "group_size rollouts_per_prompt num_samples_per_prompt"),
    **_same(
        "max_completion_length",
        "max_new_tokens response_length max_response_length max_tokens",
    ),
    **_same("sampler", "use_vllm vllm_mode vllm_server_base_url rollout_func"),
    **_same("baseline", "scale_rewards advantage_estimator", "grpo, dr_grpo or rloo"),
    **_same("loss", "loss_type dpo_loss pref_loss"),
    **_same("objective", "task task_type stage trainer training_type method finetuning_type rl"),
    **_same("teacher", "teacher_model teacher_model_name_or_path"),
    **_same("betas", "adam_beta1 adam_beta2 adam_betas beta1 beta2", "both, as in 0.9 0.95"),
    **_same("eps", "adam_epsilon adam_eps"),
    **_same("momentum", "sgd_momentum muon_momentum"),
    **_same("min_lr_ratio", "min_lr min_lr_rate cosine_min_lr_ratio", "a share of the peak"),
    **_same(
        "cooldown", "num_decay_steps decay_steps decay_ratio", "a share of the steps, or steps"
    ),
    **_same("freeze", "frozen_parameters freeze_parameters freeze_layers", "regular expressions"),
    **_same("ema", "ema_decay use_ema", "the share that stays, such as 0.999"),
    **_none(
        "dataloader_num_workers preprocessing_num_workers dataset_num_proc num_workers",
        "there is nothing to set: rows are tokenised once and cached",
    ),
    **_none(
        "push_to_hub hub_model_id hub_strategy hub_token hub_private_repo push_to_hub_model_id",
        "a run uploads nothing: `samestep export OUT --out FOLDER --push owner/name` does",
    ),
    **_none("neftune_noise_alpha", "noise on embeddings is not offered"),
}
"""Names of fields elsewhere (transformers, TRL, axolotl, LLaMA-Factory, Lightning, nanoGPT)."""

_ROLLOUTS = "on rollouts that rows bring, or that reward_funcs asks to generate"

PEER_OBJECTIVES: Mapping[str, Meaning] = {
    **_same("causal_lm", "sft clm lm finetune fine_tuning", "completions are learned, not prompts"),
    **_same("causal_lm", "pt pretrain pretraining cpt", "with train_on all"),
    **_same("causal_lm", "lora peft", "with lora_rank: adapters go with any objective"),
    **_same("causal_lm", "qlora", "with lora_rank and quantization 4bit, as with any objective"),
    **_same("masked_lm", "mlm"),
    **_same("reward", "rm reward_model reward_modeling"),
    **_same("policy", "grpo gspo dr_grpo rloo dapo", _ROLLOUTS),
    **_same("policy", "cispo", f"with loss cispo, {_ROLLOUTS}"),
    **_same("policy", "sapo", f"with loss sapo, {_ROLLOUTS}"),
    **_same("dpo", "wpo", "with use_weighting"),
    **_same("dpo", "ld_dpo lddpo", "with ld_alpha"),
    **_same("dpo", "tr_dpo trdpo", "with sync_ref_model"),
    **_same("dpo", "f_dpo fdpo", "with f_divergence_type"),
    **_same("dpo", "aot", "with loss aot, or aot_unpaired"),
    **_same("policy", "ppo reinforce online_dpo rl rlhf", _ROLLOUTS),
    **_same("dpo", "ipo robust", "its loss may be ipo or robust"),
    **_same("dpo", "bco", "with loss bco_pair"),
    **_same("classification", "sequence_classification seq_cls text_classification"),
    **_same("token_classification", "ner token_cls pos_tagging"),
    **_same("question_answering", "qa extractive_qa"),
    **_same("distillation", "distill kd gkd knowledge_distillation"),
    **_same("vision_language", "vlm vl multimodal"),
    **_same("embedding", "contrastive sentence_transformers sentence_embedding"),
    **_same("seq2seq", "seq2seq_lm t5 translation summarization"),
    **_same("flow_matching", "flow diffusion rectified_flow"),
}
"""Names of objectives elsewhere; `Meaning.field` is the value of ``objective`` here."""


def peer_objective(name: str) -> str:
    """What an objective of another trainer is here, as "; here it is ..."; empty if unknown."""
    meaning = PEER_OBJECTIVES.get(name.lower().replace("-", "_"))
    return f"; {meaning.text()}" if meaning else ""


def peer_notes(fields: Iterable[str], *, flag: bool = False) -> dict[str, str]:
    """What each name of another trainer is, in words, where it is a field of these settings.

    Args:
        fields: The fields that there are.
        flag: Write fields as flags.

    Returns:
        Words by name.
    """
    known = set(fields)
    # Names without a field are explained by those of a step's batch.
    here = known | ({None} if "micro_batch" in known else set())
    return {
        name: meaning.text(flag=flag)
        for name, meaning in PEER_FIELDS.items()
        if name not in known and meaning.field in here
    }
