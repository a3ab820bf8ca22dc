"""A `.gguf` file as a base model: converted once into a local folder of bfloat16 safetensors, config and tokenizer.

A conversion is exact or refused: every setting and every tensor of the file must have its place in Transformers, and
tensors and parameters must match completely. Tensors are dequantized one at a time.
"""

import hashlib
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from qlora_train.architectures.gguf_configs import gguf_config
from qlora_train.architectures.gguf_header import GGUFHeader, parts_of, read_header
from qlora_train.architectures.gguf_reader import check_magic
from qlora_train.models.conversion_cache import SHARD_BYTES, convert_once
from qlora_train.models.gguf_tensors import LAYOUTS, ParameterSource, dequantize, parameter_sources
from qlora_train.models.gguf_tokenizer import gguf_tokenizer
from qlora_train.models.shard_writer import write_shards
from qlora_train.utils.atomic_io import sha256_of
from qlora_train.utils.errors import ModelError


def convert_gguf(path: Path, cache_dir: Path) -> Path:
    """Return a cached model folder with the content of a GGUF file, converting it if necessary.

    Args:
        cache_dir: holds converted models by size and sha256 of their files.

    Raises:
        ModelError: no GGUF file, an architecture or setting that cannot be converted exactly, or no package `gguf`.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(
            f"model.model_name_or_path: {path} needs the package gguf; run: pip install 'qlora-train[gguf]'"
        )
    files = parts_of(path)
    for file in files:
        check_magic(file)
    size_bytes = sum(file.stat().st_size for file in files)
    digests = [sha256_of(file) for file in files]
    digest = digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
    folder = cache_dir / f"{path.stem}-{size_bytes}-{digest[:16]}"
    return convert_once(folder, path.name, lambda staging: _convert(read_header(path), staging))


def _convert(header: GGUFHeader, folder: Path) -> None:
    _check_complete(header)
    settings = gguf_config(header)
    config = AutoConfig.for_model(**settings)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    parameters = _parameters(model)
    layout = LAYOUTS[config.model_type]
    sources = parameter_sources([*parameters], header.architecture, config.num_hidden_layers, layout.rules)
    _check_tensors(header, parameters, sources, config)
    tensors = header.weights()
    made = (
        source.make(lambda name: dequantize(tensors[name]), layout.undo, config, parameters[key].shape).to(
            parameters[key].dtype
        )
        for key, source in sources.items()
    )
    try:
        write_shards(folder, [*parameters], [meta.nbytes for meta in parameters.values()], SHARD_BYTES, made)
    except NotImplementedError as error:
        raise header.refused(f"has a tensor that cannot be dequantized ({error})") from None
    config.architectures = [type(model).__name__]
    config.dtype = torch.bfloat16
    config.save_pretrained(folder)
    # a generation config derived from the config would be overwritten by later configs
    ids = {key: getattr(config, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    GenerationConfig(**ids).save_pretrained(folder)
    tokenizer = gguf_tokenizer(header)
    tokenizer.model_max_length = header.take("context_length")
    tokenizer.save_pretrained(folder)


def _check_complete(header: GGUFHeader) -> None:
    try:
        for tensor in header.tensors.values():
            tensor.rows()
    except ValueError as error:
        raise ModelError(
            f"model.model_name_or_path: {header.path} is a damaged GGUF file, or newer than the package gguf ({error}); "
            "download it again, or: pip install --upgrade gguf"
        ) from None


def _parameters(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return parameters and saved buffers by name, without names of tied parameters, in the dtype to save."""
    saved = model.state_dict().keys()
    tensors = {**dict(model.named_parameters()), **{name: b for name, b in model.named_buffers() if name in saved}}
    kept = set(model._keep_in_fp32_modules or ()) | set(model._keep_in_fp32_modules_strict or ())
    return {
        name: tensor.float() if kept & set(name.split(".")) else tensor.to(torch.bfloat16)
        for name, tensor in tensors.items()
    }


def _check_tensors(
    header: GGUFHeader, parameters: Mapping[str, Tensor], sources: Mapping[str, ParameterSource], config: Any
) -> None:
    """Refuse a file whose tensors are not exactly those of the model, with the sizes of its settings."""
    tensors = header.weights()
    used = {name for source in sources.values() for name in source.names}
    missing, unused = sorted(used - tensors.keys()), sorted(tensors.keys() - used)
    if missing or unused:
        raise ModelError(
            f"model.model_name_or_path: {header.path} does not hold one whole {header.architecture} model: "
            f"{len(missing)} tensors are missing {missing[:3]} and {len(unused)} are unmapped {unused[:3]}; use the "
            "original safetensors model"
        )
    undo = LAYOUTS[config.model_type].undo
    for key, source in sources.items():
        shapes = [header.shape(name) for name in source.names]
        expected = parameters[key].shape
        try:
            made = source.make(lambda name: torch.empty(header.shape(name), device="meta"), undo, config, expected)
        except (RuntimeError, IndexError):
            made = None
        if made is None or made.shape != expected:
            raise header.refused(
                f"has tensor {source.names[0]} of shape {shapes[0]}, but the file's own settings ask for {tuple(expected)}"
            )
