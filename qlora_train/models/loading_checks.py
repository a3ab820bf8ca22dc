"""Check weights before and after loading.

Transformers initializes missing tensors at random and warns. Such a base would train to nothing: here it is an error that
names the tensors, raised from the files' headers where possible.
"""

import logging
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from bitsandbytes.nn import Linear4bit
from torch import nn
from transformers import PreTrainedModel

from qlora_train.models.checkpoint_tensors import StoredTensor
from qlora_train.utils.errors import ModelError, listed

logger = logging.getLogger(__name__)

FLOATS = ("F64", "F32", "F16", "BF16")


def check_dtypes(tensors: Mapping[str, StoredTensor], config: Mapping[str, Any], where: str) -> None:
    """Refuse quantized tensors of a checkpoint whose config.json has no quantization_config.

    Raises:
        ModelError: a weight in 8 bits or a tensor in an unusual floating-point format; integer buffers are allowed.
    """
    if config.get("quantization_config") is not None:
        return
    wrong = sorted(
        name
        for name, each in tensors.items()
        if each.dtype not in FLOATS and (each.dtype.startswith("F") or name.endswith("weight"))
    )
    if wrong:
        first = tensors[wrong[0]]
        raise ModelError(
            f"{where}: {first.file.name} holds {listed(wrong, 3)} as {first.dtype}, and config.json has no "
            "quantization_config for their scales; use the original 16-bit model"
        )


def check_loaded(model: PreTrainedModel, info: Mapping[str, Any], where: str) -> None:
    """Refuse a model that its files do not define completely; warn of unused tensors.

    Args:
        info: Transformers' `output_loading_info`.
        where: prefix of error messages.

    Raises:
        ModelError: missing tensors, mismatched shapes, or more layers than config.json has.
    """
    wrong = sorted([*info["mismatched_keys"], *_mismatched_4bit(model)], key=lambda entry: _by_layer(entry[0]))
    if wrong:
        name, stored, built = wrong[0]
        raise ModelError(
            f"{where}: {len(wrong)} tensors have another shape than in config.json: {name} is {tuple(stored)} in the "
            f"file and {tuple(built)} by config.json; use config.json and weights of one model"
        )
    if info["missing_keys"]:
        raise ModelError(
            f"{where}: the weights lack {listed(sorted(info['missing_keys'], key=_by_layer), 3)}, which would be random; "
            "download them again, or use config.json and weights of one model"
        )
    extra = sorted(info["unexpected_keys"], key=_by_layer)
    num_layers = _num_layers(model)
    beyond = [name for name in extra if _layer(name)[1] >= num_layers.get(_layer(name)[0], sys.maxsize)]
    if beyond:
        raise ModelError(
            f"{where}: the weights hold {listed(beyond, 3)}, but config.json has {num_layers[_layer(beyond[0])[0]]} layers "
            "(num_hidden_layers); use config.json and weights of one model"
        )
    if extra:
        logger.warning("weights: unused tensors in the files: %s (not part of the model)", listed(extra, 3))


def _mismatched_4bit(model: nn.Module) -> Iterator[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """Yield name, stored and expected shape of mismatched 4-bit weights, which Transformers does not compare."""
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit) and module.quant_state:
            stored, expected = tuple(module.quant_state.shape), (module.out_features, module.in_features)
            if stored != expected:
                yield f"{name}.weight", stored, expected


def _num_layers(model: nn.Module) -> dict[str, int]:
    """Return the number of layers by the name of their list, such as `model.layers`."""
    found: dict[str, int] = {}
    for name, _ in model.named_parameters():
        layers, index = _layer(name)
        found[layers] = max(found.get(layers, 0), index + 1)
    return found


def _layer(name: str) -> tuple[str, int]:
    """Return the layer list and the layer index in a tensor's name; -1 without a layer."""
    found = re.match(r"(.+?)\.(\d+)\.", name)
    return (found[1], int(found[2])) if found else ("", -1)


def _by_layer(name: str) -> tuple[int, str]:
    return _layer(name)[1], name
