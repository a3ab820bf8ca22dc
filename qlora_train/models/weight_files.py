"""Weights on disk and after loading: nothing is missing, cut, of another shape, or left over without a word.

Transformers gives a tensor that it does not find random values, and says so in a warning. A base like that trains, to
nothing. Here it is an error that names the tensors, and what files can tell is told from their heads, before gigabytes
are read. Pickled weights are not read here: `qlora_train.models.legacy_bin` has converted those that can be.
"""

import json
import logging
import re
import sys
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel

from qlora_train.utils.errors import ModelError, first_line

logger = logging.getLogger(__name__)

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
LFS_POINTER = b"version https://git-lfs"
FLOATS = ("F64", "F32", "F16", "BF16")
"""Floating-point kinds of a checkpoint that is not quantised, in the words of safetensors."""
NUM_SHOWN = 3
"""Tensors that a message names."""


def check_weight_files(folder: Path, config: Mapping[str, Any], where: str) -> None:
    """Refuse weights that are not whole, from their heads alone.

    Args:
        folder: the base on disk.
        config: the content of its config.json.
        where: begins every message: the setting and the base's name.

    Raises:
        ModelError: a file that is missing, a pointer, cut or damaged, or that lacks a tensor; an unexpected number format.
    """
    for path, tensors in weight_files(folder, where).items():
        dtypes = _dtypes(path, where)
        missing = sorted(tensors - dtypes.keys())
        if missing:
            raise ModelError(
                f"{where}: {path.name} lacks {_listed(missing)}, which {INDEX} says it holds; fetch both files again"
            )
        odd = sorted(name for name, dtype in dtypes.items() if _is_odd(name, dtype))
        if odd and config.get("quantization_config") is None:
            raise ModelError(
                f"{where}: {path.name} holds {_listed(odd)} as {dtypes[odd[0]]}, and config.json has no "
                "quantization_config that says what scale it has; give the original 16-bit model"
            )


def weight_files(folder: Path, where: str) -> dict[Path, set[str]]:
    """Return the weight files, each with the tensors that the index says it holds.

    Training, merging and export all read these and no others.

    Raises:
        ModelError: there are none, there are two sets that differ, or the index cannot be read.
    """
    has_single = (folder / WEIGHTS).is_file()
    if not (folder / INDEX).is_file():
        if not has_single:
            raise _no_weights(folder, where)
        return {folder / WEIGHTS: set()}
    files = _indexed_files(folder, where)
    if not has_single or files.keys() == {folder / WEIGHTS}:
        return files
    if not _are_equal(folder / WEIGHTS, files):
        raise ModelError(
            f"{where}: {folder} holds two sets of weights, {WEIGHTS} and the {len(files)} files of {INDEX}, and which one "
            "belongs to the model is unknown; move one of them out of the folder"
        )
    return {folder / WEIGHTS: set()}


def _are_equal(single: Path, shards: Mapping[Path, Collection[str]]) -> bool:
    """Say whether a file holds the tensors of shards, of the same type and to the bit."""
    try:
        with safe_open(str(single), framework="pt", backend="pread") as one:
            if set(one.keys()) != {name for tensors in shards.values() for name in tensors}:
                return False
            for path, tensors in shards.items():
                with safe_open(str(path), framework="pt", backend="pread") as other:
                    if not all(_is_same(one.get_tensor(name), other.get_tensor(name)) for name in tensors):
                        return False
    except (OSError, SafetensorError):
        return False
    return True


def _is_same(a: torch.Tensor, b: torch.Tensor) -> bool:
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def _indexed_files(folder: Path, where: str) -> dict[Path, set[str]]:
    try:
        shard_of = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        files: dict[Path, set[str]] = {}
        for tensor, shard in shard_of.items():
            files.setdefault(folder / shard, set()).add(tensor)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{where}: {INDEX} cannot be read ({type(error).__name__}: {first_line(error)}); fetch it again"
        ) from None
    if not files:
        raise ModelError(f"{where}: {INDEX} names no tensor; fetch it again")
    return files


def _no_weights(folder: Path, where: str) -> ModelError:
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickles:
        return ModelError(
            f"{where}: {pickles[0]} is a pickle of another kind than pytorch_model.bin, which is not read, and there is no "
            f"{WEIGHTS}; choose a revision with safetensors, or convert it where you trust it (save_pretrained does)"
        )
    return ModelError(f"{where}: {folder} holds neither {WEIGHTS} nor {INDEX}; fetch the weights")


def _dtypes(path: Path, where: str) -> dict[str, str]:
    """Return the number format of every tensor of a file that is whole."""
    try:
        with path.open("rb") as file:
            start = file.read(len(LFS_POINTER))
        if start == LFS_POINTER:
            raise ModelError(
                f"{where}: {path.name} is a pointer of Git LFS and not the weights; run: git lfs pull, in {path.parent}"
            )
        with safe_open(str(path), framework="pt") as tensors:
            return {name: tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118 - no mapping
    except FileNotFoundError:
        raise ModelError(f"{where}: {path.name} is missing, which {INDEX} names; fetch it") from None
    except (OSError, SafetensorError) as error:
        size = f"{path.stat().st_size:,} bytes" if path.is_file() else "no file"
        raise ModelError(
            f"{where}: {path.name} ({size}) is cut or damaged: {first_line(error)}; fetch it again"
        ) from None


def _is_odd(name: str, dtype: str) -> bool:
    """Say whether a tensor is not what a model without quantisation has; buffers may be integers or flags."""
    return dtype not in FLOATS and (dtype.startswith("F") or name.endswith("weight"))


def check_loaded(model: PreTrainedModel, info: Mapping[str, Any], where: str) -> None:
    """Refuse a model of which a part does not come from its files; log what of the files was not used.

    Args:
        model: as it was loaded.
        info: what Transformers says of loading it (`output_loading_info`).
        where: begins every message: the setting and the base's name.

    Raises:
        ModelError: missing tensors, tensors of another shape, or a layer beyond the last.
    """
    wrong = sorted([*info["mismatched_keys"], *_other_shapes_in_4bit(model)], key=lambda entry: _by_layer(entry[0]))
    if wrong:
        name, stored, built = wrong[0]
        raise ModelError(
            f"{where}: {_counted(len(wrong))} another shape than config.json gives: {name} is {tuple(stored)} in the "
            f"file and {tuple(built)} by config.json; give config.json and weights of one model"
        )
    if info["missing_keys"]:
        raise ModelError(
            f"{where}: the weights lack {_listed(sorted(info['missing_keys'], key=_by_layer))}, which would be random; "
            "fetch them again, or give config.json and weights of one model"
        )
    extra = sorted(info["unexpected_keys"], key=_by_layer)
    num_layers = _num_layers(model)
    beyond = [name for name in extra if _layer(name)[1] >= num_layers.get(_layer(name)[0], sys.maxsize)]
    if beyond:
        stack = _layer(beyond[0])[0]
        raise ModelError(
            f"{where}: the weights hold {_listed(beyond)}, but config.json says {num_layers[stack]} layers "
            "(num_hidden_layers); give config.json and weights of one model"
        )
    if extra:
        logger.warning("weights: %s in the files have no place in the model and are not used", _listed(extra))


def _other_shapes_in_4bit(model: nn.Module) -> Iterator[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """Yield 4-bit weights whose shape is not their layer's, which Transformers does not compare: name, found, wanted."""
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit) and isinstance(module.weight, Params4bit) and module.weight.quant_state:
            found, wanted = tuple(module.weight.quant_state.shape), (module.out_features, module.in_features)
            if found != wanted:
                yield f"{name}.weight", found, wanted


def _num_layers(model: nn.Module) -> dict[str, int]:
    """Return how many layers a model has by the name of their stack, such as `model.layers`."""
    found: dict[str, int] = {}
    for name, _ in model.named_parameters():
        stack, number = _layer(name)
        found[stack] = max(found.get(stack, 0), number + 1)
    return found


def _layer(name: str) -> tuple[str, int]:
    """Return the stack and the number of the layer that a tensor belongs to; -1 for one that belongs to none."""
    found = re.match(r"(.+?)\.(\d+)\.", name)
    return (found[1], int(found[2])) if found else ("", -1)


def _by_layer(name: str) -> tuple[int, str]:
    return _layer(name)[1], name


def _counted(number: int) -> str:
    return f"{number} tensor has" if number == 1 else f"{number} tensors have"


def _listed(names: Collection[str]) -> str:
    shown = ", ".join(list(names)[:NUM_SHOWN])
    return shown if len(names) <= NUM_SHOWN else f"{shown} and {len(names) - NUM_SHOWN} more tensors"
