"""ms-swift's arguments (`swift sft`, `swift pt`, `swift rlhf`), as YAML or a command line."""

from collections.abc import Callable, Mapping
from typing import Any

from qlora_train.config.other_trainers import transformers_arguments as shared
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
from qlora_train.config.other_trainers.ms_swift_datasets import columns, sources
from qlora_train.config.other_trainers.value_conversions import (
    attention,
    chat_template,
    flag,
    if_positive,
    is_on,
    names,
    number,
    objective,
    only,
    optimizer,
    share_of_train,
    trl_loss,
    where,
)

IMAGES = "images, audio and video are not trained on"
WHOLE_WEIGHTS = "it trains whole weights; here the adapter is trained"
OTHER_TUNER = "only LoRA is trained"
ROPE = "model.rope_scaling is a mapping, such as {rope_type: yarn, factor: 2}"
SWANLAB = "the trackers are tensorboard, wandb, mlflow and trackio"
MIXTURE = "weight is how often an epoch sees each row, num_rows how many rows it sees"
OVERFLOWS = {"delete": "drop", "left": "keep_end", "right": "truncate", "split": "split"}
AFTER = "it has no effect while training"


def _tuner(found: Found) -> Any:
    if str(found.value).lower() == "lora":
        return Unneeded("LoRA is what is trained")
    return Lost("LoRA is trained: set lora.r and train.learning_rate for it", todo=True)


def _bits(found: Found) -> Any:
    if number(found.value) == 4:
        return True
    note = f"4 bits instead of {found.value}; quantization.load_in_4bit: false is 16-bit LoRA"
    return Settings({"quantization.load_in_4bit": True}, note)


def _targets(found: Found) -> Any:
    modules = names(found.value)
    return "all-linear" if modules == ["all-linear"] else modules


def _loss_scale(found: Found) -> Any:
    """Return the base strategy; the weights of spans that follow `+` are not available."""
    words = str(found.value).split("+")
    base = next((word for word in words if word in ("default", "last_round", "all")), "default")
    trained = {"default": "assistant", "last_round": "last", "all": "all"}[base]
    extra = [word for word in words if word not in ("default", "last_round", "all", "ignore_empty_think")]
    note = f"every trained token has weight 1, without {', '.join(extra)}" if extra else ""
    return Settings({"data.train_on": trained}, note)


def _accumulation_of_16(config: dict[str, Any]) -> int:
    micro = number(config.get("per_device_train_batch_size", 1))
    return max(1, -(-16 // micro)) if isinstance(micro, int) and micro > 0 else 16


def _swift_loss(found: Found) -> Any:
    kind = found.config.get("rlhf_type")
    if kind is None:
        return Lost("the loss of label tokens is their cross-entropy")
    if kind == "dpo":
        return trl_loss(found)
    return Unneeded("rlhf_type decides") if found.value in ("sigmoid", kind) else Lost("rlhf_type has no other losses")


def _rlhf_type(found: Found) -> Any:
    if found.value == "dpo" and found.config.get("loss_type"):
        return Unneeded("loss_type decides")
    return objective({"dpo": "dpo", "simpo": "simpo", "cpo": "cpo", "orpo": "orpo", "kto": "kto"})(found)


def _default_for_simpo(value: float) -> Callable[[Mapping[str, Any]], float | None]:
    return lambda config: value if config.get("rlhf_type") == "simpo" else None


MS_SWIFT = OtherTrainer(
    name="ms-swift",
    title="ms-swift",
    programs=("swift", "swift/cli/sft.py", "swift/cli/pt.py", "swift/cli/rlhf.py"),
    defaults=shared.TRAINING_DEFAULTS | {
        "train.per_device_train_batch_size": 1, "train.gradient_accumulation_steps": _accumulation_of_16,
        "train.learning_rate": 1e-4, "train.weight_decay": 0.1, "train.adam_beta2": 0.95,
        "train.lr_scheduler_type": "cosine", "lora.r": 8, "lora.lora_alpha": 32, "lora.lora_dropout": 0.05,
        "quantization.load_in_4bit": False, "train.beta": _default_for_simpo(2.0),
        "train.simpo_gamma": _default_for_simpo(1.0), "train.sft_weight": _default_for_simpo(1.0),
    },
    keys=dict(shared.TRAINING_ARGUMENTS) | dict(shared.LAUNCHER) | {
        "model": to("model.model_name_or_path"),
        "model_id_or_path": to("model.model_name_or_path"),
        "model_type": unneeded("config.json names the architecture"),
        "model_revision": to("model.revision"),
        "torch_dtype": to("quantization.bnb_4bit_compute_dtype"),
        "attn_impl": to("model.attn_implementation", attention),
        "experts_impl": unneeded("experts are always stored in 4 bits and computed in groups"),
        "new_special_tokens": to("model.new_tokens", lambda found: names(found.value)),
        "rope_scaling": to("model.rope_scaling", Lost(ROPE)),
        "max_model_len": lost("data.max_length is the limit of a row"),
        "device_map": unneeded("parallel.strategy divides the work"),
        "max_memory": unneeded("memory is probed before the first step"),
        "task_type": to("train.objective", only({"causal_lm": "sft"}, "a causal language model is trained", todo=True)),
        "num_labels": lost("classifiers are not trained"),
        "problem_type": lost("classifiers are not trained"),
        "model_kwargs": lost("config.json of the base model is used as it is"),
        "use_hf": to("model.model_name_or_path", lambda found: (
            Unneeded("models and data come from the Hugging Face Hub") if is_on(found.value) else
            Lost("a name on ModelScope may be another model on the Hugging Face Hub: check it"))),
        "template": to("model.chat_template", chat_template),
        "template_backend": unneeded("the tokenizer's own Jinja template is used"),
        "use_chat_template": to("model.chat_template", lambda found: (
            Unneeded("rows with turns use the chat template") if is_on(found.value) else
            Lost("rows of the formats text and prompt_completion are trained without a template"))),
        "system": lost("rows have it in their system turn, or in a column system"),
        "agent_template": unneeded("the chat template writes tools"),
        "max_length": to("data.max_length"),
        "truncation_strategy": to("data.overflow", only(OVERFLOWS, "not a choice here")),
        "loss_scale": to("data.train_on", _loss_scale, remark="default is assistant, last_round is last"),
        "is_binary_loss_scale": unneeded("every trained token has weight 1"),
        "padding_free": to("train.padding_free", lambda found: (
            True if is_on(found.value) else Unneeded("it is used where it saves work and a check passes"))),
        "padding_side": unneeded("padding is never trained on"),
        "response_prefix": unneeded("an answer begins at the end of the template's generation prompt"),
        "enable_thinking": lost("rows have it in a column chat_template_kwargs: {enable_thinking: false}"),
        "preserve_thinking": unneeded("the chat template decides which reasoning it writes"),
        "add_non_thinking_prefix": unneeded("the chat template decides which reasoning it writes"),
        "max_pixels": lost(IMAGES),
        "norm_bbox": lost(IMAGES),
        "dataset": to("data.train", sources("data.train")),
        "val_dataset": to("data.eval", sources("data.eval")),
        "cached_dataset": lost("tokenised rows of ms-swift are not read; give the rows"),
        "cached_val_dataset": lost("tokenised rows of ms-swift are not read; give the rows"),
        "split_dataset_ratio": to("data.eval", share_of_train, "a share, chosen by a hash of each row"),
        "dataset_num_proc": to("data.num_proc"),
        "columns": to("data.columns", columns),
        "streaming": to("data.streaming", flag),
        "interleave_prob": to("data.train[].weight", Lost(MIXTURE)),
        "stopping_strategy": unneeded("weight and num_rows of each source mix data sets"),
        "shuffle_buffer_size": unneeded("streamed rows are shuffled within a window of the file"),
        "dataset_shuffle": unneeded("rows are shuffled by run.seed"),
        "val_dataset_shuffle": unneeded("held-out rows have no order"),
        "train_dataloader_shuffle": unneeded("rows are shuffled by run.seed"),
        "load_from_cache_file": unneeded("the cache knows when rows, tokenizer or settings change"),
        "download_mode": unneeded("the cache knows when rows, tokenizer or settings change"),
        "strict": to("data.max_dropped", lambda found: (
            0.0 if is_on(found.value) else Unneeded("a run stops if more than 1 % of the rows cannot be used"))),
        "disable_auto_column_mapping": unneeded("data.format and data.columns say what a file has"),
        "custom_dataset_info": lost("give path, format and columns of each source"),
        "custom_register_path": lost("code of your own is not run"),
        "external_plugins": lost("code of your own is not run"),
        "lazy_tokenize": unneeded("data.streaming tokenises while training"),
        "packing": to("data.packing", flag),
        "packing_length": lost("data.max_length is the length of a pack"),
        "packing_num_proc": to("data.num_proc"),
        "packing_strategy": unneeded("documents are packed by best-fit decreasing, and isolated"),
        "model_name": lost("rows are trained as they are"),
        "model_author": lost("rows are trained as they are"),
        "tuner_type": to("lora.r", _tuner),
        "train_type": to("lora.r", _tuner),
        "sft_type": to("lora.r", _tuner),
        "tuner_backend": unneeded("PEFT's layers are trained by fused kernels"),
        "use_swift_lora": unneeded("PEFT's layers are trained by fused kernels"),
        "adapters": to("lora.adapter_path", lambda found: (names(found.value) or [""])[0]),
        "target_modules": to("lora.target_modules", _targets),
        "target_regex": to("lora.target_modules", remark="a regular expression on full names"),
        "target_parameters": to("lora.target_parameters", lambda found: names(found.value)),
        "modules_to_save": to("lora.modules_to_save", lambda found: names(found.value)),
        "lora_rank": to("lora.r"),
        "lora_alpha": to("lora.lora_alpha"),
        "lora_dropout": to("lora.lora_dropout"),
        "lora_bias": to("lora.bias"),
        "lora_dtype": unneeded("the adapter is trained in float32"),
        "lorap_lr_ratio": lost("both matrices of LoRA have the learning rate train.learning_rate"),
        "use_rslora": to("lora.use_rslora", flag),
        "use_dora": to("lora.use_dora", flag),
        "init_weights": to("lora.init_lora_weights", only(
            {"true": "default", True: "default", "gaussian": "gaussian", "eva": "eva"},
            "this initialisation is wrong on a 4-bit base, or is not available: default, gaussian, eva")),
        "lora_ga_*": lost("lora.init_lora_weights: default, gaussian, eva"),
        "freeze_vit": unneeded("of a multimodal model the language model is trained"),
        "freeze_aligner": unneeded("of a multimodal model the language model is trained"),
        "freeze_llm": lost(IMAGES),
        "freeze_*": lost(WHOLE_WEIGHTS),
        "trainable_*": lost(WHOLE_WEIGHTS),
        "vit_*": lost(IMAGES),
        "aligner_lr": lost(IMAGES),
        "use_galore": lost(WHOLE_WEIGHTS),
        "galore_*": lost(WHOLE_WEIGHTS),
        "lisa_*": lost(WHOLE_WEIGHTS),
        "llamapro_*": lost(WHOLE_WEIGHTS),
        "adalora_*": lost(OTHER_TUNER),
        "adapter_act": lost(OTHER_TUNER),
        "adapter_length": lost(OTHER_TUNER),
        "boft_*": lost(OTHER_TUNER),
        "vera_*": lost(OTHER_TUNER),
        "fourier_*": lost(OTHER_TUNER),
        "reft_*": lost(OTHER_TUNER),
        "quant_method": to("quantization.load_in_4bit", only(
            {"bnb": Unneeded("bitsandbytes is what stores 4 bits")}, "the base is stored by bitsandbytes' NF4")),
        "quant_bits": to("quantization.load_in_4bit", _bits, remark="4 is true"),
        "bnb_4bit_compute_dtype": to("quantization.bnb_4bit_compute_dtype"),
        "bnb_4bit_quant_type": to("quantization.bnb_4bit_quant_type"),
        "bnb_4bit_use_double_quant": to("quantization.bnb_4bit_use_double_quant", flag),
        "bnb_4bit_quant_storage": unneeded("4-bit weights are stored as bytes, which FSDP shards correctly"),
        "hqq_axis": lost("the base is stored by bitsandbytes' NF4"),
        "optimizer": to("train.optim", optimizer),
        "acc_strategy": unneeded("accuracy is measured by: qlora-train eval RUN"),
        "enable_dft_loss": lost("the loss is the mean negative log-likelihood of the label tokens"),
        "enable_channel_loss": lost("metrics.jsonl has one loss per step"),
        "loss_type": to("train.objective", _swift_loss, remark="sigmoid is dpo"),
        "max_epochs": to("train.num_train_epochs", note="of a streamed run, train.max_steps is the end"),
        "early_stop_interval": to("train.early_stopping_patience", if_positive, remark="in evaluations"),
        "use_logits_to_keep": unneeded("logits are computed for label tokens only, in chunks"),
        "check_model": unneeded("the bytes of the base are checked"),
        "add_version": unneeded("run.output_dir is the run folder itself"),
        "create_checkpoint_symlink": unneeded("checkpoints are named in the run folder"),
        "safe_serialization": unneeded("everything is saved as safetensors"),
        "max_shard_size": to("export.max_shard_size"),
        "merge_lora": to("export.merge", flag),
        "resume_only_model": unneeded(shared.RESUMES),
        "load_args": unneeded(AFTER),
        "load_data_args": unneeded(AFTER),
        "ignore_args_error": unneeded("unknown keys are always refused"),
        "eval_use_evalscope": lost("answers are compared by: qlora-train eval RUN"),
        "eval_*": lost("answers are compared by: qlora-train eval RUN"),
        "callbacks": lost("code of your own is not run"),
        "max_new_tokens": unneeded(AFTER),
        "temperature": unneeded(AFTER),
        "top_k": unneeded(AFTER),
        "top_p": unneeded(AFTER),
        "num_beams": unneeded(AFTER),
        "repetition_penalty": unneeded(AFTER),
        "stream": unneeded(AFTER),
        "stop_words": unneeded(AFTER),
        "infer_backend": unneeded(AFTER),
        "swanlab_*": lost(SWANLAB),
        "rlhf_type": to("train.objective", _rlhf_type),
        "loss_weights": to("train.sft_weight", Unneeded("loss_type is read with them")),
        "beta": to("train.beta"),
        "label_smoothing": to("train.label_smoothing", if_positive, remark="for robust, exo_pair, simpo and cpo"),
        "rpo_alpha": to("train.sft_weight", where("rlhf_type", ["dpo"])),
        "ld_alpha": lost("train.objective has no other options"),
        "simpo_gamma": to("train.simpo_gamma", where("rlhf_type", ["simpo"])),
        "cpo_alpha": to("train.sft_weight", where("rlhf_type", ["cpo", "simpo"])),
        "desirable_weight": to("train.desirable_weight", where("rlhf_type", ["kto"])),
        "undesirable_weight": to("train.undesirable_weight", where("rlhf_type", ["kto"])),
        "ref_*": lost("the reference model is the base, or the adapter of lora.adapter_path"),
        "reward_*": lost(shared.NO_ONLINE),
        "teacher_*": lost("no teacher is distilled"),
        "num_generations": lost(shared.NO_ONLINE),
        "max_completion_length": lost(shared.NO_ONLINE),
        "use_vllm": lost(shared.NO_ONLINE),
        "log_completions": lost(shared.NO_ONLINE),
        "num_iterations": lost(shared.NO_ONLINE),
        "epsilon*": lost(shared.NO_ONLINE),
        "sleep_level": lost(shared.NO_ONLINE),
        "offload_model": lost(shared.NO_ONLINE),
        "offload_optimizer": lost(shared.NO_ONLINE),
        "lmbda": lost("no teacher is distilled"),
        "label_names": unneeded("labels are made of the rows' answers"),
        "*MAX_PIXELS": lost(IMAGES),
        "FPS*": lost(IMAGES),
        "vllm_*": lost(shared.NO_ONLINE),
        "sequence_parallel_size": lost(shared.NO_CONTEXT_PARALLEL),
        "zero_hpz_partition_size": lost(shared.NO_DEEPSPEED),
        "deepspeed_autotp_size": lost(shared.NO_TENSOR_PARALLEL),
        "ENV.NPROC_PER_NODE": to("parallel.processes"),
        "ENV.CUDA_VISIBLE_DEVICES": unneeded("set it in the environment, as there"),
        "ENV.*": lost("set it in the environment"),
    },
)  # fmt: skip
