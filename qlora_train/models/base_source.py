"""Locate the base model: a local folder, a snapshot of a Hub repository, or a conversion of a GGUF or .bin file.

The result is always a local folder, so that loading, merging and cards read plain files.
"""

import hashlib
import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qlora_train.config import ModelSection
from qlora_train.config.preflight import missing_model
from qlora_train.models.conversion_cache import conversion_cache
from qlora_train.utils import network
from qlora_train.utils.errors import ModelError

logger = logging.getLogger(__name__)

_FILES = ["*.json", "*.jinja", "*.model", "tokenizer*", "vocab*", "merges*"]
_WEIGHTS = ["model*.safetensors"]
_PICKLED_WEIGHTS = ["pytorch_model*.bin"]
_CODE = ["*.py"]
_HUB_HINTS: dict[str | int, str] = {
    "GatedRepoError": "the model is gated; accept its terms on its Hub page, then set HF_TOKEN",
    "RevisionNotFoundError": "no such revision; check model.revision",
    "RepositoryNotFoundError": "no such repository, or a private one; check the name, or set HF_TOKEN",
    401: "HF_TOKEN is missing or not valid; check HF_TOKEN",
    403: "HF_TOKEN has no access to it; check HF_TOKEN",
    "HFValidationError": "set a local path or a Hub id",
}


@dataclass(frozen=True)
class BaseSource:
    """The base model on disk.

    Attributes:
        name: for cards and configs: the Hub id, or the last part of a local path.
        revision: downloaded commit; None for local files.
        config: content of config.json.
        gguf_file: the file that `folder` was converted from, if it was one.
    """

    folder: Path
    name: str
    revision: str | None
    config: dict[str, Any]
    gguf_file: Path | None = None

    def identity(self) -> str:
        """Return the commit of a Hub model, or a hash of the local config and of samples of the weights."""
        if self.revision is not None:
            return self.revision
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for path in sorted(self.folder.glob("*.safetensors")):
            size = path.stat().st_size
            digest.update(f"{path.name} {size}".encode())  # and 64 evenly spaced blocks, to take seconds
            with path.open("rb") as file:
                for block in range(64):
                    file.seek(size * block // 64)
                    digest.update(file.read(1 << 16))
        return digest.hexdigest()


def resolve_base(model: ModelSection, *, weights: bool = True) -> BaseSource:
    """Download or convert the base model's files if necessary.

    Args:
        weights: download the weights too, not only the config and the tokenizer.

    Raises:
        ModelError: the folder, file or repository does not exist or is no model.
    """
    path = Path(model.model_name_or_path).expanduser()
    if path.suffix == ".gguf":
        from qlora_train.models.gguf_base import convert_gguf

        folder = convert_gguf(path, conversion_cache("gguf"))
        return BaseSource(folder, path.stem, None, _read_config(folder, model.model_name_or_path), path.resolve())
    if path.is_dir():
        source = BaseSource(path, path.resolve().name, None, _read_config(path, model.model_name_or_path))
    else:
        if problem := missing_model(model.model_name_or_path):
            raise ModelError(f"model.model_name_or_path: {problem}")
        source = _download(model, weights=weights)
    if (weights or source.revision is None) and _has_legacy_bin(source.folder):
        from qlora_train.models.legacy_bin import convert_legacy_bin

        where = f"model.model_name_or_path: {model.model_name_or_path}"
        source = replace(source, folder=convert_legacy_bin(source.folder, conversion_cache("legacy_bin"), where))
    if model.trust_remote_code:
        from qlora_train.models.remote_code import check_trusted_code

        check_trusted_code(source.folder, source.name, source.revision)
    return source


def _has_legacy_bin(folder: Path) -> bool:
    """Return whether a folder has .bin weights and no safetensors."""
    has_bin = any((folder / name).is_file() for name in ("pytorch_model.bin", "pytorch_model.bin.index.json"))
    return has_bin and not any(folder.glob("model*.safetensors"))


def _read_config(folder: Path, name: str) -> dict[str, Any]:
    where = f"model.model_name_or_path: {name}"
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        if (folder / "adapter_config.json").is_file():
            raise ModelError(
                f"{where}: the folder holds an adapter and no model; set the model that it was "
                "trained on, and this folder as lora.adapter_path"
            ) from None
        raise ModelError(
            f"{where}: the folder holds no config.json; use a folder written by "
            "save_pretrained, a .gguf file or a Hub id"
        ) from None
    except (ValueError, OSError) as error:
        raise ModelError(f"{where}: config.json cannot be read ({error})") from None
    if not isinstance(content, dict):
        raise ModelError(f"{where}: config.json holds no mapping")
    return content


def _download(model: ModelSection, *, weights: bool) -> BaseSource:
    from huggingface_hub import snapshot_download

    patterns = _FILES + (_WEIGHTS if weights else []) + (_CODE if model.trust_remote_code else [])
    name = model.model_name_or_path
    hints = {**_HUB_HINTS, "unreachable": network.unreachable_reason()}
    with network.hub_errors(f"model.model_name_or_path: {name}", ModelError, hints):
        folder = Path(snapshot_download(name, revision=model.revision, allow_patterns=patterns))
        if weights and not any(folder.glob("model*.safetensors")):
            folder = Path(snapshot_download(name, revision=folder.name, allow_patterns=_PICKLED_WEIGHTS))
    if weights and not any(folder.glob("model*.safetensors")) and not _has_legacy_bin(folder):
        raise ModelError(
            f"model.model_name_or_path: {name} has no model*.safetensors and no pytorch_model.bin, or, offline, not in the "
            "local cache; choose a revision with weights, or download the model first"
        )
    return BaseSource(folder, name, folder.name, _read_config(folder, name))
