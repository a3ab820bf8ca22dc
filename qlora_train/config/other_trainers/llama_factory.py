"""LLaMA-Factory's YAML (its `hparams` and Transformers' `TrainingArguments`), with its `dataset_info.json`."""

from typing import Any

from qlora_train.config.other_trainers import transformers_arguments as shared
from qlora_train.config.other_trainers.dataset_info import data_sets
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
    constant,
    flag,
    if_positive,
    is_on,
    names,
    number,
    objective,
    only,
    share_of_train,
    trl_loss,
    where,
)

ROPE = "model.rope_scaling is a mapping, such as {rope_type: yarn, factor: 2}"
MIXTURE = "weight is how often an epoch sees each row, num_rows how many rows it sees"
SWANLAB = "the trackers are tensorboard, wandb, mlflow and trackio"
WHOLE_WEIGHTS = "it trains whole weights; here the adapter is trained"
IMAGES = "images, audio and video are not trained on"


def _stage(found: Found) -> Any:
    if str(found.value).lower() == "pt":
        return Settings({"train.objective": "sft"}, "continued pre-training is sft on rows of the format text")
    if str(found.value).lower() == "dpo" and "pref_loss" in found.config:
        return Unneeded("pref_loss decides")
    return objective({"sft": "sft", "dpo": "dpo", "kto": "kto"})(found)


def _pref_loss(found: Found) -> Any:
    if str(found.config.get("stage", "")).lower() != "dpo":
        return Unneeded("it has no effect there without stage: dpo")
    name = str(found.value).lower()
    return "orpo" if name == "orpo" else trl_loss(found)


def _for_pairs(found: Found) -> Any:
    if str(found.config.get("stage", "")).lower() != "dpo":
        return Unneeded("it has no effect there without stage: dpo")
    return number(found.value)


def _sft_weight(found: Found) -> Any:
    if str(found.config.get("stage", "")).lower() == "kto" and number(found.value):
        return Lost("train.sft_weight is for pairs: no other loss is added to kto")
    weight = _for_pairs(found)
    if isinstance(weight, Unneeded) or not isinstance(weight, int | float):
        return weight
    if str(found.config.get("pref_loss", "")).lower() == "orpo":  # which has the term already
        weight += 1
    return Settings(
        {"train.sft_weight": weight}, "a mean over the tokens of a step; there one over pairs of their means"
    )


def _bits(found: Found) -> Any:
    bits = number(found.value)
    if bits == 4:
        return True
    note = f"4 bits instead of {bits}; quantization.load_in_4bit: false is 16-bit LoRA"
    return Settings({"quantization.load_in_4bit": True}, note)


def _targets(found: Found) -> Any:
    found_names = names(found.value)
    return "all-linear" if found_names == ["all"] else found_names


def _default_alpha(config: dict[str, Any]) -> Any:
    rank = number(config.get("lora_rank", 8))
    return 2 * rank if isinstance(rank, int) else 16


def _packing(found: Found) -> Any:
    if is_on(found.value):
        note = (
            "" if is_on(found.config.get("neat_packing")) else "documents do not see each other, as with neat_packing"
        )
        return Settings({"data.packing": True}, note)
    return False


LLAMA_FACTORY = OtherTrainer(
    name="llamafactory",
    title="LLaMA-Factory",
    programs=("llamafactory-cli", "lmf"),
    defaults=shared.TRAINING_DEFAULTS | {
        "lora.r": 8, "lora.lora_alpha": _default_alpha, "quantization.load_in_4bit": False, "data.overflow": "truncate",
    },
    keys=dict(shared.TRAINING_ARGUMENTS) | dict(shared.LAUNCHER) | {
        "model_name_or_path": to("model.model_name_or_path"),
        "model_revision": to("model.revision"),
        "adapter_name_or_path": to("lora.adapter_path"),
        "adapter_folder": to("lora.adapter_path"),
        "trust_remote_code": to("model.trust_remote_code", flag, "a Hub model needs model.revision too"),
        "cache_dir": lost("set the variable HF_HOME"),
        "use_fast_tokenizer": unneeded("tokenizer.json is used"),
        "resize_vocab": unneeded("model.new_tokens makes room for its tokens"),
        "add_tokens": to("model.new_tokens", lambda found: names(found.value)),
        "add_special_tokens": to("model.new_tokens", lambda found: names(found.value)),
        "new_special_tokens_config": lost("embeddings of model.new_tokens start at the mean of all others"),
        "init_special_tokens": lost("embeddings of model.new_tokens start at the mean of all others"),
        "split_special_tokens": lost("a row with a special token as text is refused"),
        "low_cpu_mem_usage": unneeded("weights are always loaded shard by shard"),
        "rope_scaling": to("model.rope_scaling", Lost(ROPE)),
        "flash_attn": to("model.attn_implementation", attention),
        "shift_attn": lost("LongLoRA's shifted attention is not available"),
        "mixture_of_depths": lost("the base model is trained as it is"),
        "use_unsloth": unneeded(shared.FUSED),
        "use_unsloth_gc": to("train.activation_offloading", constant(True)),
        "enable_liger_kernel": unneeded(shared.FUSED),
        "moe_aux_loss_coef": to("train.router_aux_loss_coef", if_positive),
        "disable_gradient_checkpointing": to("train.gradient_checkpointing", constant("none")),
        "use_reentrant_gc": unneeded("activation checkpointing is always non-reentrant"),
        "upcast_*": unneeded("norms and the loss are computed in float32 where that matters"),
        "pure_bf16": unneeded("the adapter is trained in float32"),
        "train_from_scratch": lost("a pre-trained base is fine-tuned"),
        "compute_dtype": to("quantization.bnb_4bit_compute_dtype"),
        "model_max_length": to("data.max_length"),
        "quantization_bit": to("quantization.load_in_4bit", _bits, remark="4 bits is true"),
        "quantization_type": to("quantization.bnb_4bit_quant_type"),
        "double_quantization": to("quantization.bnb_4bit_use_double_quant", flag),
        "quantization_method": to("quantization.load_in_4bit", only(
            {name: Unneeded("bitsandbytes is what stores 4 bits") for name in ("bnb", "bitsandbytes")},
            "the base is stored by bitsandbytes' NF4")),
        "quantization_device_map": unneeded("parallel.strategy divides the work"),
        "stage": to("train.objective", _stage),
        "finetuning_type": to("lora.r", only(
            {"lora": Unneeded("LoRA is what is trained")},
            "LoRA is trained: set lora.r and train.learning_rate for it", todo=True)),
        "lora_rank": to("lora.r"),
        "lora_alpha": to("lora.lora_alpha"),
        "lora_dropout": to("lora.lora_dropout"),
        "lora_target": to("lora.target_modules", _targets, remark="`all` is all-linear"),
        "additional_target": to("lora.modules_to_save", lambda found: names(found.value)),
        "use_rslora": to("lora.use_rslora", flag),
        "use_dora": to("lora.use_dora", flag),
        "loraplus_*": lost("both matrices of LoRA have the learning rate train.learning_rate"),
        "pissa_*": lost("PiSSA changes the base weights, which are already rounded to 4 bits"),
        "create_new_adapter": lost("lora.adapter_path is trained further; to add one to it, merge it first"),
        "module_dropout": lost("OFT is not available: LoRA is trained"),
        "oft_*": lost("OFT is not available: LoRA is trained"),
        "freeze_vision_tower": unneeded("of a multimodal model the language model is trained"),
        "freeze_multi_modal_projector": unneeded("of a multimodal model the language model is trained"),
        "freeze_*": lost(WHOLE_WEIGHTS),
        "use_llama_pro": lost(WHOLE_WEIGHTS),
        "use_galore": lost(WHOLE_WEIGHTS),
        "galore_*": lost(WHOLE_WEIGHTS),
        "use_apollo": lost(WHOLE_WEIGHTS),
        "apollo_*": lost(WHOLE_WEIGHTS),
        "use_badam": lost(WHOLE_WEIGHTS),
        "badam_*": lost(WHOLE_WEIGHTS),
        "use_adam_mini": lost("train.optim has the optimizers that are available"),
        "use_muon": lost("train.optim has the optimizers that are available"),
        "use_mca": lost(shared.NO_TENSOR_PARALLEL),
        "use_hyper_parallel": lost(shared.NO_CONTEXT_PARALLEL),
        "use_dft_loss": lost("the loss is the mean negative log-likelihood of the label tokens"),
        "use_asft_loss": lost("the loss is the mean negative log-likelihood of the label tokens"),
        "use_eaft_loss": lost("the loss is the mean negative log-likelihood of the label tokens"),
        "asft_alpha": lost("the loss is the mean negative log-likelihood of the label tokens"),
        "eaft_alpha": lost("the loss is the mean negative log-likelihood of the label tokens"),
        "pref_beta": to("train.beta", where("stage", ["dpo", "kto"])),
        "pref_loss": to("train.objective", _pref_loss, remark="sigmoid is dpo"),
        "pref_ftx": to("train.sft_weight", _sft_weight),
        "pref_bco_weight": lost("no other loss is added to a preference objective"),
        "dpo_label_smoothing": to("train.label_smoothing", if_positive, remark="for robust, exo_pair, simpo and cpo"),
        "ld_alpha": lost("train.objective has no other options"),
        "kto_chosen_weight": to("train.desirable_weight", where("stage", ["kto"])),
        "kto_rejected_weight": to("train.undesirable_weight", where("stage", ["kto"])),
        "simpo_gamma": to("train.simpo_gamma", _for_pairs),
        "ppo_*": lost(shared.NO_ONLINE),
        "ref_model*": lost("the reference model is the base, or the adapter of lora.adapter_path"),
        "reward_model*": lost("reward models are not trained"),
        "template": to("model.chat_template", chat_template),
        "dataset": to("data.train", data_sets("data.train")),
        "eval_dataset": to("data.eval", data_sets("data.eval")),
        "dataset_dir": to("data.train", Unneeded("data.train has the path of each file")),
        "tokenized_path": to("data.cache_dir", Unneeded("tokenised rows are cached; data.cache_dir moves it")),
        "media_dir": lost(IMAGES),
        "image_*": lost(IMAGES),
        "video_*": lost(IMAGES),
        "audio_*": lost(IMAGES),
        "cutoff_len": to("data.max_length"),
        "train_on_prompt": to("data.train_on", constant("all")),
        "mask_history": to("data.train_on", constant("last")),
        "streaming": to("data.streaming", flag),
        "buffer_size": unneeded("streamed rows are shuffled within a window of the file"),
        "mix_strategy": to("data.train", only(
            {"concat": Unneeded("data sets are concatenated and shuffled")},
            "weight or num_rows of each source mixes data sets")),
        "interleave_probs": to("data.train[].weight", Lost(MIXTURE)),
        "overwrite_cache": unneeded("the cache knows when rows, tokenizer or settings change"),
        "preprocessing_num_workers": to("data.num_proc"),
        "preprocessing_batch_size": unneeded("rows are tokenised in chunks of a megabyte"),
        "max_samples": to("data.max_rows", note="of all data sets together, not of each"),
        "ignore_pad_token_for_loss": unneeded("padding is never trained on"),
        "val_size": to("data.eval", share_of_train, "a share, chosen by a hash of each row"),
        "eval_on_each_dataset": lost("held-out rows have one loss"),
        "packing": to("data.packing", _packing),
        "neat_packing": to("data.packing", constant(True)),
        "block_diag_attn": unneeded("packed documents are always isolated"),
        "tool_format": unneeded("the chat template writes tools"),
        "default_system": lost("rows have it in their system turn, or in a column system"),
        "enable_thinking": lost("rows have it in a column chat_template_kwargs: {enable_thinking: false}"),
        "preserve_thinking": unneeded("the chat template decides which reasoning it writes"),
        "data_shared_file_system": unneeded("one process tokenises, the others read its cache"),
        "disable_shuffling": lost("rows are shuffled by run.seed"),
        "early_stopping_steps": to("train.early_stopping_patience", if_positive, remark="in evaluations"),
        "plot_loss": unneeded("report.html draws it"),
        "compute_accuracy": lost("answers are compared by: qlora-train eval RUN"),
        "include_effective_tokens_per_second": unneeded("tokens per second are in the log"),
        "predict_with_generate": lost("answers are generated by: qlora-train eval RUN"),
        "use_swanlab": lost(SWANLAB),
        "swanlab_*": lost(SWANLAB),
        "ray_*": lost("a cluster of Ray is used by: qlora-train ray CONFIG"),
        "enable_torch_profiler": lost("no profile is recorded"),
        "profile*": lost("no profile is recorded"),
        "export_dir": to("export.merge", constant(True)),
        "export_size": to("export.max_shard_size", lambda found: f"{number(found.value)}GB"),
        "export_*": lost("a finished run is written by: qlora-train merge RUN, qlora-train export RUN"),
        "infer_*": unneeded("it has no effect while training"),
        "vllm_*": unneeded("it has no effect while training"),
        "sglang_*": unneeded("it has no effect while training"),
        "kt_*": lost("experts stay on the GPU"),
        "use_kt": lost("experts stay on the GPU"),
        "do_sample": unneeded("it has no effect while training"),
        "temperature": unneeded("it has no effect while training"),
        "top_p": unneeded("it has no effect while training"),
        "top_k": unneeded("it has no effect while training"),
        "max_new_tokens": unneeded("it has no effect while training"),
        "ddp_timeout": unneeded("parallel.strategy has no options"),
        "ms_hub_token": lost("models and data come from the Hugging Face Hub, or from files"),
        "om_hub_token": lost("models and data come from the Hugging Face Hub, or from files"),
    },
)  # fmt: skip
