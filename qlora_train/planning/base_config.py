"""Find a base's config.json without weights and without torch: a local folder, a GGUF header, the Hub, or a shipped table.

The table has the shape keys of well-known models, for plans without a network.
"""

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from qlora_train.config import ModelSection
from qlora_train.config.preflight import missing_model
from qlora_train.utils import network
from qlora_train.utils.errors import ModelError
from qlora_train.utils.visible_text import shortened

TABLE = "well_known_models.json"
MAX_SIZES = {"hidden_size": 10**6, "num_hidden_layers": 10**4, "num_attention_heads": 10**5, "vocab_size": 10**8}
"""Keys of config.json that a plan computes with, and far more than any model has."""
MAX_QUOTED = 40


@dataclass(frozen=True, slots=True)
class BaseConfig:
    """The content of a config.json and where it is from."""

    content: Mapping[str, Any]
    origin: str
    is_local: bool


def find_base_config(model: ModelSection) -> BaseConfig:
    """Return the config of a base; nothing but config.json is fetched.

    Raises:
        ModelError: there is none, or it cannot be read.
    """
    name = model.model_name_or_path
    path = Path(name).expanduser()
    where = f"model.model_name_or_path: {name}"
    if problem := missing_model(name):
        raise ModelError(f"model.model_name_or_path: {problem}")
    if path.suffix == ".gguf":
        from qlora_train.architectures.gguf_configs import gguf_config
        from qlora_train.architectures.gguf_header import read_header

        content = gguf_config(read_header(path))
        _check_sizes(content, where)
        return BaseConfig(content, "GGUF header", True)
    if path.is_dir():
        return BaseConfig(_read(path / "config.json", where), "config.json", True)
    return _hub_config(model, where)


def _read(file: Path, where: str) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{where}: config.json cannot be read ({error}); use a folder written by save_pretrained"
        ) from None
    if not isinstance(content, dict):
        raise ModelError(f"{where}: config.json holds no mapping; use a folder written by save_pretrained")
    _check_sizes(content, where)
    return content


def _check_sizes(content: Mapping[str, Any], where: str) -> None:
    """Refuse sizes that no model has; null and lists by layer are left to Transformers."""
    for key, largest in MAX_SIZES.items():
        value = content.get(key)
        is_size = isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= largest
        if not is_size and value is not None and not isinstance(value, list):
            raise ModelError(
                f"{where}: {key}: {shortened(repr(value), MAX_QUOTED)} is not a size; allowed: a whole number from 1 to "
                f"{largest:,}; use the model as its authors published it"
            )


def _hub_config(model: ModelSection, where: str) -> BaseConfig:
    """Return config.json from the local cache, the shipped table while offline, or the Hub."""
    name = model.model_name_or_path
    if name in well_known_models() and (network.is_offline() or model.revision is None):
        return BaseConfig(well_known_models()[name], "shipped table", False)
    from huggingface_hub import hf_hub_download

    hints: dict[str | int, str] = {
        "GatedRepoError": "the model is gated; accept its terms on its Hub page, then set HF_TOKEN",
        "RepositoryNotFoundError": "no such repository, or a private one; check the name, or set HF_TOKEN",
        "HFValidationError": "set a local path or a Hub id",
        "unreachable": f"{network.unreachable_reason()}; {_planned_without_network(name)}",
    }
    with network.hub_errors(where, ModelError, hints):
        file = hf_hub_download(name, "config.json", revision=model.revision)
    return BaseConfig(_read(Path(file), where), "config.json", False)


def _planned_without_network(name: str) -> str:
    """Return the models of the shipped table whose names are nearest, and how to plan with one."""
    last_parts = {known.rpartition("/")[2].lower(): known for known in well_known_models()}
    wanted = name.rpartition("/")[2].lower()
    nearest = [last_parts[part] for part in difflib.get_close_matches(wanted, last_parts, n=3)]
    if not nearest:
        return f"the shipped table of {len(last_parts)} models has none of a similar name"
    return f"planned without it: {', '.join(nearest)}; for the same shapes: model.model_name_or_path={nearest[0]}"


@cache
def well_known_models() -> dict[str, dict[str, Any]]:
    """Return the shipped table: Hub id -> the keys of config.json that determine shapes."""
    content: dict[str, dict[str, Any]] = json.loads((files(__package__) / TABLE).read_text(encoding="utf-8"))
    return content
