"""TRL's command line (`trl sft`, `trl dpo`, `orpo.py`): `ScriptArguments`, `ModelConfig`, the trainer's config, as YAML."""

from collections.abc import Mapping
from typing import Any

from qlora_train.config.other_trainers import transformers_arguments as shared
from qlora_train.config.other_trainers.data_set_values import data_files, path_or_loader, split
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
    constant,
    dtype,
    flag,
    four_bits,
    four_instead_of_eight_bits,
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

ONE_TEMPLATE = "the tokenizer's own special tokens are used"


def _kind(config: Mapping[str, Any]) -> str:
    """Return the command; of a YAML file alone what its keys show."""
    if "command" in config:
        return str(config["command"])
    if any(key in config for key in ("cpo_alpha", "simpo_gamma")) or config.get("loss_type") == "simpo":
        return "cpo"
    if any(key in config for key in ("desirable_weight", "undesirable_weight")):
        return "kto"
    keys = ("beta", "precompute_ref_log_probs", "ref_model_sync_steps", "label_smoothing")
    return "dpo" if any(key in config for key in keys) else "sft"


def _command(found: Found) -> Any:
    if found.value in ("dpo", "cpo", "kto") and found.config.get("loss_type"):
        return Unneeded("loss_type decides")
    return objective({"sft": "sft", "dpo": "dpo", "cpo": "cpo", "orpo": "orpo", "kto": "kto"})(found)


def _loss(found: Found) -> Any:
    """`loss_type` is of supervised or of preference training, as its value shows."""
    if found.value in ("nll", "chunked_nll"):
        return Unneeded("the loss is the mean negative log-likelihood of the label tokens, in chunks")
    if found.value == "dft":
        return Lost("the loss is the mean negative log-likelihood of the label tokens")
    if _kind(found.config) == "cpo":
        by_name = {"sigmoid": "cpo", "simpo": "simpo"}
        return by_name.get(found.value, Lost("CPO is trained with sigmoid or simpo; set train.objective", todo=True))
    return trl_loss(found)


def _use_peft(found: Found) -> Any:
    if is_on(found.value):
        return Unneeded("LoRA is what is trained")
    return Lost("LoRA is trained, not whole weights: set lora.r and train.learning_rate for it", todo=True)


def _targets(found: Found) -> Any:
    modules = names(found.value)
    return "all-linear" if modules == ["all-linear"] else modules


def _completion_only(found: Found) -> Any:
    return "completion" if is_on(found.value) else "all"


def _template(found: Found) -> Any:
    path = str(found.value)
    if path.endswith((".jinja", ".jinja2")):
        return path
    return Lost("it is a tokenizer's folder or Hub id; save its chat template as a Jinja file and name that")


def _fraction(found: Found) -> Any:
    value = number(found.value)
    return Settings({"[].weight": value}, "a sample of this share, not the first rows")


def _eval_split(found: Found) -> Any:
    name = found.config.get("dataset_name")
    evaluates = str(found.config.get("eval_strategy", "no")).lower() not in ("no", "false")
    if not (evaluates and isinstance(name, str)):
        return Unneeded("nothing is evaluated there")
    source = {"path": name, "split": str(found.value)}
    subset = found.config.get("dataset_config")
    return Settings({"data.eval": [source | ({"subset": subset} if subset else {})]})


TRL = OtherTrainer(
    name="trl",
    title="TRL",
    programs=("trl", "sft.py", "dpo.py", "cpo.py", "orpo.py", "kto.py"),
    absent={"use_peft": Lost("whole weights are trained there; here LoRA: check train.learning_rate and lora.r", todo=True),
        "assistant_only_loss": Lost(
            "data.train_on: of rows with messages all tokens are trained there, of a prompt and its completion the latter; "
            "here the answers, unless data.train_on says otherwise"
        ),
    },
    defaults=shared.TRAINING_DEFAULTS | {
        "train.learning_rate": lambda config: 2e-5 if _kind(config) == "sft" else 1e-6, "lora.lora_dropout": 0.05,
        "quantization.load_in_4bit": four_instead_of_eight_bits, "quantization.bnb_4bit_use_double_quant": False,
        "data.max_length": 1024, "data.overflow": "truncate",
        "train.objective": _kind,
        "train.sft_weight": lambda config: 1.0 if config.get("loss_type") == "simpo" else None,
    },
    keys=dict(shared.TRAINING_ARGUMENTS) | dict(shared.LAUNCHER) | {
        "command": to("train.objective", _command),
        "model_name_or_path": to("model.model_name_or_path"),
        "model_revision": to("model.revision"),
        "trust_remote_code": to("model.trust_remote_code", flag, "a Hub model needs model.revision too"),
        "dtype": to("quantization.bnb_4bit_compute_dtype", dtype),
        "torch_dtype": to("quantization.bnb_4bit_compute_dtype", dtype),
        "attn_implementation": to("model.attn_implementation", attention),
        "model_init_kwargs": lost("config.json of the base model is used as it is"),
        "model_init_kwargs.*": lost("config.json of the base model is used as it is"),
        "use_peft": to("lora.r", _use_peft),
        "lora_r": to("lora.r"),
        "lora_alpha": to("lora.lora_alpha"),
        "lora_dropout": to("lora.lora_dropout"),
        "lora_target_modules": to("lora.target_modules", _targets),
        "lora_target_parameters": to("lora.target_parameters", lambda found: names(found.value)),
        "lora_modules_to_save": to("lora.modules_to_save", lambda found: names(found.value)),
        "lora_task_type": unneeded("a causal language model is trained"),
        "use_rslora": to("lora.use_rslora", flag),
        "use_dora": to("lora.use_dora", flag),
        "load_in_4bit": to("quantization.load_in_4bit", four_bits),
        "load_in_8bit": lost(shared.NO_8_BIT),
        "bnb_4bit_quant_type": to("quantization.bnb_4bit_quant_type"),
        "use_bnb_nested_quant": to("quantization.bnb_4bit_use_double_quant", flag),
        "bnb_4bit_quant_storage": unneeded("4-bit weights are stored as bytes, which FSDP shards correctly"),
        "dataset_name": to("data.train[0].path"),
        "dataset_config": to("data.train[0].subset"),
        "dataset_train_split": to("data.train[0].split", split),
        "dataset_test_split": to("data.eval", _eval_split),
        "dataset_streaming": to("data.streaming", flag),
        "streaming": to("data.streaming", flag),
        "test_split_size": to("data.eval", share_of_train, "a share, chosen by a hash of each row"),
        "datasets": to("data.train"),
        "datasets[].path": to("data.train[].path", path_or_loader()),
        "datasets[].name": to("data.train[].subset"),
        "datasets[].split": to("data.train[].split", split),
        "datasets[].data_files": to("data.train[].path", data_files("path")),
        "datasets[].data_dir": lost("a folder of a data set on the Hub cannot be named; give its files"),
        "datasets[].columns": unneeded("columns without a use are listed in the log"),
        "datasets[].fraction": to("data.train[].weight", _fraction),
        "ignore_bias_buffers": unneeded("parallel.strategy has no options"),
        "dataset_text_field": to("data.columns", lambda found: (
            Unneeded("it is the format's own name") if found.value == "text" else {"text": found.value})),
        "dataset_kwargs": lost("rows are tokenised with the chat template, and nothing else"),
        "dataset_kwargs.*": lost("rows are tokenised with the chat template, and nothing else"),
        "dataset_num_proc": to("data.num_proc"),
        "chat_template_path": to("model.chat_template", _template),
        "eos_token": unneeded(ONE_TEMPLATE),
        "pad_token": unneeded(ONE_TEMPLATE),
        "max_length": to("data.max_length"),
        "max_seq_length": to("data.max_length"),
        "max_prompt_length": lost("data.max_length is of the whole row"),
        "truncation_mode": to("data.overflow", only(
            {"keep_start": "truncate", "keep_end": "keep_end"}, "not a choice here")),
        "shuffle_dataset": unneeded("rows are shuffled by run.seed"),
        "packing": to("data.packing", flag),
        "eval_packing": unneeded("held-out rows are not packed"),
        "packing_strategy": unneeded("documents are packed by best-fit decreasing, and isolated"),
        "padding_free": to("train.padding_free", lambda found: (
            True if is_on(found.value) else Unneeded("it is used where it saves work and a check passes"))),
        "pad_to_multiple_of": unneeded("padding is never trained on, and not computed where that can be"),
        "completion_only_loss": to("data.train_on", _completion_only),
        "assistant_only_loss": to("data.train_on", constant("assistant")),
        "activation_offloading": to("train.activation_offloading", flag),
        "loss_type": to("train.objective", _loss, remark="sigmoid is dpo"),
        "loss_weights": to("train.sft_weight", Unneeded("loss_type is read with them"), remark="the weight of sft in it"),
        "rpo_alpha": to("train.sft_weight"),
        "cpo_alpha": to("train.sft_weight"),
        "simpo_gamma": to("train.simpo_gamma", where("loss_type", ["simpo"])),
        "beta": to("train.beta"),
        "desirable_weight": to("train.desirable_weight"),
        "undesirable_weight": to("train.undesirable_weight"),
        "label_smoothing": to("train.label_smoothing", if_positive, remark="for robust, exo_pair, simpo and cpo"),
        "disable_dropout": unneeded("lora.lora_dropout: 0 disables it"),
        "precompute_ref_*": unneeded("reference log-probabilities are computed once and stored"),
        "sync_ref_model": lost("the reference model stays as it is"),
        "ref_model_*": lost("the reference model stays as it is"),
        "use_weighting": lost("every pair has the same weight"),
        "ld_alpha": lost("train.objective has no other options"),
        "discopop_tau": to("train.discopop_tau", where("loss_type", ["discopop"])),
        "f_divergence_type": lost("the divergence is the reverse KL"),
        "f_alpha_divergence_coef": lost("the divergence is the reverse KL"),
        "reward_model_name_or_path": lost(shared.NO_ONLINE),
        "reward_funcs": lost(shared.NO_ONLINE),
        "num_generations": lost(shared.NO_ONLINE),
        "max_completion_length": lost(shared.NO_ONLINE),
        "use_vllm": lost(shared.NO_ONLINE),
        "vllm_*": lost(shared.NO_ONLINE),
        "accelerate_config": to("parallel.strategy", only(
            {"single_gpu": "none", "multi_gpu": "ddp", "fsdp1": "fsdp", "fsdp2": "fsdp"}, shared.NO_DEEPSPEED)),
    },
)  # fmt: skip
