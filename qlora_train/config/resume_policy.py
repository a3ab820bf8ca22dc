"""Which settings and metadata may change when a run resumes, and the effect of a change.

A critical change is refused unless ``run.allow_changed`` names it. Mutable settings affect reporting, memory or the merge
only. Fixed-shape settings determine the tensors of a checkpoint and cannot change.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from qlora_train.utils.errors import did_you_mean

MUTABLE = (
    "parallel.", "run.output_dir", "run.report_to", "run.samples", "run.row_losses", "run.max_minutes", "run.allow_changed",
    "export.",
    "train.logging_steps", "train.save_steps", "train.save_total_limit",
    "train.on_nonfinite", "train.max_skipped_steps", "train.on_loss_spike",
    "train.per_device_eval_batch_size", "data.num_proc", "data.cache_dir", "data.cache_limit",
    "train.auto_find_batch_size", "train.activation_offloading", "train.dequantized_cache_gb",
    "train.gradient_checkpointing",
)  # fmt: skip
"""Settings, or sections, that may change."""

FIXED_SHAPE = (
    "lora.r", "lora.target_modules", "lora.use_dora", "lora.bias", "lora.modules_to_save", "model.new_tokens",
    "train.optim",
)  # fmt: skip
"""Settings that cannot change."""

RUN_METADATA = {
    "base": "the adapter was trained on another base model",
    "base_identity": "the adapter was trained on other weights of the base model",
    "data_fingerprint": "some rows would be trained twice, others never",
    "num_train_rows": "some rows would be trained twice, others never",
    "num_eval_rows": "later evaluations could not be compared with earlier ones",
    "adapter": "the run would have started with other weights",
    "device": "other hardware rounds differently: equal within rounding, not bitwise",
    "num_threads": "sums are split differently: equal within rounding, not bitwise",
    "versions": "other releases may compute differently: not necessarily bitwise equal",
}
"""Metadata that is compared -> the effect of a change."""

_EFFECTS = {
    "model.": "training would continue with another base model or other tokens",
    "quantization.": "the adapter was trained on a differently rounded base",
    "lora.": "the adapter would compute differently from the next step",
    "data.": "some rows would be trained twice, others never or differently",
    "data.eval": "later evaluations could not be compared with earlier ones",
    "train.": "later steps would use different training settings",
    "train.objective": "later steps would train another objective",
    "train.precompute_ref_log_probs": "reference log-probabilities would be rounded differently",
    "train.learning_rate": "later steps would follow another schedule",
    "train.lr_scheduler_type": "later steps would follow another schedule",
    "train.warmup_ratio": "later steps would follow another schedule",
    "train.num_train_epochs": "the run and its schedule would have another length",
    "train.minutes": "the run and its schedule would have another length",
    "train.max_steps": "the run and its schedule would have another length",
    "train.per_device_train_batch_size": "the run would resume at another position in its data",
    "train.gradient_accumulation_steps": "the run would resume at another position in its data",
    "train.group_by_length": "some rows would be trained twice, others never",
    "train.eval_steps": "evaluations would run at other steps, which changes the best step",
    "run.deterministic": "other GPU kernels round differently: equal within rounding, not bitwise",
    "run.seed": "later steps would use other rows, dropout and noise",
}
"""Prefix of a setting -> the effect of a change; the longest prefix counts."""


def is_mutable(key: str) -> bool:
    """Tell whether a setting may change on resume."""
    return key.startswith(MUTABLE)


def why_not_allowed(key: str, settings: Sequence[str]) -> str | None:
    """Return why `run.allow_changed` cannot name `key`, or None; `settings` are all ``section.key``."""
    if key in FIXED_SHAPE:
        return (
            "determines the tensors of a checkpoint and cannot change within a run; start a new run, with "
            "lora.adapter_path to start from this run's adapter"
        )
    if key in settings:
        return "can always change; drop it here" if is_mutable(key) else None
    if key in RUN_METADATA:
        return None
    allowed = [*RUN_METADATA, *(name for name in settings if not is_mutable(name) and name not in FIXED_SHAPE)]
    if hint := did_you_mean(key, allowed):
        return f"is not known{hint}"
    return f"is not known; allowed: {', '.join(RUN_METADATA)}, and critical settings such as train.learning_rate"


def effect_of(key: str) -> str:
    """Return the effect of a change of a setting or of metadata."""
    name = key.partition(".")[0]
    if name in RUN_METADATA:
        return RUN_METADATA[name]
    return _EFFECTS[max((start for start in _EFFECTS if key.startswith(start)), key=len, default="train.")]


def flat_settings(sections: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return settings by ``section.key``."""
    return {f"{section}.{key}": value for section, keys in sections.items() for key, value in keys.items()}
