"""The model card of an adapter or merged model, and an adapter_config.json without paths of this machine.

PEFT writes the base's local path into its config, card and tags, and leaves the card empty. Here a base is named by its
Hub id, or by the last part of its path.
"""

import json
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Literal

import yaml
from huggingface_hub import ModelCardData
from transformers import AutoTokenizer, GenerationConfig

from qlora_train.adapters.adapter_folder import ADAPTER_CONFIG
from qlora_train.config.objectives import OBJECTIVES
from qlora_train.config.schema import RunConfig
from qlora_train.evaluation.generation import stop_token_ids
from qlora_train.export.loading_code import adapter_code, needs_package, usage_code
from qlora_train.models import LoadedModel
from qlora_train.utils.atomic_io import write_text
from qlora_train.utils.errors import MergeError

Kind = Literal["adapter", "merged"]
LIBRARIES = ("torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate", "datasets")
"""Libraries whose versions can change a run's numbers."""
ID_KEYS = ("model_name_or_path", "base_model_name_or_path", "path")
"""Settings with a Hub id or a path."""
PATH_KEYS = ("adapter_path", "output_dir", "chat_template", "cache_dir")
"""Settings with a path, or a name without slashes."""
FILE_SUFFIXES = (".gguf", ".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".txt", ".gz", ".zst")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_ABSOLUTE = re.compile(r"^(/|~|\.\.([/\\]|$)|\\\\|[A-Za-z]:[/\\]|file:)")
_TRAIN_ON = {
    "assistant": "every assistant turn", "last": "the last assistant turn", "completion": "all that follows the prompt",
    "all": "every token",
}  # fmt: skip


def library_versions() -> dict[str, str]:
    """Return the versions of the libraries that can change a run's numbers."""
    return {name: version(name) for name in LIBRARIES}


def is_hub_id(name: str) -> bool:
    """Return whether a name is `owner/name` on the Hub: of that form, no data file and no local path."""
    return bool(_HUB_ID.fullmatch(name)) and not name.endswith(FILE_SUFFIXES) and not Path(name).exists()


def public_name(name: str) -> str:
    """Return a Hub id unchanged, and the last part of a path."""
    return name if is_hub_id(name) else _last_part(name)


def write_card(
    folder: Path,
    *,
    base: str,
    revision: str | None,
    config: RunConfig,
    metrics: Mapping[str, float],
    num_train_rows: int | None,
    kind: Kind,
    loading: str,
    merge: str = "",
) -> None:
    """Write README.md: Hub metadata, training data, results, settings, and the code that loads the model.

    Args:
        base: Hub id or path of the base model.
        num_train_rows: None for streamed data.
        loading: section that `adapter_loading` or `merged_loading` returned.
        merge: section about a merge; empty for none.
    """
    names = ", ".join(f"`{public_name(source.path)}`" for source in config.data.train)
    objective = OBJECTIVES[config.train.objective]
    has_pairs = objective.dataset_type == "preference"
    unit = "pairs" if has_pairs else "rows"
    learned = "loss on" if objective.dataset_type == "language_modeling" else f"objective `{objective.name}` on"
    rows = f"Training {unit} streamed" if num_train_rows is None else f"{num_train_rows} training {unit}"
    settings = yaml.safe_dump(_without_paths(config.model_dump(mode="json")), sort_keys=False)
    results = _table("Metric", "Value", {name: f"{value:.4g}" for name, value in metrics.items()})
    sections = [
        _front_matter(base, config, kind),
        _summary(folder, base, revision, config, kind),
        loading,
        f"## Data\n\n{rows} from {names}; {learned} {_TRAIN_ON[config.data.train_on]}.",
        f"## Results\n\n{results if metrics else 'Nothing was measured.'}",
        *([merge] if merge else []),
        f"## Settings\n\nEvery setting of the run:\n\n```yaml\n{settings}```",
        f"## Versions\n\n{_table('Library', 'Version', library_versions())}",
    ]
    write_text(folder / "README.md", "\n\n".join(sections) + "\n")


def clean_adapter_config(folder: Path, base: str, revision: str | None) -> None:
    """Remove local paths from adapter_config.json and name the base as `public_name` does, before the manifest is written.

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


def adapter_loading(loaded: LoadedModel, config: RunConfig, system: str) -> str:
    """Return the card's section about loading an adapter; `system` is the shared system prompt of the rows, or empty."""
    base = public_name(loaded.source.name)
    notes = []
    if config.quantization.load_in_4bit:
        notes.append(
            f"The adapter was trained on the base in 4 bits ({config.quantization.bnb_4bit_quant_type.upper()}), and this "
            "code loads it so. On the base in 16 bits it is another, untrained model. For 16 bits use the merged model: "
            "`qlora-train merge RUN-FOLDER` writes it and compares it with the adapter."
        )
    if reason := needs_package(loaded, config):
        notes.append(f"The code needs the package `qlora-train`: {reason}.")
    if config.model.rope_scaling is not None:
        notes.append("The adapter was trained with RoPE scaling, which the base's own config does not have.")
    if config.model.new_tokens:
        notes.append("The adapter was trained with new tokens: the code resizes the base's vocabulary first.")
    if not is_hub_id(loaded.source.name):
        notes.append("The base was a local folder or file: give its path on your machine.")
    ends = stop_token_ids(loaded.model, loaded.tokenizer)
    usage = usage_code(loaded.tokenizer, loaded.model.generation_config, system=system, ends=ends)
    return _loading_section(adapter_code(loaded, config, base), usage, notes)


def merged_loading(folder: Path, code: str, system: str, *, trust_remote_code: bool) -> str:
    """Return the card's section about loading the merged model in `folder` with `code`."""
    generation = GenerationConfig.from_pretrained(folder, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    return _loading_section(code, usage_code(tokenizer, generation, system=system), [])


def _loading_section(code: str, usage: str, notes: Sequence[str]) -> str:
    parts = ["## Loading", f"```python\n{code}\n```", *notes]
    if usage:
        parts += ["A question, asked as in training, and its greedy answer:", f"```python\n{usage}\n```"]
    return "\n\n".join(parts)


def _last_part(path: str) -> str:
    name = PureWindowsPath(path).name if "\\" in path else PurePosixPath(path).name
    return name or "local"


def _without_paths(value: Any, key: str = "") -> Any:
    """Cut paths in JSON data to their last part: those in known settings, and all absolute ones."""
    if isinstance(value, dict):
        return {name: _without_paths(item, name) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_paths(item) for item in value]
    if not isinstance(value, str):
        return value
    if key in ID_KEYS:
        return public_name(value)
    return _last_part(value) if key in PATH_KEYS or _ABSOLUTE.match(value) else value


def _front_matter(base: str, config: RunConfig, kind: Kind) -> str:
    data = ModelCardData(
        library_name="peft" if kind == "adapter" else "transformers",
        pipeline_tag="text-generation",
        tags=["qlora" if config.quantization.load_in_4bit else "lora", "trl", config.train.objective, "qlora-train"],
        datasets=[source.path for source in config.data.train if is_hub_id(source.path)] or None,
        base_model=base if is_hub_id(base) else None,
        base_model_relation=("adapter" if kind == "adapter" else "finetune") if is_hub_id(base) else None,
    )
    return f"---\n{data.to_yaml()}\n---"


def _summary(folder: Path, base: str, revision: str | None, config: RunConfig, kind: Kind) -> str:
    name = folder.name.strip(".").removesuffix(".staging")
    method = "QLoRA (the base in 4 bits)" if config.quantization.load_in_4bit else "LoRA"
    what = "A LoRA adapter for" if kind == "adapter" else "Merged 16-bit weights, fine-tuned from"
    at = f", revision `{revision}`" if revision else ""
    return (
        f"# {_last_part(base)}: {name}\n\n{what} `{public_name(base)}`{at}, trained with {method} on every layer that "
        f"`target_modules` names: rank {config.lora.r}, alpha {config.lora.lora_alpha:g}."
    )


def _table(name: str, value: str, rows: Mapping[str, str]) -> str:
    return "\n".join([f"| {name} | {value} |", "|---|---|", *(f"| {key} | {item} |" for key, item in rows.items())])
