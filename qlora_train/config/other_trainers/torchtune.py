"""torchtune's YAML of its LoRA recipes, whose parts name a function or class in `_component_`."""

from typing import Any

from qlora_train.config.other_trainers import transformers_arguments as shared
from qlora_train.config.other_trainers.data_set_values import data_files, path_or_loader, split
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
    compute_dtype,
    constant,
    dtype,
    flag,
    if_positive,
    is_on,
    names,
    number,
    only,
    optimizer,
    trl_loss,
)

MLP = ["gate_proj", "up_proj", "down_proj"]
DATA_SETS: dict[str, dict[str, Any]] = {
    "alpaca_dataset": {"path": "tatsu-lab/alpaca", "format": "alpaca"},
    "alpaca_cleaned_dataset": {"path": "yahma/alpaca-cleaned", "format": "alpaca"},
    "slimorca_dataset": {"path": "Open-Orca/SlimOrca-Dedup", "format": "conversations"},
    "samsum_dataset": {"path": "Samsung/samsum", "format": "question_answer",
                       "columns": {"question": "dialogue", "answer": "summary"}},
    "grammar_dataset": {"path": "liweili/c4_200m", "format": "question_answer",
                        "columns": {"question": "input", "answer": "output"}},
    "wikitext_dataset": {"path": "EleutherAI/wikitext_document_level", "format": "text", "columns": {"text": "page"}},
    "cnn_dailymail_articles_dataset": {"path": "ccdv/cnn_dailymail", "format": "text", "columns": {"text": "article"}},
    "stack_exchange_paired_dataset": {
        "path": "lvwerra/stack-exchange-paired", "format": "preference",
        "columns": {"prompt": "question", "chosen": "response_j", "rejected": "response_k"}},
    "hh_rlhf_helpful_dataset": {"path": "RLHFlow/HH-RLHF-Helpful-standard", "format": "preference"},
    "chat_dataset": {}, "instruct_dataset": {"format": "question_answer"}, "text_completion_dataset": {"format": "text"},
    "preference_dataset": {"format": "preference"},
}  # fmt: skip
"""Builders of data sets -> the source that they read unless told otherwise."""
TRAINS_ON_INPUT = ("alpaca_dataset", "alpaca_cleaned_dataset")
COLUMNS = {"input": "question", "output": "answer", "prompt": "prompt", "chosen": "chosen", "rejected": "rejected"}
ALPACA_COLUMNS = {"instruction": "instruction", "input": "input", "output": "output"}
PROFILER = "no profile is recorded"
CLASS_OF_WEIGHTS = "safetensors of the folder are read"


def _builder(found: Found) -> str:
    return str(found.beside.get("_component_", "")).rpartition(".")[2]


def _model(found: Found) -> Any:
    name = str(found.value).rpartition(".")[2]
    if "qlora" in name:
        return Settings({"quantization.load_in_4bit": True})
    if "lora" in name:
        return Settings({"quantization.load_in_4bit": is_on(found.beside.get("quantize_base"))})
    return Lost("LoRA is trained, not whole weights: set lora.r and train.learning_rate for it", todo=True)


def _targets(found: Found) -> Any:
    """The keys of `model` name attention layers, and switch the MLP and the head on."""
    attention = ["o_proj" if name == "output_proj" else name for name in names(found.beside.get("lora_attn_modules"))]
    mlp = MLP if is_on(found.beside.get("apply_lora_to_mlp")) else []
    head = ["lm_head"] if is_on(found.beside.get("apply_lora_to_output")) else []
    modules = attention + mlp + head
    every = {"q_proj", "k_proj", "v_proj", "o_proj", *MLP}
    return ("all-linear" if set(modules) == every else modules) or Unneeded("no layer is named")


def _data_set(found: Found) -> Any:
    source = DATA_SETS.get(_builder(found))
    if source is None:
        return Lost("no such data set here: give its file or Hub id in data.train", todo=True)
    values: dict[str, Any] = {f"[].{key}": value for key, value in source.items() if key != "columns"}
    if "source" in found.beside:
        values.pop("[].path", None)
    if "column_map" not in found.beside:
        values |= {f"[].columns.{ours}": name for ours, name in source.get("columns", {}).items()}
    if _builder(found) in TRAINS_ON_INPUT and "train_on_input" not in found.beside:
        return Settings(values | {"data.train_on": "all"}, "there the prompt of Alpaca rows is trained too, by default")
    return Settings(values)


def _style(found: Found) -> Any:
    return only({"sharegpt": "conversations", "openai": "messages"}, "turns are messages, or conversations")(found)


def _conversation_column(found: Found) -> Any:
    form = "messages" if found.beside.get("conversation_style") == "openai" else "conversations"
    return Settings({f"[].columns.{form}": found.value}) if found.value != form else Unneeded("it is the format's own")


def _column(name: str) -> KeyMapping:
    def convert(found: Found) -> Any:
        whole = str(found.around.get("_component_", ""))
        ours = (ALPACA_COLUMNS if "alpaca" in whole else COLUMNS).get(name, name)
        return (
            Settings({f"[].columns.{ours}": found.value}) if found.value != ours else Unneeded("it is the format's own")
        )

    return to("data.train[].columns", convert)


def _rows(data: str, ours: str) -> dict[str, KeyMapping]:
    columns = {
        f"{data}.column_map.{name}": _column(name) for name in (*COLUMNS, "instruction", "image", "conversations")
    }
    return columns | {
        f"{data}._component_": to(f"{ours}[].path", _data_set),
        f"{data}.source": to(f"{ours}[].path", path_or_loader()),
        f"{data}.data_files": to(f"{ours}[].path", data_files("source")),
        f"{data}.subset": to(f"{ours}[].subset"),
        f"{data}.name": to(f"{ours}[].subset"),
        f"{data}.split": to(f"{ours}[].split", split),
        f"{data}.column": to(f"{ours}[].columns.text"),
        f"{data}.conversation_column": to(f"{ours}[].columns", _conversation_column),
        f"{data}.conversation_style": to(f"{ours}[].format", _style),
        f"{data}.packed": to("data.packing", flag),
        f"{data}.train_on_input": to("data.train_on", lambda found: "all" if is_on(found.value) else "assistant"),
        f"{data}.max_seq_len": to("data.max_length"),
        f"{data}.new_system_prompt": lost("rows have it in their system turn, or in a column system"),
        f"{data}.add_eos": unneeded("the end of a text is trained"),
        f"{data}.split_across_pack": lost("documents are packed whole"),
        f"{data}.filter_fn": lost("rows are read as they are; rows that cannot be used are counted by reason"),
        f"{data}.template": lost("rows are rendered by the chat template"),
        f"{data}.image_*": lost("images, audio and video are not trained on"),
    }


def _steps(found: Found) -> Any:
    steps, epochs = number(found.value), number(found.config.get("epochs", 1))
    if not isinstance(steps, int) or steps <= 0:
        return Unneeded("it is unset there")
    total = steps * epochs if isinstance(epochs, int) and epochs > 0 else steps
    return Settings({"train.max_steps": total}, "steps of all epochs together")


def _warmup(found: Found) -> Any:
    steps, per_epoch = number(found.value), number(found.config.get("max_steps_per_epoch"))
    epochs = number(found.config.get("epochs", 1))
    if all(isinstance(count, int) and count > 0 for count in (steps, per_epoch, epochs)):
        return round(min(steps / (per_epoch * epochs), 0.99), 6)
    return Lost(f"set train.warmup_ratio to {steps} / the number of steps, which the data decides (0.03 if left out)")


def _schedule(found: Found) -> Any:
    name = str(found.value).lower()
    kind = next((kind for kind in ("cosine", "linear") if kind in name), None)
    return kind or Lost("this schedule is not available; train.lr_scheduler_type has those that are")


def _checkpoint_format(found: Found) -> Any:
    return (
        Lost("checkpoints of torchtune or Meta are not read; give the Hugging Face folder or Hub id", todo=True)
        if ("Meta" in str(found.value))
        else Unneeded(CLASS_OF_WEIGHTS)
    )


def _loss(found: Found) -> Any:
    name = str(found.value).rpartition(".")[2]
    by_name = {"DPOLoss": "dpo", "RSOLoss": "hinge", "IPOLoss": "ipo"}
    if name in by_name:
        return by_name[name]
    if "CrossEntropy" in name or name.startswith("CEWith"):
        return Unneeded("the loss is always computed in chunks")
    return Lost("sft and the preference objectives can be trained; set train.objective", todo=True)


def _logger(found: Found) -> Any:
    trackers = {"WandBLogger": ["wandb"], "TensorBoardLogger": ["tensorboard"]}
    name = str(found.value).rpartition(".")[2]
    if name == "CometLogger":
        return Lost("the trackers are tensorboard, wandb, mlflow and trackio")
    return trackers.get(name) or Unneeded("metrics.jsonl has the figures of every log line")


TORCHTUNE = OtherTrainer(
    name="torchtune",
    title="torchtune",
    programs=("tune",),
    defaults={
        "train.gradient_accumulation_steps": 1, "train.max_grad_norm": 0.0, "data.overflow": "truncate",
        "train.weight_decay": 0.01, "train.optim": "adamw_torch",
        "train.lr_scheduler_type": lambda config: None if "lr_scheduler" in config else "constant",
    },
    keys=dict(shared.LAUNCHER) | _rows("dataset[]", "data.train") | _rows("dataset", "data.train") | {
        "dataset": to("data.train"),
        "model": to("model.model_name_or_path", remark="a folder or Hub id; LoRA's settings are in the section lora"),
        "tokenizer": unneeded("the base model's tokenizer files decide; max_seq_len is data.max_length"),
        "checkpointer": to("model.model_name_or_path", remark="a folder or Hub id"),
        "lr_scheduler": to("train.lr_scheduler_type", remark="num_warmup_steps is train.warmup_ratio"),
        "loss": to("train.objective"),
        "metric_logger": to("run.report_to"),
        "profiler": unneeded(PROFILER),
        "dataset_val": to("data.eval"),
        "optimizer": to("train.optim", remark="lr is train.learning_rate"),
        "model._component_": to("quantization.load_in_4bit", _model),
        "model.lora_rank": to("lora.r"),
        "model.lora_alpha": to("lora.lora_alpha"),
        "model.lora_dropout": to("lora.lora_dropout"),
        "model.lora_attn_modules": to("lora.target_modules", _targets, remark="output_proj is o_proj"),
        "model.apply_lora_to_mlp": to("lora.target_modules", _targets, remark="gate_proj, up_proj and down_proj"),
        "model.apply_lora_to_output": to("lora.target_modules", _targets, remark="lm_head"),
        "model.use_dora": to("lora.use_dora", flag),
        "model.quantize_base": to("quantization.load_in_4bit", flag),
        "model.*": unneeded("config.json of the base model has its sizes"),
        "tokenizer._component_": unneeded("the base model's tokenizer files decide"),
        "tokenizer.max_seq_len": to("data.max_length", if_positive, remark="unset there: no limit"),
        "tokenizer.prompt_template": to("model.chat_template", Lost("give a name, or a Jinja file")),
        "tokenizer.path": unneeded("the base model's tokenizer files decide"),
        "tokenizer.merges_file": unneeded("the base model's tokenizer files decide"),
        "tokenizer.*": unneeded("the base model's tokenizer files decide"),
        "checkpointer._component_": to("model.model_name_or_path", _checkpoint_format),
        "checkpointer.checkpoint_dir": to("model.model_name_or_path", remark="a folder with config.json, or a Hub id"),
        "checkpointer.output_dir": unneeded("run.output_dir has everything of a run"),
        "checkpointer.adapter_checkpoint": to("lora.adapter_path", Lost("lora.adapter_path is a folder of PEFT")),
        "checkpointer.*": unneeded(CLASS_OF_WEIGHTS),
        "ref_checkpointer.*": unneeded("the reference model is the base, without the adapter"),
        "resume_from_checkpoint": unneeded(shared.RESUMES),
        "save_adapter_weights_only": to("export.merge", lambda found: (
            Unneeded("no merge is the default") if is_on(found.value) else True), "torchtune merges unless it is true"),
        "save_last_epoch_only": lost("train.save_total_limit is the number of checkpoints to keep"),
        "output_dir": to("run.output_dir"),
        "seed": to("run.seed"),
        "shuffle": lost("rows are always shuffled by run.seed"),
        "batch_size": to("train.per_device_train_batch_size"),
        "batch_size_val": to("train.per_device_eval_batch_size"),
        "dataset_val.*": to("data.eval", lambda _: Lost("data.eval is a source like data.train, or a share", todo=True)),
        "run_val_every_n_steps": to("train.eval_steps", if_positive),
        "collate_fn": unneeded("rows are collated by train.padding_free"),
        "optimizer._component_": to("train.optim", optimizer),
        "optimizer.lr": to("train.learning_rate"),
        "optimizer.weight_decay": to("train.weight_decay"),
        "optimizer.eps": to("train.adam_epsilon"),
        "optimizer.betas": to("train.adam_beta1", remark="and train.adam_beta2", convert=lambda found: (
            Settings(dict(zip(("train.adam_beta1", "train.adam_beta2"), found.value, strict=False)))
            if isinstance(found.value, list | tuple) else Lost("not two numbers"))),
        "optimizer.fused": to("train.optim", Unneeded("train.optim: adamw_torch_fused is the fused one")),
        "optimizer.*": lost("the optimizers have no other options"),
        "optimizer_in_bwd": lost("gradients are accumulated before the update"),
        "lr_scheduler._component_": to("train.lr_scheduler_type", _schedule),
        "lr_scheduler.num_warmup_steps": to("train.warmup_ratio", _warmup, shared.A_SHARE),
        "lr_scheduler.*": lost("the schedules have no options here"),
        "loss._component_": to("train.objective", _loss),
        "loss.beta": to("train.beta"),
        "loss.label_smoothing": to("train.label_smoothing", if_positive, remark="for robust, exo_pair, simpo and cpo"),
        "loss.loss_type": to("train.objective", trl_loss),
        "loss.*": unneeded("the loss is always computed in chunks"),
        "epochs": to("train.num_train_epochs"),
        "max_steps_per_epoch": to("train.max_steps", _steps),
        "gradient_accumulation_steps": to("train.gradient_accumulation_steps", note=shared.GLOBAL_BATCH),
        "clip_grad_norm": to("train.max_grad_norm", if_positive),
        "compile": unneeded(shared.FUSED),
        "metric_logger._component_": to("run.report_to", _logger),
        "metric_logger.project": lost("set the tracker's own variable, such as WANDB_PROJECT"),
        "metric_logger.*": unneeded("logs are in the run folder"),
        "log_every_n_steps": to("train.logging_steps"),
        "log_peak_memory_stats": unneeded("peak memory is in metrics.jsonl and results.json"),
        "log_level": unneeded("--quiet and --verbose choose what is printed"),
        "device": unneeded("a GPU is used if one is visible"),
        "dtype": to("quantization.bnb_4bit_compute_dtype", dtype),
        "enable_activation_checkpointing": to("train.gradient_checkpointing", lambda found: (
            "full" if is_on(found.value) else "none")),
        "enable_activation_offloading": to("train.activation_offloading", flag),
        "ac_mode": to("train.gradient_checkpointing", Lost("auto checkpoints as little as memory allows")),
        "ac_option": to("train.gradient_checkpointing", Lost("auto checkpoints as little as memory allows")),
        "low_cpu_ram": unneeded("weights are always loaded shard by shard"),
        "memory_efficient_fsdp_wrap": unneeded(shared.FSDP_DETAIL),
        "fsdp_cpu_offload": lost("the sharded base stays on the GPUs"),
        "fsdp_*": unneeded(shared.FSDP_DETAIL),
        "fsdp.*": lost("the sharded base stays on the GPUs"),
        "custom_sharded_layers": unneeded(shared.FSDP_DETAIL),
        "tensor_parallel_*": lost(shared.NO_TENSOR_PARALLEL),
        "cudnn_deterministic_mode": to("run.deterministic", constant(True)),
        "profiler.*": unneeded(PROFILER),
        "dataloader.*": unneeded(shared.LOADER),
        "quantizer.*": lost("quantization-aware training is not available: the base stays in 4 bits"),
        "fp16": to("quantization.bnb_4bit_compute_dtype", compute_dtype("float16")),
        "teacher_*": lost("no teacher is distilled"),
        "kd_*": lost("no teacher is distilled"),
        "reward_*": lost(shared.NO_ONLINE),
        "ppo_*": lost(shared.NO_ONLINE),
        "package": unneeded("a Python package of your own is not imported"),
        "num_output_chunks": unneeded("the loss is always computed in chunks"),
    },
)  # fmt: skip
