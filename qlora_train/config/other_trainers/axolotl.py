"""Axolotl's YAML (`AxolotlInputConfig` in its `utils/schemas`)."""

from typing import Any

from qlora_train.config.other_trainers import transformers_arguments as shared
from qlora_train.config.other_trainers.axolotl_datasets import source_keys
from qlora_train.config.other_trainers.key_mapping import (
    Found,
    Lost,
    OtherTrainer,
    Settings,
    Unneeded,
    lost,
    to,
    unneeded,
)
from qlora_train.config.other_trainers.value_conversions import (
    attention,
    chat_template,
    checkpointing,
    compute_dtype,
    constant,
    flag,
    flash_attention,
    four_bits,
    four_instead_of_eight_bits,
    if_positive,
    is_on,
    names,
    number,
    objective,
    only,
    optimizer,
    schedule,
    share_of_train,
    times_per_epoch,
    trl_loss,
    where,
)

GRPO = "answers are not sampled while training; TRL's trainers do that"


def _adapter(found: Found) -> Any:
    kind = str(found.value).lower()
    if kind in ("lora", "qlora"):
        return Unneeded("LoRA is what is trained; quantization.load_in_4bit makes it QLoRA")
    return Lost(f"{kind} is not available: LoRA is trained", todo=True)


def _targets(found: Found) -> Any:
    """`lora_target_linear` adds all linear layers to the named ones."""
    if is_on(found.config.get("lora_target_linear")):
        return "all-linear"
    value = found.config.get("lora_target_modules")
    return ("all-linear" if value == "all-linear" else value if isinstance(value, str) else names(value)) or Unneeded(
        "it is off there"
    )


def _accumulation(found: Found) -> Any:
    """Return Axolotl's total `batch_size` as micro-batches per step."""
    total, micro = number(found.value), number(found.config.get("micro_batch_size")) or 1
    if "gradient_accumulation_steps" in found.config:
        return Unneeded("gradient_accumulation_steps decides")
    return max(1, total // micro) if isinstance(total, int) and isinstance(micro, int) else Lost("not a number")


def _train_on(found: Found) -> Any:
    return "all" if is_on(found.value) else Unneeded("data.train_on: assistant is the default")


def _overflow(found: Found) -> Any:
    return only({"drop": "drop", "truncate": "truncate", "raise": "refuse"}, "not a choice here")(found)


def _objective(found: Found) -> Any:
    losses = names(found.config.get("dpo_loss_type"))
    if str(found.value).lower() == "dpo" and losses:
        return Unneeded("dpo_loss_type decides")
    return objective({"dpo": "dpo", "ipo": "ipo", "simpo": "simpo", "orpo": "orpo", "kto": "kto"})(found)


def _tokens(found: Found) -> Any:
    return Settings({"model.new_tokens": names(found.value)}, "their embeddings are trained with the adapter")


AXOLOTL = OtherTrainer(
    name="axolotl",
    title="Axolotl",
    programs=("axolotl", "axolotl.cli.train"),
    absent={"adapter": Lost("whole weights are trained there; here LoRA: check train.learning_rate and lora.r", todo=True)},
    defaults={
        "data.max_length": 512, "train.gradient_accumulation_steps": 1, "train.optim": "adamw_torch_fused",
        "quantization.load_in_4bit": four_instead_of_eight_bits,
        "train.sft_weight": lambda config: 1.0 if config.get("rl") == "simpo" else None,
    },
    keys=source_keys() | {
        "base_model": to("model.model_name_or_path"),
        "base_model_config": unneeded("config.json of the base model is read"),
        "tokenizer_config": lost("the tokenizer of model.model_name_or_path is used"),
        "model_type": unneeded("config.json names the architecture"),
        "type_of_model": unneeded("config.json names the architecture"),
        "tokenizer_*": unneeded("the base model's tokenizer files decide"),
        "processor_*": lost("images, audio and video are not trained on"),
        "is_*_derived_model": unneeded("config.json names the architecture"),
        "revision_of_model": to("model.revision"),
        "trust_remote_code": to("model.trust_remote_code", flag, "a Hub model needs model.revision too"),
        "overrides_of_model_config.rope_scaling": to("model.rope_scaling"),
        "overrides_of_model_*": lost("config.json of the base model is used as it is"),
        "rope_scaling": to("model.rope_scaling"),
        "strict": unneeded("unknown keys are always refused"),
        "load_in_4bit": to("quantization.load_in_4bit", four_bits),
        "load_in_8bit": lost(shared.NO_8_BIT),
        "gptq": lost("a GPTQ base cannot be trained; name the model that it was made from"),
        "bnb_config_kwargs.bnb_4bit_quant_type": to("quantization.bnb_4bit_quant_type"),
        "bnb_config_kwargs.bnb_4bit_use_double_quant": to("quantization.bnb_4bit_use_double_quant", flag),
        "bnb_config_kwargs.bnb_4bit_compute_dtype": to("quantization.bnb_4bit_compute_dtype"),
        "bnb_config_kwargs.*": lost("bitsandbytes' other options are not settings"),
        "quantize_moe_experts": unneeded("experts are always stored in 4 bits"),
        "model_quantization_config*": unneeded("FP8 and MXFP4 checkpoints are recognised"),
        "adapter": to("quantization.load_in_4bit", _adapter),
        "lora_model_dir": to("lora.adapter_path"),
        "lora_r": to("lora.r"),
        "lora_alpha": to("lora.lora_alpha"),
        "lora_dropout": to("lora.lora_dropout"),
        "lora_target_linear": to("lora.target_modules", _targets),
        "lora_target_modules": to("lora.target_modules", _targets),
        "lora_target_parameters": to("lora.target_parameters", lambda found: names(found.value)),
        "lora_modules_to_save": to("lora.modules_to_save", lambda found: names(found.value)),
        "lora_fan_in_fan_out": unneeded("the layer's type decides"),
        "peft_use_rslora": to("lora.use_rslora", flag),
        "peft_use_dora": to("lora.use_dora", flag),
        "peft_init_lora_weights": to(
            "lora.init_lora_weights",
            only({True: "default", "true": "default", "gaussian": "gaussian", "eva": "eva"},
                 "this initialisation is wrong on a 4-bit base, or is not available: default, gaussian, eva"),
        ),
        "lora_rank_pattern": lost("all layers have the rank lora.r"),
        "lora_alpha_pattern": lost("all layers have the scale lora.lora_alpha"),
        "peft_layers_to_transform": lost("give lora.target_modules a regular expression that names the layers"),
        "peft_layers_pattern": lost("give lora.target_modules a regular expression that names the layers"),
        "peft_layer_replication": lost("layers are not replicated"),
        "peft_trainable_token_indices": lost("model.new_tokens trains new tokens; others stay frozen"),
        "peft_*": unneeded("the adapter is trained in float32"),
        "peft.*": lost("LoftQ needs the 16-bit weights and replaces the 4-bit ones"),
        "loraplus_*": lost("both matrices of LoRA have the learning rate train.learning_rate"),
        "relora*": lost("the adapter is not merged and restarted while training"),
        "lisa_*": lost("whole layers are not trained: LoRA is"),
        "lora_*_kernel": to("train.fused_kernels", Unneeded(shared.FUSED)),
        "lora_on_cpu": unneeded("a merge reads the adapter from files"),
        "merge_lora": to("export.merge", flag),
        "sequence_len": to("data.max_length"),
        "eval_sequence_len": lost("data.max_length holds for held-out rows too"),
        "excess_length_strategy": to("data.overflow", _overflow),
        "sample_packing": to("data.packing", flag),
        "eval_sample_packing": unneeded("held-out rows are not packed"),
        "sample_packing_*": unneeded("data.packing has no options: best-fit, isolated documents"),
        "pad_to_sequence_len": unneeded("padding is never trained on, and not computed where that can be"),
        "pad_to_multiple_of": unneeded("padding is never trained on, and not computed where that can be"),
        "batch_flattening": to("train.padding_free", lambda _: True),
        "min_sample_len": lost("short rows are kept"),
        "train_on_inputs": to("data.train_on", _train_on, remark="`all` trains on the prompt too"),
        "group_by_length": to("train.group_by_length", flag),
        "val_set_size": to("data.eval", share_of_train, "a share, chosen by a hash of each row"),
        "shuffle_*": unneeded("rows are shuffled by run.seed"),
        "curriculum_sampling": lost("rows are shuffled by run.seed"),
        "dataset_prepared_path": to("data.cache_dir", Unneeded("tokenised rows are cached; data.cache_dir moves it")),
        "dataset_processes": to("data.num_proc"),
        "dataset_num_proc": to("data.num_proc"),
        "dataset_exact_deduplication": to("data.deduplicate", flag),
        "dataset_keep_in_memory": unneeded("rows are read from the cache as they are needed"),
        "dataset_shard_*": lost("data.max_rows takes a sample"),
        "skip_prepare_dataset": unneeded(shared.LOADER),
        "push_dataset_to_hub": lost("data sets are not uploaded"),
        "streaming": to("data.streaming", flag),
        "pretraining_dataset": to("data.train"),
        "chat_template": to("model.chat_template", chat_template),
        "chat_template_jinja": lost("save the template as a file and name it in model.chat_template"),
        "chat_template_kwargs": lost("rows have them in a column chat_template_kwargs"),
        "default_system_message": lost("rows have it in their system turn, or in a column system"),
        "eot_tokens": unneeded("the template's end-of-turn tokens are found and trained"),
        "special_tokens.*": to("model.new_tokens", Unneeded("the tokenizer's own special tokens are used")),
        "special_tokens": unneeded("the tokenizer's own special tokens are used"),
        "tokens": to("model.new_tokens", _tokens),
        "added_tokens_overrides": lost("model.new_tokens adds tokens; none is renamed"),
        "micro_batch_size": to("train.per_device_train_batch_size"),
        "eval_batch_size": to("train.per_device_eval_batch_size"),
        "batch_size": to("train.gradient_accumulation_steps", _accumulation, remark="rows of a step / of a micro-batch"),
        "num_epochs": to("train.num_train_epochs"),
        "optimizer": to("train.optim", optimizer),
        "optim_args": lost("the optimizers have no options here"),
        "lr_scheduler": to("train.lr_scheduler_type", schedule),
        "cosine_min_lr_ratio": lost("the cosine schedule ends at 0"),
        "cosine_constant_lr_ratio": lost("the cosine schedule ends at 0"),
        "lr_groups": lost("all trained weights have the learning rate train.learning_rate"),
        "embedding_lr*": lost("all trained weights have the learning rate train.learning_rate"),
        "bf16": to("quantization.bnb_4bit_compute_dtype", compute_dtype("bfloat16")),
        "bfloat16": to("quantization.bnb_4bit_compute_dtype", compute_dtype("bfloat16")),
        "fp16": to("quantization.bnb_4bit_compute_dtype", compute_dtype("float16")),
        "float16": to("quantization.bnb_4bit_compute_dtype", compute_dtype("float16")),
        "float32": to("quantization.bnb_4bit_compute_dtype", compute_dtype("float32")),
        "activation_offloading": to("train.activation_offloading", flag),
        "layer_offloading": lost("base layers stay on the GPU"),
        "gradient_checkpointing": to("train.gradient_checkpointing", checkpointing),
        "flash_attention": to("model.attn_implementation", flash_attention),
        "sdp_attention": to("model.attn_implementation", constant("sdpa")),
        "eager_attention": to("model.attn_implementation", constant("eager")),
        "attn_implementation": to("model.attn_implementation", attention),
        "xformers_attention": lost("model.attn_implementation: auto chooses sdpa"),
        "flex_attention": lost("model.attn_implementation: auto chooses sdpa"),
        "sage_attention": lost("model.attn_implementation: auto chooses sdpa"),
        "s2_attention": lost("model.attn_implementation: auto chooses sdpa"),
        "flash_attn_*": unneeded(shared.FUSED),
        "tiled_mlp*": unneeded("long rows are computed in chunks by themselves"),
        "chunked_cross_entropy*": unneeded("the loss is always computed in chunks"),
        "cut_cross_entropy": unneeded("the loss is always computed in chunks"),
        "plugins": unneeded(shared.FUSED),
        "liger_*": unneeded(shared.FUSED),
        "unsloth_*": unneeded(shared.FUSED),
        "evals_per_epoch": to("train.eval_steps", times_per_epoch, "a number of steps"),
        "saves_per_epoch": to("train.save_steps", times_per_epoch, "a number of steps"),
        "loss_watchdog_*": to("train.on_loss_spike", Lost("train.on_loss_spike: stop judges by the last steps")),
        "wandb_project": to("run.report_to", lambda _: Settings({"run.report_to": ["wandb"]}, "set WANDB_PROJECT")),
        "use_wandb": to("run.report_to", constant(["wandb"])),
        "use_mlflow": to("run.report_to", constant(["mlflow"])),
        "use_tensorboard": to("run.report_to", constant(["tensorboard"])),
        "use_trackio": to("run.report_to", constant(["trackio"])),
        "use_comet": lost("the trackers are tensorboard, wandb, mlflow and trackio"),
        "comet_*": lost("the trackers are tensorboard, wandb, mlflow and trackio"),
        "wandb_*": lost("set the variables of wandb, such as WANDB_PROJECT and WANDB_NAME"),
        "mlflow_*": lost("set the variables of mlflow, such as MLFLOW_TRACKING_URI"),
        "trackio_*": lost("set the variables of trackio, such as TRACKIO_SPACE_ID"),
        "auto_resume_from_checkpoints": unneeded(shared.RESUMES),
        "rl": to("train.objective", _objective),
        "rl_beta": to("train.beta"),
        "dpo_beta": to("train.beta"),
        "dpo_loss_type": to("train.objective", trl_loss),
        "dpo_label_smoothing": to("train.label_smoothing", if_positive, remark="for robust, exo_pair, simpo and cpo"),
        "precompute_ref_log_probs": unneeded("reference log-probabilities are computed once and stored"),
        "dpo_loss_weights": to("train.sft_weight", Unneeded("dpo_loss_type is read with them")),
        "dpo_*": unneeded("train.objective has no other options"),
        "orpo_alpha": to("train.beta", where("rl", ["orpo"])),
        "simpo_gamma": to("train.simpo_gamma", where("rl", ["simpo"])),
        "cpo_alpha": to("train.sft_weight", where("rl", ["simpo"])),
        "rpo_alpha": to("train.sft_weight", where("rl", ["dpo", "ipo"])),
        "kto_desirable_weight": to("train.desirable_weight", where("rl", ["kto"])),
        "kto_undesirable_weight": to("train.undesirable_weight", where("rl", ["kto"])),
        "trl": to("train.objective", remark="dpo and the like; its beta is train.beta"),
        "trl.beta": to("train.beta"),
        "trl.*": lost(GRPO),
        "vllm.*": lost(GRPO),
        "vllm_*": lost(GRPO),
        "ebft.*": lost(GRPO),
        "reward_model": lost("reward models are not trained"),
        "process_reward_model": lost("reward models are not trained"),
        "num_labels": lost("classifiers are not trained"),
        "qat.*": lost("quantization-aware training is not available: the base stays in 4 bits"),
        "quantization.*": lost("qlora-train export --format gguf --quant quantizes a finished run"),
        "context_parallel_size": lost(shared.NO_CONTEXT_PARALLEL),
        "sequence_parallel_degree": lost(shared.NO_CONTEXT_PARALLEL),
        "heads_k_stride": lost(shared.NO_CONTEXT_PARALLEL),
        "tensor_parallel_size": lost(shared.NO_TENSOR_PARALLEL),
        "dp_shard_size": to("parallel.strategy", lambda found: "fsdp" if (number(found.value) or 0) > 1 else "auto"),
        "dp_replicate_size": to("parallel.strategy", Unneeded("parallel.processes is the number of GPUs")),
        "world_size": to("parallel.processes"),
        "device_map": unneeded("parallel.strategy divides the work"),
        "max_memory": unneeded("memory is probed before the first step"),
        "gpu_memory_limit": unneeded("memory is probed before the first step"),
        "use_ray": lost("a cluster of Ray is used by: qlora-train ray CONFIG"),
        "ray_*": lost("a cluster of Ray is used by: qlora-train ray CONFIG"),
        "unfrozen_parameters": to("lora.modules_to_save", Lost("lora.modules_to_save trains whole modules")),
        "use_kernels": unneeded(shared.FUSED),
        "fused_attn_kernel": unneeded(shared.FUSED),
        "experimental_skip_move_to_device": unneeded("weights are always loaded shard by shard"),
        "experts_implementation": unneeded("experts are always stored in 4 bits and computed in groups"),
        "use_scattermoe": unneeded("experts are always stored in 4 bits and computed in groups"),
        "use_sonicmoe": unneeded("experts are always stored in 4 bits and computed in groups"),
        "llama4_linearized_experts": unneeded("experts are always stored in 4 bits and computed in groups"),
        "expert_parallel_size": lost(shared.NO_TENSOR_PARALLEL),
        "resize_token_embeddings_to_32x": unneeded("model.new_tokens makes room for its tokens"),
        "use_swanlab": lost("the trackers are tensorboard, wandb, mlflow and trackio"),
        "swanlab_*": lost("the trackers are tensorboard, wandb, mlflow and trackio"),
        "debug": unneeded("qlora-train data CONFIG shows rows and their loss mask"),
    } | dict(shared.TRAINING_ARGUMENTS) | dict(shared.LAUNCHER),
)  # fmt: skip
