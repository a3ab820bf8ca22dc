"""Legacy weights (`pytorch_model.bin`) as a base: converted once into a local folder of safetensors.

A pickle can run code when it is read. It is read here with torch's restricted reader (`weights_only`), which knows
tensors and plain containers and refuses everything else before any of it runs. What it gives is written as safetensors, so
that loading, merging and telling one base from another read one format. Weights are mapped and written one tensor at a
time, a file after the other; tensors that share memory, such as tied ones, are each written whole.
"""

import json
import logging
import shutil
import zipfile
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_train.models.safetensors_writer import NAMES, TensorSpec, write_safetensors
from qlora_train.utils.atomic_io import atomic_folder, sha256_of, verify_manifest
from qlora_train.utils.errors import ModelError, first_line

SINGLE, INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
COMPANIONS = (
    "*.json", "*.jinja", "*.model", "tokenizer*", "vocab*", "merges*", "*.py", "additional_chat_templates/*.jinja",
)  # fmt: skip
"""What lies beside the weights and belongs to the model."""

logger = logging.getLogger(__name__)


def has_legacy_bin(folder: Path) -> bool:
    """Say whether a folder's weights are there as a pickle and not as safetensors."""
    has_pickle = (folder / SINGLE).is_file() or (folder / INDEX).is_file()
    return has_pickle and not any(folder.glob("model*.safetensors"))


def convert_legacy_bin(folder: Path, cache_dir: Path, where: str) -> Path:
    """Return a folder with the same model in safetensors, converting it when the cache does not hold it.

    Args:
        folder: holds `pytorch_model.bin`, or shards with their index.
        cache_dir: where converted models are kept, by the sha256 of all their files; made when missing.
        where: begins every message: the setting and the base's name.

    Raises:
        ModelError: files that are missing or damaged, or that hold anything but tensors by name.
    """
    weights = _weights(folder, where)
    companions = sorted(
        {path for pattern in COMPANIONS for path in folder.glob(pattern) if path.is_file()} - {folder / INDEX}
    )
    digest = sha256()
    for path in (*weights, *companions):
        digest.update(f"{path.relative_to(folder)} {sha256_of(path)}".encode())
    converted = cache_dir / f"{folder.resolve().name}-{digest.hexdigest()[:16]}"
    if converted.exists() and (problem := verify_manifest(converted)) is None:
        logger.info("pickled weights: %s were converted before, in %s", weights[0].name, converted)
        return converted
    elif converted.exists():
        logger.warning("pickled weights: %s is damaged (%s) and is made again", converted, problem)
    logger.info("pickled weights: %s is converted to safetensors in %s", weights[0].name, converted)
    with atomic_folder(converted) as staging:
        for path in companions:
            copy = staging / path.relative_to(folder)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, copy)
        _convert(weights, staging, where)
    return converted


def _weights(folder: Path, where: str) -> list[Path]:
    """Return the files that hold the weights, in order."""
    if not (folder / INDEX).is_file():
        return [folder / SINGLE]
    try:
        names = sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{where}: {INDEX} cannot be read ({first_line(error)}); fetch it again") from None
    outside = [name for name in names if Path(name).name != name]
    missing = [name for name in names if not (folder / name).is_file()]
    if not names or outside or missing:
        what = f"names no file of this folder ({(outside or missing)[0]})" if names else "names no tensor"
        raise ModelError(f"{where}: {INDEX} {what}; fetch the weights again")
    return [folder / name for name in names]


def _convert(weights: list[Path], folder: Path, where: str) -> None:
    places: dict[str, str] = {}
    for path in weights:
        tensors = _read(path, where)
        name = path.name.replace("pytorch_model", "model").removesuffix(".bin") + ".safetensors"
        described = {key: TensorSpec(tensor.shape, tensor.dtype) for key, tensor in tensors.items()}
        write_safetensors(folder / name, described, tensors.__getitem__)
        places |= dict.fromkeys(tensors, name)
    if len(weights) > 1:
        index = json.dumps({"metadata": {}, "weight_map": places}, indent=2)
        (folder / "model.safetensors.index.json").write_text(index, encoding="utf-8")


def _read(path: Path, where: str) -> Mapping[str, Tensor]:
    """Return the tensors of one file by name, mapped where its form allows it."""
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # the bytes are anyone's, and reading them can fail in any way
        raise ModelError(
            f"{where}: {path.name} cannot be read as tensors alone ({first_line(error)}), and code in it is never run; "
            "choose a revision with safetensors, or convert it where you trust it (save_pretrained does)"
        ) from None
    if not isinstance(content, dict) or not content:
        raise ModelError(f"{where}: {path.name} holds no tensors by name; give the file that save_pretrained wrote")
    odd = [key for key, value in content.items() if not _is_plain(key, value)]
    if odd:
        raise ModelError(
            f"{where}: {path.name} holds {str(odd[0])!r}, which is no plain tensor; give the file that "
            "save_pretrained wrote"
        )
    return {key: tensor.detach() for key, tensor in content.items()}


def _is_plain(key: object, value: object) -> bool:
    if not isinstance(key, str) or not isinstance(value, Tensor):
        return False
    return value.layout == torch.strided and not value.is_quantized and value.dtype in NAMES
