"""Which settings and facts decide a run, and what it would mean to change one between two parts of it.

A run that goes on under other settings is neither the old run nor a new one, so a change is refused unless
``run.allow_changed`` names it. Some settings only decide what is reported or made of a run; some decide the shape of what
is trained, and a checkpoint fits no other.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from qlora_train.utils.errors import did_you_mean

MUTABLE = (
    "run.output_dir", "run.report_to", "run.max_minutes", "run.allow_changed", "export.",
    "train.logging_steps", "train.save_steps", "train.save_total_limit",
    "train.on_nonfinite", "train.max_skipped_steps", "train.on_loss_spike",
    "train.per_device_eval_batch_size", "data.num_proc", "data.cache_dir", "data.cache_limit",
    "train.auto_find_batch_size", "train.activation_offloading", "train.dequantized_cache_gb",
    "train.gradient_checkpointing",
)  # fmt: skip
"""Settings, or sections of them, that may differ between the parts of one run."""

FIXED_SHAPE = (
    "lora.r", "lora.target_modules", "lora.use_dora", "lora.bias", "lora.modules_to_save", "model.new_tokens",
    "train.optim",
)  # fmt: skip
"""Settings that decide what a checkpoint holds: they cannot change in a run."""

RUN_METADATA = {
    "base": "the adapter was trained on another base model",
    "base_identity": "the adapter was trained on other weights of the base model",
    "data_fingerprint": "some rows would be trained twice, others never",
    "num_train_rows": "some rows would be trained twice, others never",
    "num_eval_rows": "later evaluations could not be compared with earlier ones",
    "adapter": "the run would have begun with other weights",
    "device": "other hardware rounds otherwise: the result would be close, not the same bits",
    "num_threads": "sums are split otherwise: the result would be close, not the same bits",
    "world_size": "rows would be divided otherwise",
    "versions": "other releases may compute otherwise: the result need not be the same bits",
}
"""What decides a run besides its settings, each with what a change of it would do."""

_EFFECTS = {
    "model.": "training would continue with another base model or other tokens",
    "quantization.": "the adapter was trained against another rounding of the base",
    "lora.": "the adapter would compute something else from the next step on",
    "data.": "some rows would be trained twice, others never or differently",
    "data.eval": "later evaluations could not be compared with earlier ones",
    "train.": "later steps would use different training settings",
    "train.learning_rate": "later steps would follow another schedule",
    "train.lr_scheduler_type": "later steps would follow another schedule",
    "train.warmup_ratio": "later steps would follow another schedule",
    "train.num_train_epochs": "the run would have another length, and its schedule with it",
    "train.max_steps": "the run would have another length, and its schedule with it",
    "train.per_device_train_batch_size": "the run would resume at another position in its data",
    "train.gradient_accumulation_steps": "the run would resume at another position in its data",
    "train.group_by_length": "some rows would be trained twice, others never",
    "train.eval_steps": "evaluations would come at other steps, and the best step with them",
    "run.deterministic": "other GPU kernels round otherwise: the result would be close, not the same bits",
    "run.seed": "later steps would have other rows, dropout and noise",
}
"""What a change of a setting would do, by key or section; the longest that fits counts."""


def is_mutable(key: str) -> bool:
    """Say whether a setting may differ between the parts of a run."""
    return key.startswith(MUTABLE)


def why_not_allowed(key: str, settings: Sequence[str]) -> str | None:
    """Return why `run.allow_changed` cannot name a key, or None.

    Args:
        key: what it names.
        settings: every setting, as ``section.key``.
    """
    if key in FIXED_SHAPE:
        return (
            "decides what a checkpoint holds and cannot change in a run; begin a new run, with lora.adapter_path where it "
            "should start from this one's adapter"
        )
    if key in settings:
        return "may always differ; drop it here" if is_mutable(key) else None
    if key in RUN_METADATA:
        return None
    allowed = [*RUN_METADATA, *(name for name in settings if not is_mutable(name) and name not in FIXED_SHAPE)]
    if hint := did_you_mean(key, allowed):
        return f"is not known{hint}"
    return (
        f"is not known; allowed: {', '.join(RUN_METADATA)}, and settings that decide a run, such as train.learning_rate"
    )


def effect_of(key: str) -> str:
    """Return what a change of a setting or fact would do."""
    fact = key.partition(".")[0]
    if fact in RUN_METADATA:
        return RUN_METADATA[fact]
    return _EFFECTS[max((start for start in _EFFECTS if key.startswith(start)), key=len, default="train.")]


def flat_settings(sections: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return settings by ``section.key``."""
    return {f"{section}.{key}": value for section, keys in sections.items() for key, value in keys.items()}
