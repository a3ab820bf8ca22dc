"""Load the base model in 4 bits, ready for an adapter or for inference.

Norms, embeddings and the output head stay in the compute dtype. Every parameter is frozen.
"""

import logging
import re
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from bitsandbytes.nn import Linear4bit
from safetensors import SafetensorError
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from qlora_train.architectures import Architecture, detect, text_config
from qlora_train.config import ModelSection, QuantizationSection
from qlora_train.kernels import grouped_sdpa
from qlora_train.models.base_source import BaseSource, resolve_base
from qlora_train.models.bnb_cpu_blocksize import fix_partial_blocks
from qlora_train.models.checkpoint_tensors import find_stored_format, list_tensors, open_tensors
from qlora_train.models.config_file import read_config
from qlora_train.models.dynamic_rope import reset_dynamic_rope
from qlora_train.models.hardware import choose_attention, choose_compute_dtype
from qlora_train.models.hf_quantizer import QuantizationConfig
from qlora_train.models.loading_checks import check_dtypes, check_loaded
from qlora_train.models.quantization_summary import (
    QuantizationSummary,
    check_quantization,
    summarize_quantization,
)
from qlora_train.models.quantize_linears import quantize_linears
from qlora_train.models.text_only import OmittedModule, check_causal, text_model
from qlora_train.models.tokenizer import load_tokenizer
from qlora_train.utils.device import select_device
from qlora_train.utils.errors import ConfigError, ModelError, first_line

if TYPE_CHECKING:
    from qlora_train.models.shard_reads import ShardedLoad

logger = logging.getLogger(__name__)

_TRAINED_ROPE_KEYS = ("rope_theta", "partial_rotary_factor", "mrope_section", "mrope_interleaved")
"""RoPE parameters that the weights were trained with and that scaling does not change."""
_BNB_DEFAULTS = {"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False}
"""Transformers' defaults for settings that are missing in a stored quantization_config."""
_EXPERT_IN_4BIT = re.compile(r"\.experts\.\d+\..*\.quant_state\.bitsandbytes__")


@dataclass(frozen=True)
class LoadedModel:
    """A frozen base model and its metadata."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    architecture: Architecture
    source: BaseSource
    quantization_summary: QuantizationSummary
    compute_dtype: torch.dtype
    device: torch.device
    new_token_ids: tuple[int, ...]
    """Embedding rows to train beside the adapter: those of `model.new_tokens`, and all added rows."""
    omitted_modules: tuple[OmittedModule, ...] = ()
    """Modules of a multimodal checkpoint that are not in `model`."""


def load_model(
    model: ModelSection,
    quantization: QuantizationSection,
    *,
    source: BaseSource | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    shard: bool = False,
) -> LoadedModel:
    """Load a base model in 4-bit NF4 (or as `quantization` says), frozen, with its tokenizer.

    Args:
        source: result of `resolve_base`, if known.
        tokenizer: result of `load_tokenizer`, if known.
        shard: load and hold a part of the base on each rank, with FSDP.

    Raises:
        ModelError: the model cannot be downloaded or read, or too few of its weights could be quantized.
        ConfigError: settings that contradict the checkpoint.
    """
    source = source or resolve_base(model)
    tokenizer = tokenizer or load_tokenizer(source, model)
    architecture = detect(source.config)
    device = select_device()
    dtype = choose_compute_dtype(quantization.bnb_4bit_compute_dtype, device)
    sharded = _sharded_load(source, model, quantization) if shard else None
    base = _from_pretrained(
        source,
        model,
        dtype,
        device,
        _quantization_config(source, quantization, dtype, architecture),
        architecture,
        sharded,
    )
    if quantization.load_in_4bit:
        quantize_linears(base, architecture.linear_classes, quantization, dtype)
    base.config.use_cache = base.config.get_text_config().use_cache = False
    base.requires_grad_(False)
    fix_partial_blocks(base)
    reset_dynamic_rope(base)
    _prepare_4bit_layers(base, dtype)
    new_token_ids: tuple[int, ...] = ()
    if model.new_tokens:
        from qlora_train.models.new_tokens import add_new_tokens

        new_token_ids = add_new_tokens(base, tokenizer, model.new_tokens)
    if sharded is not None:
        from qlora_train.models.shard_base import shard_base

        shard_base(base, device, sharded.sliced)
    summary = summarize_quantization(base, output_heads(base))
    if not architecture.known:
        _report_unknown(base, architecture, summary)
    if quantization.load_in_4bit:
        check_quantization(summary, quantization.min_quantized_share)
    omitted_modules = text_model(base.config).omitted_modules
    if omitted_modules:
        check_causal(base)
    return LoadedModel(base, tokenizer, architecture, source, summary, dtype, device, new_token_ids, omitted_modules)


def _sharded_load(source: BaseSource, model: ModelSection, quantization: QuantizationSection) -> "ShardedLoad":
    """Return what to load in parts.

    Raises:
        ConfigError: a torch that is too old, or weights that are not quantized while loading.
    """
    from qlora_train.models.shard_base import check_torch
    from qlora_train.models.shard_reads import ShardedLoad

    check_torch()
    if not quantization.load_in_4bit:
        raise ConfigError(
            "parallel.strategy: fsdp shards 4-bit weights, and quantization.load_in_4bit is false; set it to true, or set "
            "parallel.strategy: ddp"
        )
    if (source.config.get("quantization_config") or {}).get("load_in_4bit"):
        raise ConfigError(
            f"parallel.strategy: fsdp quantizes while it loads, and {source.name} is stored in 4 bits; use the original "
            "16-bit model, or set parallel.strategy: ddp"
        )
    return ShardedLoad(whole_vocabulary=bool(model.new_tokens))


def _report_unknown(model: PreTrainedModel, architecture: Architecture, summary: QuantizationSummary) -> None:
    names = sorted({name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)})
    logger.warning(
        "architecture: %s is unknown and uses generic settings (linear layers %s, %.1f %% of weights in 4 bits); check the "
        "answers of the first run",
        architecture.model_type, ", ".join(names), 100 * summary.quantized_share,
    )  # fmt: skip


def output_heads(model: PreTrainedModel) -> set[nn.Module]:
    """Return the output head in a set, empty if the model has none."""
    head = model.get_output_embeddings()
    return set() if head is None else {head}


def _quantization_config(
    source: BaseSource, quantization: QuantizationSection, dtype: torch.dtype, architecture: Architecture
) -> QuantizationConfig | None:
    """Return how to quantize while loading; None for 16-bit LoRA and for 4-bit checkpoints."""
    stored = source.config.get("quantization_config")
    if stored is not None and stored.get("load_in_4bit"):
        _check_stored_quantization(stored, source, quantization)
        return None
    if not quantization.load_in_4bit:
        return None
    return QuantizationConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=quantization.bnb_4bit_use_double_quant,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=list(architecture.keep_16bit) or None,
    )


def _check_stored_quantization(stored: dict[str, Any], source: BaseSource, quantization: QuantizationSection) -> None:
    if not quantization.load_in_4bit:
        raise ConfigError(
            f"quantization.load_in_4bit: false, but {source.name} is stored in 4 bits; set it to true, or use the "
            "original 16-bit model"
        )
    stored = {**_BNB_DEFAULTS, **stored}
    wrong = [
        f"quantization.{key}: {setting}, but {source.name} is stored with {stored[key]}; set it to {stored[key]}"
        for key in _BNB_DEFAULTS
        if stored[key] != (setting := getattr(quantization, key))
    ]
    if wrong:
        raise ConfigError(wrong)
    logger.debug("quantization: 4-bit %s (as stored in the checkpoint)", stored["bnb_4bit_quant_type"])


def _check_experts(names: Iterable[str], where: str) -> None:
    expert = next((name for name in names if _EXPERT_IN_4BIT.search(name)), None)
    if expert is not None:
        raise ModelError(
            f"{where}: {expert}: bitsandbytes stored each expert in 4 bits, and Transformers fuses experts into one "
            "tensor, which packed weights do not allow; use the original 16-bit model"
        )


def _from_pretrained(
    source: BaseSource,
    model: ModelSection,
    dtype: torch.dtype,
    device: torch.device,
    quantization_config: QuantizationConfig | None,
    architecture: Architecture,
    sharded: "ShardedLoad | None",
) -> PreTrainedModel:
    arguments: dict[str, Any] = {} if quantization_config is None else {"quantization_config": quantization_config}
    where = f"model.model_name_or_path: {source.name}"
    stored_format = find_stored_format(source.config, where)
    check_dtypes(list_tensors(source.folder, where), source.config, where)
    config = model_config(source, model)
    attention = choose_attention(model.attn_implementation, architecture, device, dtype, has_sdpa=supports_sdpa(config))
    grouped_sdpa.register()
    text = text_model(config)
    text.log(config.model_type)
    if stored_format is not None:
        del config.quantization_config  # Transformers reads 16-bit weights
        logger.debug("weights: stored in %s, dequantized to %s as they are read", stored_format.description, dtype)
    try:
        with torch.device("meta"):  # for its class, and the config of that class
            meta_model = text.build(config, trust_remote_code=model.trust_remote_code)
        in_parts = nullcontext() if sharded is None else sharded.current()
        with in_parts, open_tensors(source.folder, stored_format, dtype, where) as tensors:
            _check_experts(tensors, where)
            loaded, info = type(meta_model).from_pretrained(
                None,
                config=meta_model.config,
                state_dict=tensors if sharded is None else sharded.lazy(tensors),
                dtype=dtype,
                device_map={"": device},
                attn_implementation=text.attention(meta_model.config, attention),
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported in `info`, with both shapes
                **arguments,
            )
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise ModelError(
            f"{where} cannot be loaded: {first_line(error).rstrip('.')}; use a causal language model, with its config.json"
        ) from error
    loaded.name_or_path = loaded.config.name_or_path = str(source.folder)  # PEFT writes it into adapters
    loaded.generation_config = _generation_config(source.folder)
    check_loaded(loaded, info, where)
    return loaded


def _generation_config(folder: Path) -> GenerationConfig:
    """Return the generation settings, which old checkpoints store in config.json."""
    try:
        return GenerationConfig.from_pretrained(folder, local_files_only=True)
    except OSError:
        return GenerationConfig.from_pretrained(folder, "config.json", local_files_only=True, _from_model_config=True)


def supports_sdpa(config: Any) -> bool:
    """Whether Transformers supports sdpa for a config; assumed for remote code."""
    named = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    model_class = MODEL_FOR_MULTIMODAL_LM_MAPPING.get(type(config), named)
    return model_class is None or bool(model_class._supports_sdpa)


def auto_class_of(source: BaseSource, model: ModelSection) -> str:
    """Return the name of the Transformers auto class that loads the whole base."""
    text = text_model(read_config(source, trust_remote_code=model.trust_remote_code))
    return "AutoModelForMultimodalLM" if text.omitted_modules else "AutoModelForCausalLM"


def model_config(source: BaseSource, model: ModelSection) -> Any:
    """Return the Transformers config of the base, with `model.rope_scaling` applied.

    Raises:
        ModelError: a model type unknown to Transformers, or untrusted remote code.
        ConfigError: RoPE scaling for a model without rotary positions.
    """
    config = read_config(source, trust_remote_code=model.trust_remote_code)
    return config if model.rope_scaling is None else _with_rope_scaling(config, model.rope_scaling, source.name)


def _with_rope_scaling(config: Any, scaling: Mapping[str, str | int | float], name: str) -> Any:
    """Replace a config's RoPE scaling, except for the parameters of the trained weights."""
    whole = config.to_dict()
    content = text_config(whole)
    own, positions = content.get("rope_parameters"), content.get("max_position_embeddings")
    if not own or not positions:
        raise ConfigError(f"model.rope_scaling: {name} has no rotary positions to scale; remove it")
    if any(isinstance(value, dict) for value in own.values()):
        raise ConfigError(
            f"model.rope_scaling: {name} scales positions differently by layer; train within {positions} positions"
        )
    fixed = {key: own[key] for key in _TRAINED_ROPE_KEYS if key in own}
    content["rope_parameters"] = {"original_max_position_embeddings": positions, **fixed, **scaling}
    reached = int(positions * float(scaling["factor"]))
    if scaling["rope_type"] != "dynamic":  # dynamic scaling starts beyond max_position_embeddings
        content["max_position_embeddings"] = reached
    logger.debug("positions: %d -> %d (model.rope_scaling)", positions, reached)
    return type(config).from_dict(whole)


def _prepare_4bit_layers(model: PreTrainedModel, dtype: torch.dtype) -> None:
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.compute_dtype = dtype  # float32 by default in 4-bit checkpoints
            module.compute_type_is_set = True
            # In its first evaluation forward on CPUs with AVX512-BF16, bitsandbytes repacks weights for an operator without
            # a gradient formula: training after an evaluation would silently lose the gradient of the base path.
            module.support_avx512bf16_for_cpu = False
