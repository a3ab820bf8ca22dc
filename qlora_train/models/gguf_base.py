"""A `.gguf` file as a base model: converted once into a local folder of bfloat16 safetensors, config and tokenizer.

Transformers reads config and tokenizer from the file; tensors are dequantized one at a time, by the names of the `gguf`
package. A GGUF file contains less than a checkpoint, and Transformers ignores some of it, so that a conversion can be
subtly wrong. Only the architectures of `_LAYOUTS` are converted, tensors and parameters must match completely, and RoPE
scaling is either understood or refused. Gemma 2 and 3 are missing because the file lacks the attention scale, StarCoder
2 because its RoPE base is not read."""

import importlib.util
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from qlora_train.models.conversion_cache import SHARD_BYTES, convert_once
from qlora_train.models.shard_writer import write_shards
from qlora_train.utils.atomic_io import sha256_of
from qlora_train.utils.errors import ModelError

ROPE_FACTORS = "rope_freqs.weight"
LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""RoPE settings of Llama 3.1 to 3.3, whose GGUF files hold only the factors computed from them."""

Layout = Callable[[str, Tensor, Any], Tensor]
"""`(GGUF name, stored tensor, config) -> tensor in Transformers' layout`."""


def convert_gguf(path: Path, cache_dir: Path) -> Path:
    """Return a cached model folder with the content of a GGUF file, converting it if necessary.

    Args:
        cache_dir: holds converted models by size and sha256 of their file.

    Raises:
        ModelError: no GGUF file, an architecture or setting that cannot be converted exactly, or no package `gguf`.
    """
    _check_file(path)
    folder = cache_dir / f"{path.stem}-{path.stat().st_size}-{sha256_of(path)[:16]}"
    return convert_once(folder, path.name, lambda staging: _convert(path, staging))


def _check_file(path: Path) -> None:
    where = f"model.model_name_or_path: {path}"
    if not path.is_file():
        raise ModelError(f"{where} does not exist; set a .gguf file, a model folder or a Hub id")
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise ModelError(f"{where} is not a GGUF file: it starts with {magic!r} instead of b'GGUF'; download it again")
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(f"{where} needs the package gguf; run: pip install 'qlora-train[gguf]'")


def _convert(path: Path, folder: Path) -> None:
    tensors, metadata = _read(path)
    config = _read_config(path, tensors, metadata)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    parameters = {name: parameter.shape for name, parameter in model.named_parameters()}
    sources = _match(path, parameters, tensors, metadata["general.architecture"], config.num_hidden_layers)
    layout = _LAYOUTS[metadata["general.architecture"]]
    made = (layout(source.name, _dequantize(source), config).to(torch.bfloat16) for source in sources.values())
    sizes = [shape.numel() * torch.bfloat16.itemsize for shape in parameters.values()]
    write_shards(folder, [*parameters], sizes, SHARD_BYTES, made)
    config.architectures = [type(model).__name__]
    config.dtype = torch.bfloat16
    config.save_pretrained(folder)
    # a generation config derived from the config would be overwritten by later configs
    ids = {key: getattr(config, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    GenerationConfig(**ids).save_pretrained(folder)
    tokenizer = _from_file(AutoTokenizer, path)
    for name, token_id in ids.items():  # Transformers 5.17 uses bos as eos
        if token_id is not None:
            setattr(tokenizer, name.removesuffix("_id"), tokenizer.convert_ids_to_tokens(token_id))
    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.save_pretrained(folder)


def _from_file(auto_class: Any, path: Path) -> Any:
    """Load an auto class from the file, without remote code beside it."""
    try:
        return auto_class.from_pretrained(
            path.parent, gguf_file=path.name, local_files_only=True, trust_remote_code=False
        )
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise ModelError(
            f"model.model_name_or_path: {path}: a JSON file beside it names Python code (auto_map), which never runs for "
            "a GGUF file; move the file into a folder of its own"
        ) from None


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the memory-mapped tensors by name, and the single-valued metadata by key."""
    import gguf

    try:
        reader = gguf.GGUFReader(path)
        metadata = {key: field.contents() for key, field in reader.fields.items() if len(field.data) == 1}
    except (ValueError, IndexError, KeyError, OverflowError, UnicodeDecodeError) as error:
        raise ModelError(
            f"model.model_name_or_path: {path} is a damaged GGUF file ({error}); download it again"
        ) from error
    architecture = metadata.get("general.architecture")
    if architecture not in _LAYOUTS:
        raise ModelError(
            f"model.model_name_or_path: {path} holds the GGUF architecture {architecture!r}; converted are "
            f"{', '.join(_LAYOUTS)}; use the original safetensors model instead"
        )
    return {tensor.name: tensor for tensor in reader.tensors}, metadata


def _read_config(path: Path, tensors: dict[str, Any], metadata: Mapping[str, Any]) -> Any:
    """Return the Transformers config, with the RoPE settings that Transformers ignores."""
    config = AutoConfig.from_pretrained(
        path.parent, gguf_file=path.name, local_files_only=True, trust_remote_code=False
    )
    prefix = metadata["general.architecture"]
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    unread = {
        "rope.scaling.type": metadata.get(f"{prefix}.rope.scaling.type", "none") != "none",
        "rope.dimension_count": metadata.get(f"{prefix}.rope.dimension_count", head_dim) != head_dim,
    }
    if refused := [f"{prefix}.{key}: {metadata[f'{prefix}.{key}']}" for key, is_set in unread.items() if is_set]:
        raise ModelError(
            f"model.model_name_or_path: {path} sets {', '.join(refused)}, which would be lost in the conversion; "
            "use the original safetensors model instead"
        )
    if ROPE_FACTORS in tensors:
        factors = _dequantize(tensors.pop(ROPE_FACTORS))
        config.rope_parameters = _llama3_rope(path, factors, config.rope_parameters["rope_theta"], head_dim)
    return config


def _llama3_rope(path: Path, factors: Tensor, rope_theta: float, head_dim: int) -> dict[str, Any]:
    """Return the RoPE settings that give the stored factors, (head_dim / 2,)."""
    factor = factors.max().item()
    frequencies = rope_theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    rotations = LLAMA3_ROPE["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low, high = LLAMA3_ROPE["low_freq_factor"], LLAMA3_ROPE["high_freq_factor"]
    smooth = ((rotations - low) / (high - low)).clamp(0, 1)
    expected = 1 / ((1 - smooth) / factor + smooth)
    if factors.shape != expected.shape or not torch.allclose(factors.double(), expected, rtol=1e-4):
        raise ModelError(
            f"model.model_name_or_path: {path} holds rope factors ({ROPE_FACTORS}) that are not those of Llama 3.1 to "
            "3.3; use the original safetensors model instead"
        )
    return {"rope_type": "llama3", "rope_theta": rope_theta, "factor": factor, **LLAMA3_ROPE}


def _match(
    path: Path, parameters: Mapping[str, torch.Size], tensors: Mapping[str, Any], architecture: str, num_layers: int
) -> dict[str, Any]:
    """Return the file's tensor of each parameter; all must match, with equal shapes."""
    import gguf

    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(number, num_layers)

    def gguf_name(parameter: str) -> str:
        module, _, kind = parameter.rpartition(".")
        return f"{names.get_name(module)}.{kind}"

    gguf_names = {parameter: gguf_name(parameter) for parameter in parameters}
    missing = sorted(set(gguf_names.values()) - tensors.keys())
    unused = sorted(tensors.keys() - set(gguf_names.values()))
    if missing or unused:
        raise ModelError(
            f"model.model_name_or_path: {path} does not hold one whole {architecture} model: {len(missing)} tensors are "
            f"missing {missing[:3]} and {len(unused)} are unmapped {unused[:3]}; use an unsplit file, or the original "
            "safetensors model"
        )
    for parameter, name in gguf_names.items():
        # GGUF lists the fastest dimension first
        if (found := tuple(reversed(tensors[name].shape.tolist()))) != tuple(parameters[parameter]):
            raise ModelError(
                f"model.model_name_or_path: {path}: tensor {name} has shape {found}, but the file's own settings ask for "
                f"{tuple(parameters[parameter])}; use the original safetensors model instead"
            )
    return {parameter: tensors[name] for parameter, name in gguf_names.items()}


def _dequantize(stored: Any) -> Tensor:
    """Return a tensor of the file in float32, in Transformers' shape."""
    import gguf

    values = torch.from_numpy(gguf.dequantize(stored.data, stored.tensor_type).copy())
    return values.float().reshape(tuple(reversed(stored.shape.tolist())))


def _unchanged(_name: str, stored: Tensor, _config: Any) -> Tensor:
    return stored


def _llama_layout(name: str, stored: Tensor, config: Any) -> Tensor:
    """Undo llama.cpp's row order of query and key: it rotates adjacent rows, Transformers the halves of a head."""
    num_heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(name.split(".")[-2])
    if num_heads is None:
        return stored
    half = stored.shape[0] // num_heads // 2
    return stored.reshape(num_heads, half, 2, -1).transpose(1, 2).reshape(stored.shape)


_LAYOUTS: dict[str, Layout] = {
    "llama": _llama_layout,
    "qwen2": _unchanged,
    "qwen3": _unchanged,
    "phi3": _unchanged,
}
