"""Unsloth's command line: `unsloth train`, whose YAML has sections, and the older script `unsloth-cli.py`."""

from typing import Any

from qlora_train.config.other_trainers import transformers_arguments as shared
from qlora_train.config.other_trainers.key_mapping import (
    Found,
    KeyMapping,
    Lost,
    OtherTrainer,
    Settings,
    Unneeded,
    lost,
    to,
    unneeded,
)
from qlora_train.config.other_trainers.value_conversions import (
    checkpointing,
    constant,
    dtype,
    flag,
    if_positive,
    is_on,
    names,
    number,
    only,
    optimizer,
    schedule,
    trackers,
    warmup_share,
)

FORMATS = {
    "alpaca": "alpaca", "chatml": "messages", "conversational": "messages", "sharegpt": "conversations", "raw": "text",
    "auto": "auto",
}  # fmt: skip
VISION = "of a multimodal model the language model is trained"
SECRET = "secrets come from the environment only: set HF_TOKEN, WANDB_API_KEY"
SECTIONED = {
    "data": ("dataset", "local_dataset", "format_type"),
    "training": (
        "training_type", "max_seq_length", "load_in_4bit", "output_dir", "num_epochs", "learning_rate", "batch_size",
        "gradient_accumulation_steps", "warmup_steps", "warmup_ratio", "max_steps", "save_steps", "weight_decay",
        "random_seed", "packing",
        "train_on_completions", "gradient_checkpointing", "optim", "lr_scheduler_type",
    ),
    "lora": (
        "lora_r", "lora_alpha", "lora_dropout", "target_modules", "vision_all_linear", "use_rslora", "use_loftq",
        "use_dora", "finetune_vision_layers", "finetune_language_layers", "finetune_attention_modules",
        "finetune_mlp_modules",
    ),
    "logging": (
        "enable_wandb", "wandb_project", "wandb_token", "enable_tensorboard", "tensorboard_dir", "hf_token",
        "log_frequency",
    ),
}  # fmt: skip
"""Sections of its YAML; on the command line their keys stand alone."""


def _training_type(found: Found) -> Any:
    if str(found.value).lower() == "lora":
        return Unneeded("LoRA is what is trained")
    return Lost("LoRA is trained, not whole weights: set lora.r and train.learning_rate for it", todo=True)


def _train_on(found: Found) -> Any:
    return "assistant" if is_on(found.value) else "all"


def _modules(found: Found) -> Any:
    found_names = names(found.value)
    every = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    return "all-linear" if set(found_names) == every else found_names


def _quantization(found: Found) -> Any:
    methods = ", ".join(names(found.value))
    return Lost(f"a finished run is exported by: qlora-train export RUN --format gguf --quant {methods or 'f16'}")


def _epochs(found: Found) -> Any:
    value = number(found.value)
    return value if value else Unneeded("max_steps decides there")


def _is_script(config: dict[str, Any]) -> bool:
    return "model_name" in config


KEYS: dict[str, KeyMapping] = {
    "model": to("model.model_name_or_path"),
    "model_name": to("model.model_name_or_path"),
    "training": to("train"),
    "logging": to("run", remark="report_to is its trackers"),
    "dataset": to("data.train[0].path"),
    "local_dataset": to("data.train", lambda found: [{"path": name} for name in names(found.value)]),
    "format_type": to("data.format", only(FORMATS, "not a format here; data.format: auto recognises the columns")),
    "training_type": to("lora.r", _training_type),
    "max_seq_length": to("data.max_length"),
    "dtype": to("quantization.bnb_4bit_compute_dtype", dtype),
    "load_in_4bit": to("quantization.load_in_4bit", flag),
    "output_dir": to("run.output_dir"),
    "num_epochs": to("train.num_train_epochs", _epochs),
    "learning_rate": to("train.learning_rate"),
    "batch_size": to("train.per_device_train_batch_size"),
    "per_device_train_batch_size": to("train.per_device_train_batch_size"),
    "per_device_eval_batch_size": to("train.per_device_eval_batch_size"),
    "gradient_accumulation_steps": to("train.gradient_accumulation_steps", note=shared.GLOBAL_BATCH),
    "warmup_steps": to("train.warmup_ratio", warmup_share, shared.A_SHARE),
    "warmup_ratio": to("train.warmup_ratio"),
    "max_steps": to("train.max_steps", if_positive),
    "save_steps": to("train.save_steps", if_positive),
    "weight_decay": to("train.weight_decay"),
    "optim": to("train.optim", optimizer),
    "lr_scheduler_type": to("train.lr_scheduler_type", schedule),
    "random_seed": to("run.seed"),
    "random_state": to("run.seed"),
    "seed": to("run.seed"),
    "packing": to("data.packing", flag),
    "train_on_completions": to("data.train_on", _train_on, remark="assistant is the default"),
    "gradient_checkpointing": to("train.gradient_checkpointing", checkpointing),
    "use_gradient_checkpointing": to("train.gradient_checkpointing", checkpointing),
    "lora_r": to("lora.r"),
    "r": to("lora.r"),
    "lora_alpha": to("lora.lora_alpha"),
    "lora_dropout": to("lora.lora_dropout"),
    "bias": to("lora.bias"),
    "target_modules": to("lora.target_modules", _modules),
    "use_rslora": to("lora.use_rslora", flag),
    "use_dora": to("lora.use_dora", flag),
    "use_loftq": lost("LoftQ needs the 16-bit weights and replaces the 4-bit ones"),
    "loftq_config": lost("LoftQ needs the 16-bit weights and replaces the 4-bit ones"),
    "vision_all_linear": unneeded(VISION),
    "finetune_vision_layers": unneeded(VISION),
    "finetune_language_layers": unneeded(VISION),
    "finetune_attention_modules": to("lora.target_modules", lambda found: (
        Unneeded("lora.target_modules decides") if is_on(found.value) else Lost("name the layers in lora.target_modules"))),
    "finetune_mlp_modules": to("lora.target_modules", lambda found: (
        Unneeded("lora.target_modules decides") if is_on(found.value) else Lost("name the layers in lora.target_modules"))),
    "enable_wandb": to("run.report_to", constant(["wandb"])),
    "wandb_project": to("run.report_to", Lost("set the variable WANDB_PROJECT")),
    "wandb_token": lost(SECRET),
    "hf_token": lost(SECRET),
    "hub_token": lost(SECRET),
    "enable_tensorboard": to("run.report_to", constant(["tensorboard"])),
    "tensorboard_dir": unneeded("logs are in the run folder"),
    "report_to": to("run.report_to", trackers),
    "logging_steps": to("train.logging_steps"),
    "log_frequency": to("train.logging_steps"),
    "inference.*": unneeded("it has no effect while training"),
    "audio_type": lost("images, audio and video are not trained on"),
    "adapter_file": unneeded("the adapter is in the run folder"),
    "save_model": to("export.merge", lambda found: (
        Settings({"export.merge": True}) if str(found.config.get("save_method", "merged_16bit")) == "merged_16bit"
        else Unneeded("the adapter is always saved"))),
    "save_method": to("export.merge", lambda found: (
        Unneeded("save_model decides") if str(found.value) in ("merged_16bit", "lora") else
        Lost("a merge into 4-bit weights rounds the adapter away; export.merge writes 16 bits"))),
    "save_path": lost("the merged model is in the run folder"),
    "save_gguf": lost("a finished run is exported by: qlora-train export RUN --format gguf"),
    "quantization": to("export.merge", _quantization),
    "push_model": lost(shared.HUB_UPLOAD),
    "push_gguf": lost(shared.HUB_UPLOAD),
    "hub_path": lost(shared.HUB_UPLOAD),
}  # fmt: skip
UNSLOTH = OtherTrainer(
    name="unsloth",
    title="Unsloth",
    programs=("unsloth", "unsloth-cli.py"),
    defaults={
        "train.per_device_train_batch_size": 2, "train.gradient_accumulation_steps": 4, "train.learning_rate": 2e-4,
        "train.num_train_epochs": lambda config: 1 if _is_script(config) else 3, "train.optim": "adamw_8bit",
        "train.lr_scheduler_type": "linear", "train.weight_decay": 0.01, "run.seed": 3407,
        "lora.r": lambda config: 16 if _is_script(config) else 64, "lora.lora_alpha": 16, "data.train_on": "all",
        "data.overflow": "truncate", "quantization.load_in_4bit": lambda config: not _is_script(config),
        "train.max_steps": lambda config: 400 if _is_script(config) else None,
        "train.gradient_checkpointing": "full",
    },
    keys=KEYS | dict(shared.LAUNCHER) | {
        f"{section}.{key}": KEYS[key] for section, keys in SECTIONED.items() for key in keys
    },
)  # fmt: skip
