"""Conversions of values that the configs of several trainers share."""

from collections.abc import Mapping, Sequence
from typing import Any

from qlora_train.config.optimizers import OPTIMIZERS
from qlora_train.config.other_trainers.key_mapping import Convert, Found, Lost, Settings, Unneeded
from qlora_train.config.schema import CHAT_TEMPLATE_NAMES
from qlora_train.config.yaml_reader import core_scalar
from qlora_train.utils.trackers import TRACKERS

YES = ("true", "yes", "on", "1")
NO = ("false", "no", "off", "0", "none", "null", "")
OTHER_OPTIMIZER_NAMES = {
    "adamw_bnb_8bit": "adamw_8bit", "paged_adamw": "paged_adamw_32bit", "adamw_hf": "adamw_torch", "adamw": "adamw_torch",
    "torch.optim.adamw": "adamw_torch", "torch.optim.sgd": "sgd", "bitsandbytes.optim.adamw8bit": "adamw_8bit",
    "bitsandbytes.optim.pagedadamw8bit": "paged_adamw_8bit", "bitsandbytes.optim.pagedadamw": "paged_adamw_32bit",
    "bitsandbytes.optim.pagedadamw32bit": "paged_adamw_32bit",
}  # fmt: skip
SCHEDULES = ("linear", "cosine", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt")
LOSSES = {
    "sigmoid": "dpo", "hinge": "hinge", "ipo": "ipo", "robust": "robust", "apo_zero": "apo_zero", "apo_down": "apo_down",
    "nca_pair": "nca_pair", "sppo_hard": "sppo_hard", "sigmoid_norm": "sigmoid_norm", "exo_pair": "exo_pair",
    "bco_pair": "bco_pair", "discopop": "discopop", "simpo": "simpo", "kto": "kto",
    "apo_zero_unpaired": "apo_zero_unpaired",
}  # fmt: skip
"""TRL's `loss_type` of preference training -> `train.objective`."""
NOT_SFT = "train.objective: sft or a preference objective is what can be trained"


def is_on(value: Any) -> bool:
    """Return a flag's value, also of YAML 1.1's words and of text."""
    return value.strip().lower() not in NO if isinstance(value, str) else bool(value)


def is_unset(value: Any) -> bool:
    """Tell whether a value leaves its key at rest."""
    return value in (None, False, [], (), {}, "") or (isinstance(value, str) and value.lower() in NO and value != "0")


def number(value: Any) -> Any:
    """Return the number that a text holds, else the value."""
    return core_scalar(value) if isinstance(value, str) else value


def names(value: Any) -> list[str]:
    """Return the names of a list, or of a text with commas or spaces."""
    if value is None:
        return []
    items = value if isinstance(value, list | tuple) else str(value).replace(",", " ").split()
    return [str(item) for item in items]


def constant(value: Any, note: str = "", key: str = "") -> Convert:
    """Convert a flag that is on to `value`."""
    return lambda found: (
        (Settings({key: value}, note) if key else value) if is_on(found.value) else Unneeded("it is off there")
    )


def flag(found: Found) -> bool:
    return is_on(found.value)


def if_positive(found: Found) -> Any:
    """0 and -1 mean unset there."""
    value = number(found.value)
    return value if isinstance(value, int | float) and value > 0 else Unneeded("it is unset there")


def optimizer(found: Found) -> Any:
    """Return an optimizer of Transformers or torch by its name here."""
    name = str(found.value).lower().removesuffix(".")
    name = OTHER_OPTIMIZER_NAMES.get(name, name)
    if name in OPTIMIZERS:
        return name
    return Lost(f"this optimizer is not available; train.optim: auto, or one of {', '.join(OPTIMIZERS)}")


def schedule(found: Found) -> Any:
    name = str(found.value).lower()
    if name in SCHEDULES:
        return name
    return Lost(f"this schedule is not available; train.lr_scheduler_type: one of {', '.join(SCHEDULES)}")


def warmup_share(found: Found) -> Any:
    """Return warm-up steps as a share of the steps, if their number is in the config."""
    steps = number(found.value)
    if not isinstance(steps, int | float):
        return Lost("not a number")
    if steps < 1:
        return max(float(steps), 0.0)
    training = found.config.get("training")  # Unsloth's section
    total = number((training if isinstance(training, Mapping) else found.config).get("max_steps"))
    if isinstance(total, int) and total > 0:
        return round(min(steps / total, 0.99), 6)
    return Lost(
        f"the share is {steps:g} / the number of steps, which the data decides; set train.warmup_ratio to it "
        "(0.03 if left out)"
    )


def eval_strategy(found: Found) -> Any:
    """`train.eval_steps` alone decides: the word itself is not needed."""
    word = str(found.value).lower()
    if word in ("no", "false"):
        return Unneeded("rows of data.eval, if any, are evaluated at the end of every epoch")
    return Unneeded("train.eval_steps decides; every epoch if it is left out")


def save_strategy(found: Found) -> Any:
    word = str(found.value).lower()
    if word in ("no", "false"):
        return Lost("a checkpoint is saved at least every epoch, so that a run can resume")
    if word == "best":
        return Lost("the newest checkpoints are kept; train.load_best_model_at_end keeps the best one too")
    return Unneeded("train.save_steps decides; every epoch if it is left out")


def steps_of(strategy_key: str) -> Convert:
    """Convert the steps between evaluations or checkpoints, which `strategy_key` may switch off."""

    def convert(found: Found) -> Any:
        value, strategy = number(found.value), str(found.config.get(strategy_key, "steps")).lower()
        if strategy not in ("steps", "none"):
            return Unneeded(f"it has no effect there with {strategy_key}: {strategy}")
        if isinstance(value, float) and 0 < value < 1:
            total = number(found.config.get("max_steps"))
            if isinstance(total, int) and total > 0:
                return max(1, round(value * total))
            return Lost("a share of the steps; here it is a number of steps (every epoch if left out)")
        return int(value) if isinstance(value, int | float) and value >= 1 else Unneeded("it is unset there")

    return convert


def times_per_epoch(found: Found) -> Any:
    times = number(found.value)
    if times == 1:
        return Unneeded("every epoch is the default")
    return Lost(f"{times} times per epoch; here it is a number of steps: steps of an epoch / {times}")


def compute_dtype(name: str) -> Convert:
    """Convert a flag for a dtype of matrix products."""

    def convert(found: Found) -> Any:
        if str(found.value).lower() == "auto":
            return "auto"
        return name if is_on(found.value) else Unneeded("it is off there")

    return convert


DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "half": "float16", "float": "float32"}


def dtype(found: Found) -> Any:
    if is_unset(found.value):
        return Unneeded("it is unset there")
    name = str(found.value).removeprefix("torch.").lower()
    name = DTYPES.get(name, name)
    return name if name in ("auto", "bfloat16", "float16", "float32") else Lost("not a dtype of matrix products here")


def checkpointing(found: Found) -> Any:
    """Return the level of activation checkpointing; `unsloth` and `offload` also keep activations in host memory."""
    word = str(found.value).lower()
    if word in ("unsloth", "offload", "offload_disk", "mlx"):
        note = "" if word == "offload" else "layers recompute everything; saved tensors go to host memory"
        return Settings({"train.gradient_checkpointing": "full", "train.activation_offloading": True}, note)
    return "full" if is_on(found.value) else "none"


def trackers(found: Found) -> Any:
    """Return the trackers that exist here."""
    found_names = [name.lower() for name in names(found.value)]
    known = [name for name in found_names if name in TRACKERS]
    if other := [name for name in found_names if name not in (*TRACKERS, "none")]:
        reason = f"{', '.join(other)} is not available; metrics.jsonl has the figures"
        return Settings({"run.report_to": known}, reason) if known else Lost(reason)
    return known or Unneeded("no tracker is the default")


def attention(found: Found) -> Any:
    """Return the attention implementation; sdpa for any FlashAttention, which needs its own package."""
    word = str(found.value).lower()
    if word in ("eager", "sdpa"):
        return word
    if word in ("auto", "fa2", "fa3", "flash_attn", "flash_attention_2", "flash_attention_3", "true"):
        return Unneeded("sdpa is as exact; model.attn_implementation: flash_attention_2 uses the package flash-attn")
    if word in ("disabled", "false", "none"):
        return Unneeded("model.attn_implementation: auto chooses")
    return Lost("not an attention implementation here; model.attn_implementation: auto chooses")


def flash_attention(found: Found) -> Any:
    return attention(Found("fa2" if is_on(found.value) else "auto", found.beside, found.config))


def chat_template(found: Found) -> Any:
    """Return a named template that exists here; an instruction-tuned model has its own."""
    name = str(found.value)
    model = str(next((found.config[key] for key in ("base_model", "model_name_or_path", "model", "model_name")
                      if isinstance(found.config.get(key), str)), "")).lower()  # fmt: skip
    if name in ("tokenizer_default", "default", "jinja"):
        return Unneeded("the tokenizer's own template is the default")
    if any(word in model for word in ("instruct", "chat", "-it", "assistant")):
        return Unneeded(f"the template {name} comes with the tokenizer of this model")
    if name in CHAT_TEMPLATE_NAMES:
        return name
    return Lost(
        "the tokenizer's own template is used; for a base model without one set model.chat_template: "
        f"{', '.join(CHAT_TEMPLATE_NAMES)}, or a Jinja file"
    )


def share_of_train(found: Found) -> Any:
    """Return a share of the training rows as held-out rows."""
    value = number(found.value)
    if isinstance(value, int | float) and 0 < value < 1:
        return float(value)
    if isinstance(value, int | float) and value > 0:
        return Lost(f"a number of rows; here it is a share of data.train, such as data.eval: 0.05 for {value:g} rows")
    return Unneeded("nothing is held out there")


def trl_loss(found: Found) -> Any:
    """Return the preference objective for TRL's `loss_type`, and the weight of `sft` beside another loss."""
    losses = names(found.value)
    pair_losses = [name for name in losses if name != "sft"]
    if len(pair_losses) == 1 and pair_losses[0] in LOSSES:
        chosen = LOSSES[pair_losses[0]]
        return chosen if losses == pair_losses else _with_sft(chosen, losses, found)
    return Lost(f"one of {', '.join(LOSSES.values())} can be trained; set train.objective", todo=True)


def _with_sft(chosen: str, losses: Sequence[str], found: Found) -> Any:
    given = [number(each) for each in names(found.beside.get("dpo_loss_weights") or found.beside.get("loss_weights"))]
    weights = given or [1.0] * len(losses)
    if len(weights) != len(losses) or not all(isinstance(each, int | float) and each > 0 for each in weights):
        return Lost("the weights of its losses are not one number > 0 each", todo=True)
    of_sft = weights[losses.index("sft")]
    of_pairs = next(weight for name, weight in zip(losses, weights, strict=True) if name != "sft")
    note = "" if of_pairs == 1 else f"the loss of pairs has weight 1 instead of {of_pairs:g}, and sft in proportion"
    return Settings({"train.objective": chosen, "train.sft_weight": of_sft / of_pairs}, note)


def where(key: str, values: Sequence[str]) -> Convert:
    """Convert a number that has an effect if another key has one of these values."""

    def convert(found: Found) -> Any:
        if str(found.config.get(key, "")).lower() in values:
            return number(found.value)
        return Unneeded(f"it has no effect there without {key}: {' or '.join(values)}")

    return convert


def objective(by_name: Mapping[str, str]) -> Convert:
    """Convert the name of what is trained."""

    def convert(found: Found) -> Any:
        name = str(found.value).lower()
        if name in by_name:
            return by_name[name]
        return Lost(f"{name} is not available: {NOT_SFT}, {', '.join(sorted(set(LOSSES.values())))}", todo=True)

    return convert


def only(allowed: Mapping[Any, Any], reason: str, *, todo: bool = False) -> Convert:
    """Convert the values of a mapping; the others are lost."""

    def convert(found: Found) -> Any:
        value = found.value if isinstance(found.value, bool | int) else str(found.value)
        key = value.lower() if isinstance(value, str) else value
        return allowed[key] if key in allowed else Lost(reason, todo=todo)

    return convert


def four_bits(found: Found) -> Any:
    """Return `load_in_4bit`, which is off beside 8 bits, for which 4 are the nearest."""
    return is_on(found.value) or four_instead_of_eight_bits(found.config)


def four_instead_of_eight_bits(config: Mapping[str, Any]) -> Any:
    """Return the default of `quantization.load_in_4bit`: 16 bits, but 4 where 8 were asked for."""
    if is_on(config.get("load_in_8bit")):
        return Settings({"quantization.load_in_4bit": True}, "4 bits instead of 8; false is 16")
    return False
