"""The model card of an exported folder, and an adapter_config.json without this machine's paths.

PEFT writes the base's local path into its config, its card and a tag, and leaves the card empty. Here a base is named by
its Hub id, or by its folder's last name when it has none.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Literal

import yaml
from transformers import AutoTokenizer, GenerationConfig

from qlora_train.config.schema import RunConfig
from qlora_train.evaluation.generation import stop_token_ids
from qlora_train.export.loading_code import adapter_code, needs_package, usage_code
from qlora_train.export.merging.adapter_deltas import ADAPTER_CONFIG
from qlora_train.models import LoadedModel
from qlora_train.utils.atomic_io import write_text
from qlora_train.utils.errors import MergeError

Kind = Literal["adapter", "merged"]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
NAME_KEYS = ("model_name_or_path", "base_model_name_or_path", "path")
"""Settings that hold a Hub id or a path."""
PATH_KEYS = ("adapter_path", "output_dir", "chat_template", "cache_dir")
"""Settings that hold a path, or a name without slashes."""
FILE_SUFFIXES = (".gguf", ".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".txt", ".gz", ".zst")
_ABSOLUTE = re.compile(r"^(/|~|\.\.([/\\]|$)|\\\\|[A-Za-z]:[/\\]|file:)")


def is_hub_id(name: str) -> bool:
    """Say whether a name is `owner/name` on the Hub: of that form, no file of ours, and nothing local of that name."""
    return bool(_HUB_ID.fullmatch(name)) and not name.endswith(FILE_SUFFIXES) and not Path(name).exists()


def public_name(name: str) -> str:
    """Return a Hub id as it is, and of a path only its last part."""
    return name if is_hub_id(name) else _last_part(name)


def write_card(
    folder: Path,
    *,
    base: str,
    revision: str | None,
    config: RunConfig,
    metrics: Mapping[str, float],
    num_train_rows: int | None,
    library_versions: Mapping[str, str],
    kind: Kind,
    loading: str,
    merge: str = "",
) -> None:
    """Write README.md: Hub metadata, what it was trained on, how, the measured results, how to load it.

    Args:
        base: Hub id or path of the base model.
        metrics: results by name, e.g. `{"held-out loss": 0.19}`.
        library_versions: by name, e.g. `{"torch": "2.13.0"}`.
        kind: an adapter, or merged weights.
        loading: the section about loading, of `adapter_loading` or `merged_loading`.
        merge: the section about a merge, empty where there is none.
    """
    sections = [
        _front_matter(base, config, kind),
        _summary(folder, base, revision, config, kind),
        loading,
        _data(config, num_train_rows),
        "## Results\n\n"
        + _table("Metric", "Value", {k: f"{v:.4g}" for k, v in metrics.items()}, "Nothing was measured."),
        *([merge] if merge else []),
        f"## Settings\n\nEvery setting of the run:\n\n```yaml\n{_settings(config)}```",
        "## Versions\n\n" + _table("Library", "Version", library_versions, "Not recorded."),
    ]
    write_text(folder / "README.md", "\n\n".join(sections) + "\n")


def clean_adapter_config(folder: Path, base: str, revision: str | None) -> None:
    """Rewrite adapter_config.json without local paths; the base is named as `public_name` does.

    Call it before the folder's manifest is written.

    Raises:
        MergeError: there is no readable adapter_config.json.
    """
    path = folder / ADAPTER_CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MergeError(f"{path}: not readable ({error}); save the adapter again") from None
    config["base_model_name_or_path"] = public_name(base)
    config["revision"] = revision
    write_text(path, json.dumps(_without_paths(config), indent=2, sort_keys=True) + "\n")


def _last_part(path: str) -> str:
    name = PureWindowsPath(path).name if "\\" in path else PurePosixPath(path).name
    return name or "local"


def _without_paths(value: Any) -> Any:
    """Return JSON-like data in which paths are cut to their last part: those of settings, and all absolute ones."""
    if isinstance(value, dict):
        return {key: _setting_without_paths(key, item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_paths(item) for item in value]
    return _last_part(value) if isinstance(value, str) and _ABSOLUTE.match(value) else value


def _setting_without_paths(key: str, value: Any) -> Any:
    if isinstance(value, str) and key in NAME_KEYS:
        return public_name(value)
    return _last_part(value) if isinstance(value, str) and key in PATH_KEYS else _without_paths(value)


def _front_matter(base: str, config: RunConfig, kind: Kind) -> str:
    data: dict[str, Any] = {
        "library_name": "peft" if kind == "adapter" else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["qlora" if config.quantization.load_in_4bit else "lora", "trl", "sft", "qlora-train"],
    }
    if is_hub_id(base):
        data |= {"base_model": base, "base_model_relation": "adapter" if kind == "adapter" else "finetune"}
    datasets = [source.path for source in config.data.train if is_hub_id(source.path)]
    if datasets:
        data["datasets"] = datasets
    return f"---\n{yaml.safe_dump(data, sort_keys=False)}---"


def _summary(folder: Path, base: str, revision: str | None, config: RunConfig, kind: Kind) -> str:
    how = "QLoRA (the base in 4 bits)" if config.quantization.load_in_4bit else "LoRA"
    what = "A LoRA adapter for" if kind == "adapter" else "Merged 16-bit weights, fine-tuned from"
    at = f", revision `{revision}`" if revision else ""
    return (
        f"# {_title(folder, base)}\n\n{what} `{public_name(base)}`{at}, trained with {how} on every layer that "
        f"`target_modules` names: rank {config.lora.r}, alpha {config.lora.lora_alpha:g}."
    )


def _title(folder: Path, base: str) -> str:
    """Return a name for people: the folder's may be a stage's own (`.final.staging`), then the base's serves."""
    name = folder.name.strip(".").removesuffix(".staging")
    return f"{_last_part(base)}: {name}"


def adapter_loading(loaded: LoadedModel, config: RunConfig, system: str) -> str:
    """Return the section about loading an adapter.

    Args:
        loaded: the base as the run loaded it.
        config: the run's settings.
        system: the system prompt that the training rows share, empty where they share none.
    """
    base = public_name(loaded.source.name)
    notes = []
    if config.quantization.load_in_4bit:
        notes.append(
            f"The adapter was trained on the base in 4 bits ({config.quantization.bnb_4bit_quant_type.upper()}), and these "
            "lines load it so. Over the base in 16 bits it is another model, which was not trained. For 16 bits, use "
            "the merged model: `qlora-train merge RUN-FOLDER` writes it and compares it with the adapter."
        )
    if reason := needs_package(loaded, config):
        notes.append(f"The lines need the package `qlora-train`: {reason}.")
    if config.model.rope_scaling is not None:
        notes.append("The adapter was trained with RoPE scaling, which the base's own config does not have.")
    if config.model.new_tokens:
        notes.append("The adapter was trained with new tokens: the base's vocabulary is resized before it is loaded.")
    if not is_hub_id(loaded.source.name):
        notes.append("The base was a local folder or file: give its path on your machine.")
    code = adapter_code(loaded, config, base)
    ends = stop_token_ids(loaded.model, loaded.tokenizer)
    usage = usage_code(loaded.tokenizer, loaded.model.generation_config, system=system, ends=ends)
    return _loading_section(code, usage, notes)


def merged_loading(folder: Path, code: str, system: str, *, trust_remote_code: bool) -> str:
    """Return the section about loading the merged model in `folder` by the lines of `merged_code`."""
    generation = GenerationConfig.from_pretrained(folder, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    return _loading_section(code, usage_code(tokenizer, generation, system=system), [])


def _loading_section(code: str, usage: str, notes: Sequence[str]) -> str:
    parts = ["## Loading", _block(code), *notes]
    if usage:
        parts += ["A question, as the model was asked in training, and its greedy answer:", _block(usage)]
    return "\n\n".join(parts)


def _block(code: str) -> str:
    return f"```python\n{code}\n```"


def _data(config: RunConfig, num_train_rows: int | None) -> str:
    names = ", ".join(f"`{public_name(source.path)}`" for source in config.data.train)
    train_on = {
        "assistant": "every assistant turn", "last": "the last assistant turn", "completion": "all that follows the prompt",
        "all": "every token",
    }  # fmt: skip
    rows = "Training rows streamed" if num_train_rows is None else f"{num_train_rows} training rows"
    return f"## Data\n\n{rows} from {names}; loss on {train_on[config.data.train_on]}."


def _table(name: str, value: str, rows: Mapping[str, str], empty: str) -> str:
    if not rows:
        return empty
    lines = [f"| {name} | {value} |", "|---|---|", *(f"| {key} | {item} |" for key, item in rows.items())]
    return "\n".join(lines)


def _settings(config: RunConfig) -> str:
    settings: str = yaml.safe_dump(_without_paths(config.model_dump(mode="json")), sort_keys=False)
    return settings
