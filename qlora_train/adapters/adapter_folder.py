"""adapter_config.json of an adapter on disk, read as untrusted JSON: PEFT is handed what was understood, and nothing else.

PEFT itself would import modules that the file names (`megatron_core`), look for a missing file on the Hub, unpickle an
`adapter_model.bin`, and let the settings of a dozen other methods act. Here a setting is one of `AdapterSettings`, or it is
one of `IDLE`, or it is switched off; with anything else the adapter is refused.
"""

import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from peft import LoraConfig
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qlora_train.models import BaseSource
from qlora_train.utils.errors import ConfigError

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MAX_BYTES = 1_000_000
SHOWN_CHARACTERS = 60
IDLE = {
    "peft_version",
    "inference_mode",
    "megatron_core",
    "qalora_group_size",
    "eva_config",
    "runtime_config",
    "exclude_modules",
}
"""Settings whose value says nothing about trained weights without another setting, which is refused, or which speaks of
modules that the trained model has not (`exclude_modules`, the towers of a multimodal one); PEFT is handed none of them."""
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
TRANSFORMERS_MODULE = re.compile(r"transformers(\.\w+)*")
HUB_CACHE = re.compile(r"models--([\w.-]+?)--([\w.-]+)")

Names = Annotated[list[Annotated[str, Field(min_length=1, max_length=500)]], Field(max_length=20_000)]
TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=1_000_000)]


class AdapterSettings(BaseModel):
    """What a LoRA adapter is, by the names that PEFT writes."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    peft_type: Literal["LORA"]
    task_type: Literal["CAUSAL_LM"] | None = None
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
    """How it began; other ways changed the base too."""
    modules_to_save: Names | None = None
    trainable_token_indices: dict[str, TokenIds] | TokenIds | None = None

    def peft_config(self, folder: Path) -> LoraConfig:
        """Return PEFT's config of the same adapter; the initial weights do not matter, since all are replaced.

        Raises:
            ConfigError: the layers are a regular expression, which a run of ours never writes.
        """
        if isinstance(self.target_modules, str):
            raise ConfigError(
                f"{folder / ADAPTER_CONFIG}: target_modules: {_shown(self.target_modules)}; expected a list of layer "
                "names; restore the file"
            )
        return LoraConfig(
            task_type="CAUSAL_LM",
            r=self.r,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            target_modules=self.target_modules,
            target_parameters=self.target_parameters,
            bias=self.bias,
            use_rslora=self.use_rslora,
            use_dora=self.use_dora,
            modules_to_save=self.modules_to_save,
            trainable_token_indices=self.trainable_token_indices,
        )

    def check_token_rows(self, folder: Path, new_token_ids: tuple[int, ...], where: str) -> Self:
        """Refuse trained vocabulary rows that are not those of `model.new_tokens`.

        Raises:
            ConfigError: rows of other tokens.
        """
        given = self.trainable_token_indices or {}
        lists = given.values() if isinstance(given, dict) else [given]
        others = sorted({token_id for ids in lists for token_id in ids} - set(new_token_ids))
        if others:
            raise ConfigError(
                f"{where}{folder / ADAPTER_CONFIG}: trainable_token_indices: rows such as {others[0]} are no rows of "
                "model.new_tokens; give the new tokens that the adapter was trained with"
            )
        return self

    def check_experts(self, folder: Path, known: Collection[str], where: str) -> Self:
        """Refuse expert weights that are not those of the base, by full name.

        Raises:
            ConfigError: a parameter that is no stack of experts of the base.
        """
        others = sorted(set(self.target_parameters or ()) - set(known))
        if others:
            raise ConfigError(
                f"{where}{folder / ADAPTER_CONFIG}: target_parameters: {_shown(others[0])} is no stack of experts of the "
                "base model; use the base that the adapter was trained on"
            )
        return self


def read_settings(folder: Path, base: BaseSource, where: str = "") -> AdapterSettings:
    """Read and check what an adapter says of itself.

    Args:
        folder: a PEFT adapter folder; its weights must be there too, as safetensors.
        base: the base model that it will be put on.
        where: begins every message, e.g. the setting that named the folder.

    Raises:
        ConfigError: no adapter there, not a plain LoRA adapter, or one of another base.
    """
    content = _read_json(folder, where)
    place = f"{where}{folder / ADAPTER_CONFIG}"
    known = {key: value for key, value in content.items() if key in AdapterSettings.model_fields}
    try:
        settings = AdapterSettings.model_validate(known)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"][:1]))
        found = "" if first["type"] == "missing" else f" (found {_shown(first['input'])})"
        raise ConfigError(
            f"{place}: {key}: {first['msg']}{found}; only plain LoRA adapters of a causal language model are read"
        ) from None
    content = {key: value for key, value in content.items() if key != "auto_mapping" or not _is_plain_mapping(value)}
    for key, value in content.items():
        if key not in known and key not in IDLE and not _is_off(value):
            raise ConfigError(
                f"{place}: {_shown(key)}: {_shown(value)} is no setting of a plain LoRA adapter, and no other is read; "
                "allowed: null"
            )
    _check_base(settings.base_model_name_or_path or "", base, place)
    return settings


def _read_json(folder: Path, where: str) -> dict[str, Any]:
    """Return the content of adapter_config.json, bounded in size and depth."""
    file = folder / ADAPTER_CONFIG
    try:
        for needed in (file, folder / ADAPTER_WEIGHTS):
            if not needed.is_file():  # PEFT would look for a pickle, or for a repository of this name
                raise unreadable(where, folder, f"{needed.name} is missing")
        with file.open("rb") as stream:
            text = stream.read(MAX_BYTES + 1)
        if len(text) > MAX_BYTES:
            raise unreadable(where, folder, f"{file.name} is larger than {MAX_BYTES:,} bytes")
        content = json.loads(text)
    except (OSError, ValueError) as error:
        raise unreadable(where, folder, str(error)) from None
    except RecursionError:
        raise unreadable(where, folder, f"{file.name} is nested too deep") from None
    if not isinstance(content, dict):
        raise unreadable(where, folder, f"{file.name} holds no mapping")
    return content


def unreadable(where: str, folder: Path, reason: str) -> ConfigError:
    """Return the error for a folder that holds no adapter."""
    return ConfigError(
        f"{where}{folder}: holds no adapter that can be read ({reason}); give a folder that PEFT wrote, with "
        f"{ADAPTER_CONFIG} and {ADAPTER_WEIGHTS}"
    )


def _check_base(named: str, base: BaseSource, place: str) -> None:
    """Refuse an adapter that names another base; one that names none is judged by its tensors alone.

    Two Hub ids must be equal. A local path says only how somebody called a folder: its last part counts then, or the Hub
    id that a cache of the Hub has in its folder names.
    """
    if not named:
        return
    ours = base.name
    theirs = "/".join(cached[-1]) if (cached := HUB_CACHE.findall(named)) else named
    both_on_hub = base.revision is not None and HUB_ID.fullmatch(theirs)
    same = theirs.lower() == ours.lower() if both_on_hub else _last_part(theirs) == _last_part(ours)
    if not same:
        raise ConfigError(
            f"{place}: base_model_name_or_path: {_shown(named)} is another base than {_shown(ours)}; two Hub ids must be "
            "equal, and the last part of local paths; if they are the same model, set it to null there"
        )


def _last_part(name: str) -> str:
    return re.split(r"[/\\]", name.rstrip("/\\"))[-1].lower().removesuffix(".gguf")


def _is_plain_mapping(value: Any) -> bool:
    """Say whether this is what PEFT writes of a base's class for an adapter without a task type; it is not used."""
    return (
        isinstance(value, dict)
        and value.keys() == {"base_model_class", "parent_library"}
        and all(isinstance(part, str) for part in value.values())
        and TRANSFORMERS_MODULE.fullmatch(value["parent_library"]) is not None
    )


def _is_off(value: Any) -> bool:
    return value is None or value is False or value in ("", [], {})


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 3] + "..."
