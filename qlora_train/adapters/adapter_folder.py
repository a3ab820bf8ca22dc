"""PEFT adapter folders: adapter_config.json, read as untrusted JSON, and the weights.

PEFT itself would import modules that the file names (`megatron_core`), look for a missing file on the Hub, unpickle
`adapter_model.bin`, and apply the settings of other methods. Here PEFT gets the fields of `AdapterSettings` alone: a file
with any other setting that is not in `IGNORED` and not off is refused.
"""

import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from peft import LoraConfig
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file

from qlora_train.adapters.precision import find_non_finite
from qlora_train.models import BaseSource
from qlora_train.utils.errors import ConfigError, first_line

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MAX_BYTES = 1_000_000
IGNORED = {
    "peft_version", "inference_mode", "megatron_core", "qalora_group_size", "eva_config", "runtime_config",
    "exclude_modules",
    "fan_in_fan_out",  # PEFT sets it by the class of the base layer
}  # fmt: skip
"""Settings without effect on trained weights, unless together with another one that is refused."""
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
HUB_CACHE = re.compile(r"models--([\w.-]+?)--([\w.-]+)")

Names = Annotated[list[Annotated[str, Field(min_length=1, max_length=500)]], Field(max_length=20_000)]
TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=1_000_000)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class AutoMapping(_Strict):
    """The base's class, which PEFT writes for adapters without a task type; not used."""

    base_model_class: str
    parent_library: str = Field(pattern=r"^transformers(\.\w+)*$")


class AdapterSettings(_Strict):
    """A plain LoRA adapter, in PEFT's names."""

    peft_type: Literal["LORA"]
    task_type: Literal["CAUSAL_LM"] | None = None
    auto_mapping: AutoMapping | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    r: int = Field(ge=1, le=4096)
    lora_alpha: float = Field(gt=0)
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: Names | str
    target_parameters: Names | None = None
    bias: Literal["none", "all", "lora_only"] = "none"
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: bool | Literal["gaussian", "eva"] = True
    """Initializations that leave the base unchanged."""
    modules_to_save: Names | None = None
    trainable_token_indices: dict[str, TokenIds] | TokenIds | None = None

    def token_ids(self) -> set[int]:
        """Return the trained vocabulary rows of all modules."""
        by_module = self.trainable_token_indices or {}
        lists = by_module.values() if isinstance(by_module, dict) else [by_module]
        return {token_id for ids in lists for token_id in ids}

    def peft_config(self, folder: Path) -> LoraConfig:
        """Return PEFT's config of the adapter, without its initialization, which the weights replace.

        Raises:
            ConfigError: `target_modules` is a regular expression, which no run writes.
        """
        if isinstance(self.target_modules, str):
            raise ConfigError(
                f"{folder / ADAPTER_CONFIG}: target_modules: {shorten(self.target_modules)}; expected a list of layer "
                "names; restore the file"
            )
        keys = (
            "r", "lora_alpha", "lora_dropout", "target_modules", "target_parameters", "bias", "use_rslora", "use_dora",
            "modules_to_save", "trainable_token_indices",
        )  # fmt: skip
        return LoraConfig(task_type="CAUSAL_LM", **{key: getattr(self, key) for key in keys})


def read_adapter_config(folder: Path, where: str = "") -> dict[str, Any]:
    """Return the content of adapter_config.json, bounded in size and depth.

    Args:
        folder: a PEFT adapter folder.
        where: prefix of error messages, such as the setting that names the folder.

    Raises:
        ConfigError: config or weights missing, or no JSON mapping.
    """
    file = folder / ADAPTER_CONFIG
    try:
        for needed in (file, folder / ADAPTER_WEIGHTS):
            if not needed.is_file():  # PEFT would look for a pickle, or for a repository of this name
                raise _unreadable(where, folder, f"{needed.name} is missing")
        with file.open("rb") as stream:
            text = stream.read(MAX_BYTES + 1)
        if len(text) > MAX_BYTES:
            raise _unreadable(where, folder, f"{file.name} is larger than {MAX_BYTES:,} bytes")
        content = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise _unreadable(where, folder, f"{file.name}: {first_line(error)}") from None
    if not isinstance(content, dict):
        raise _unreadable(where, folder, f"{file.name} holds no mapping")
    return content


def read_adapter_settings(folder: Path, base: BaseSource | None, where: str = "") -> AdapterSettings:
    """Return the settings of an adapter for this base, or for any base if it is None.

    Raises:
        ConfigError: no adapter, not a plain LoRA adapter, or an adapter of another base.
    """
    content = read_adapter_config(folder, where)
    source = f"{where}{folder / ADAPTER_CONFIG}"
    known = {
        key: value
        for key, value in content.items()
        if key in AdapterSettings.model_fields and not (key == "auto_mapping" and _is_off(value))
    }
    try:
        settings = AdapterSettings.model_validate(known)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        found = "" if first["type"] == "missing" else f" (found {shorten(first['input'])})"
        raise ConfigError(
            f"{source}: {first['loc'][0]}: {first['msg']}{found}; only plain LoRA adapters of a causal language model are "
            "supported"
        ) from None
    for key in sorted(content.keys() - known.keys() - IGNORED):
        value = content[key]
        if not _is_off(value):
            raise ConfigError(
                f"{source}: {shorten(key)}: {shorten(value)} is no setting of a plain LoRA adapter; allowed: null"
            )
    if base is not None:
        _check_base(settings.base_model_name_or_path, base, source)
    return settings


def read_adapter_weights(folder: Path, where: str = "") -> dict[str, torch.Tensor]:
    """Return the tensors of an adapter by name.

    Raises:
        ConfigError: the file is damaged or holds NaN or infinity.
    """
    file = folder / ADAPTER_WEIGHTS
    try:
        weights = load_file(file)
    except (OSError, SafetensorError) as error:
        raise _unreadable(where, folder, first_line(error)) from None
    if problem := find_non_finite(weights):
        raise ConfigError(f"{where}{folder}: {file.name}: {problem}; use an earlier checkpoint of its training")
    return weights


def _is_off(value: Any) -> bool:
    return value is None or value is False or value in ("", [], {})


def _unreadable(where: str, folder: Path, reason: str) -> ConfigError:
    return ConfigError(
        f"{where}{folder}: holds no readable adapter ({reason}); use a folder that PEFT wrote, with {ADAPTER_CONFIG} and "
        f"{ADAPTER_WEIGHTS}"
    )


def _check_base(stored: str | None, base: BaseSource, source: str) -> None:
    """Refuse an adapter of another base.

    Hub ids must be equal. Of a local path the last part counts, or the Hub id in a path of the Hub's cache. An adapter
    without a base is checked by its tensors alone.
    """
    if not stored:
        return
    name = "/".join(cached[-1]) if (cached := HUB_CACHE.findall(stored)) else stored
    both_on_hub = base.revision is not None and HUB_ID.fullmatch(name)
    same = name.lower() == base.name.lower() if both_on_hub else _last_part(name) == _last_part(base.name)
    if not same:
        raise ConfigError(
            f"{source}: base_model_name_or_path: {shorten(stored)} is another base than {shorten(base.name)}; two Hub ids "
            "must be equal, and the last part of local paths; if they are the same model, set it to null there"
        )


def _last_part(name: str) -> str:
    return re.split(r"[/\\]", name.rstrip("/\\"))[-1].lower().removesuffix(".gguf")


def shorten(value: Any, limit: int = 60) -> str:
    """Return the repr of an untrusted value, truncated."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
