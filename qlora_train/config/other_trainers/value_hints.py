"""Values that other trainers have for a setting, and what they are here."""

from typing import Any

from qlora_train.config.other_trainers.axolotl_datasets import SFT_TYPES
from qlora_train.config.other_trainers.key_mapping import Found, Settings
from qlora_train.config.other_trainers.ms_swift import OVERFLOWS
from qlora_train.config.other_trainers.unsloth import FORMATS
from qlora_train.config.other_trainers.value_conversions import (
    DTYPES,
    LOSSES,
    OTHER_OPTIMIZER_NAMES,
    checkpointing,
)

VALUES: dict[str, dict[str, str]] = {
    "train.optim": OTHER_OPTIMIZER_NAMES,
    "quantization.bnb_4bit_compute_dtype": DTYPES | {f"torch.{name}": name for name in DTYPES.values()},
    "data.format": FORMATS | SFT_TYPES | {"openai": "messages"},
    "data.overflow": OVERFLOWS,
    "train.objective": LOSSES,
    "parallel.strategy": {
        **dict.fromkeys(("fsdp1", "fsdp2", "deepspeed", "zero3"), "fsdp"),
        **dict.fromkeys(("multi_gpu", "zero1", "zero2"), "ddp"), "single_gpu": "none",
    },
}  # fmt: skip
"""Setting -> value elsewhere -> value here."""


def value_hint(setting: str, value: Any, choices: list[str]) -> str | None:
    """Return what a refused value of another trainer is here, or None if it is not known.

    Args:
        choices: the words that the setting allows.
    """
    word = str(value).lower()
    if setting == "train.gradient_checkpointing":
        return _checkpointing_hint(value)
    here = VALUES.get(setting, {}).get(word)
    return f"here it is {here}" if here in choices and here != word else None


def _checkpointing_hint(value: Any) -> str | None:
    if not isinstance(value, bool) and str(value).lower() not in ("true", "false", "unsloth", "offload"):
        return None
    outcome = checkpointing(Found(value, {}, {}))
    if isinstance(outcome, Settings):
        return "here it is full, with train.activation_offloading: true"
    return f"here it is {outcome}"
