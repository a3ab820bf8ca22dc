"""Tensors of a GGUF file in Transformers' layout: names, joined and split tensors, and what llama.cpp's converter changes.

Names follow the tables of the `gguf` package; a rule replaces them where llama.cpp stores one parameter as several
tensors or several as one. llama.cpp does not store dimensions of size 1.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qlora_train.architectures.gguf_reader import StoredTensor

_CHUNK_VALUES = 1 << 24
"""Values that are dequantized at once."""

Undo = Callable[[str, Tensor, Any], Tensor]
"""`(GGUF name, stored tensor, config) -> tensor in Transformers' layout`."""


@dataclass(frozen=True)
class Rule:
    """Parameters whose tensors the `gguf` package does not name.

    Attributes:
        parameter: pattern of their names; its groups fill the names of `sources`.
        sources: tensors of the file.
        join: makes the parameter of them, given the match of `parameter`.
    """

    parameter: str
    sources: tuple[str, ...]
    join: Callable[[re.Match[str], Sequence[Tensor]], Tensor] = lambda _match, tensors: tensors[0]


@dataclass(frozen=True)
class Layout:
    """How a file stores the models of one `model_type`."""

    undo: Undo = lambda _name, stored, _config: stored
    rules: tuple[Rule, ...] = ()


@dataclass(frozen=True)
class ParameterSource:
    """A parameter and the tensors that it is made of."""

    names: tuple[str, ...]
    join: Callable[[Sequence[Tensor]], Tensor] = field(default=lambda tensors: tensors[0])

    def make(self, read: Callable[[str], Tensor], undo: Undo, config: Any, shape: torch.Size) -> Tensor:
        """Return the parameter, with `read` for a tensor of the file.

        Raises:
            RuntimeError: the tensors do not have the sizes that the config asks for.
        """
        made = self.join([undo(name, read(name), config) for name in self.names])
        is_same = [size for size in made.shape if size > 1] == [size for size in shape if size > 1]
        return made.reshape(shape) if is_same else made


def parameter_sources(
    parameters: Sequence[str], architecture: str, num_blocks: int, rules: Sequence[Rule]
) -> dict[str, ParameterSource]:
    """Return the source of each parameter."""
    import gguf

    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    table = gguf.get_tensor_name_map(number, num_blocks)

    def source(parameter: str) -> ParameterSource:
        for rule in rules:
            if match := re.fullmatch(rule.parameter, parameter):
                return ParameterSource(
                    tuple(name.format(*match.groups()) for name in rule.sources), partial(rule.join, match)
                )
        name = table.get_name(parameter, try_suffixes=(".weight", ".bias"))
        return ParameterSource((name or f"(no name for {parameter})",))

    return {parameter: source(parameter) for parameter in parameters}


def dequantize(stored: StoredTensor) -> Tensor:
    """Return a tensor of the file: quantized ones in bfloat16, others in float32.

    Raises:
        ValueError: an unknown number format, or the file ends before.
        NotImplementedError: a number format that the package `gguf` does not dequantize.
    """
    import gguf

    kind, rows = gguf.GGMLQuantizationType(stored.kind), stored.rows()
    is_quantized = kind not in (
        gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16, gguf.GGMLQuantizationType.BF16,
    )  # fmt: skip
    made = torch.empty(len(rows), stored.shape[-1], dtype=torch.bfloat16 if is_quantized else torch.float32)
    step = max(1, _CHUNK_VALUES // stored.shape[-1])
    for start in range(0, len(rows), step):
        part = rows[start : start + step]
        if kind in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16):
            part = part.view(np.float32 if kind == gguf.GGMLQuantizationType.F32 else np.float16)
        made[start : start + step] = torch.from_numpy(gguf.dequantize(part, kind).astype(np.float32))
    return made.reshape(stored.shape)


def _permuted_heads(name: str, stored: Tensor, config: Any) -> Tensor:
    """Undo llama.cpp's row order of query and key: it rotates adjacent rows, Transformers the halves of a head."""
    num_heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(name.split(".")[-2])
    if num_heads is None:
        return stored
    half = stored.shape[0] // num_heads // 2
    return stored.reshape(num_heads, half, 2, -1).transpose(1, 2).reshape(stored.shape)


def _centred_norms(name: str, stored: Tensor, _config: Any) -> Tensor:
    """Undo the 1 that llama.cpp adds to the weights of norms that Transformers adds it to itself."""
    return stored - 1 if name.endswith("norm.weight") else stored


def _transposed(name: str, stored: Tensor, _config: Any) -> Tensor:
    """Undo the transposition of Conv1D layers, which are (in, out)."""
    linear = ("attn_qkv.weight", "attn_output.weight", "ffn_up.weight", "ffn_down.weight")
    return stored.t() if name.endswith(linear) else stored


def _bloom_heads(name: str, stored: Tensor, config: Any) -> Tensor:
    """Undo the order queries, keys, values of all heads: Transformers has the three of each head together."""
    if ".attn_qkv." not in name:
        return stored
    return (
        stored.reshape(3, config.n_head, config.hidden_size // config.n_head, -1).transpose(0, 1).reshape(stored.shape)
    )


def _falcon_heads(name: str, stored: Tensor, config: Any) -> Tensor:
    """Undo the order queries, keys, values: Transformers has the queries of each key head with their key and value."""
    if ".attn_qkv." not in name:
        return stored
    num_groups = config.num_kv_heads
    head_dim = config.hidden_size // config.num_attention_heads
    sizes = [config.num_attention_heads * head_dim, num_groups * head_dim, num_groups * head_dim]
    parts = [part.reshape(num_groups, -1, head_dim, stored.shape[-1]) for part in stored.split(sizes)]
    return torch.cat(parts, dim=1).reshape(stored.shape)


def _negative_exponential(name: str, stored: Tensor, _config: Any) -> Tensor:
    """Undo llama.cpp's `-exp(A_log)`."""
    return torch.log(-stored) if name.endswith(".ssm_a") else stored


def _qwen3_5_heads(name: str, stored: Tensor, config: Any) -> Tensor:
    """Undo llama.cpp's order of value heads, its `-exp(A_log)` and the 1 added to norms.

    It stores value heads as (heads per key head, key heads), Transformers as (key heads, heads per key head).
    """
    num_keys, size = config.linear_num_key_heads, config.linear_value_head_dim
    heads_per_key = config.linear_num_value_heads // num_keys

    def grouped(values: Tensor, head_size: int) -> Tensor:
        return values.reshape(heads_per_key, num_keys, head_size, -1).transpose(0, 1).reshape(values.shape)

    kind = name.split(".", 2)[-1]
    if kind == "ssm_a":
        return grouped(torch.log(-stored), 1)
    if kind in ("ssm_alpha.weight", "ssm_beta.weight", "ssm_dt.bias"):
        return grouped(stored, 1)
    if kind == "attn_gate.weight":
        return grouped(stored, size)
    if kind in ("attn_qkv.weight", "ssm_conv1d.weight"):
        num_queries_keys = 2 * num_keys * config.linear_key_head_dim
        return torch.cat([stored[:num_queries_keys], grouped(stored[num_queries_keys:], size)])
    if kind == "ssm_out.weight":
        return grouped(stored.t().contiguous(), size).t()
    return stored if kind == "ssm_norm.weight" else _centred_norms(name, stored, config)


def _one_after_another(_match: re.Match[str], tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(tensors), dim=1)


def _alternating(_match: re.Match[str], tensors: Sequence[Tensor]) -> Tensor:
    """Return gate and up columns alternately: (experts, out, in) -> (experts, in, 2 * out), or biases alike."""
    columns = [tensor.transpose(1, 2) if tensor.dim() == 3 else tensor for tensor in tensors]
    return torch.stack(columns, dim=-1).flatten(-2)


_LAYER = r"model\.layers\.(\d+)\."
_EXPERTS = (
    Rule(
        _LAYER + r"mlp\.experts\.gate_up_proj",
        ("blk.{}.ffn_gate_exps.weight", "blk.{}.ffn_up_exps.weight"),
        _one_after_another,
    ),
    Rule(_LAYER + r"mlp\.experts\.down_proj", ("blk.{}.ffn_down_exps.weight",)),
)
_ROUTED = (*_EXPERTS, Rule(_LAYER + r"mlp\.gate\.weight", ("blk.{}.ffn_gate_inp.weight",)))
_GPT_OSS = (
    Rule(
        _LAYER + r"mlp\.experts\.gate_up_proj",
        ("blk.{}.ffn_gate_exps.weight", "blk.{}.ffn_up_exps.weight"),
        _alternating,
    ),
    Rule(
        _LAYER + r"mlp\.experts\.gate_up_proj_bias",
        ("blk.{}.ffn_gate_exps.bias", "blk.{}.ffn_up_exps.bias"),
        _alternating,
    ),
    Rule(
        _LAYER + r"mlp\.experts\.down_proj",
        ("blk.{}.ffn_down_exps.weight",),
        lambda _, tensors: tensors[0].transpose(1, 2),
    ),
    Rule(_LAYER + r"mlp\.experts\.down_proj_bias", ("blk.{}.ffn_down_exps.bias",)),
    Rule(_LAYER + r"self_attn\.sinks", ("blk.{}.attn_sinks.weight",)),
)
_STABLELM_NORMS = tuple(
    Rule(
        _LAYER + rf"self_attn\.{letter}_layernorm\.norms\.(\d+)\.weight",
        (f"blk.{{}}.attn_{letter}_norm.weight",),
        lambda match, tensors: tensors[0][int(match[2])],
    )
    for letter in "qk"
)
_QWEN3_5 = (Rule(_LAYER + r"linear_attn\.dt_bias", ("blk.{}.ssm_dt.bias",)),)
_BLOOM = (
    Rule(r"transformer\.word_embeddings_layernorm\.(\w+)", ("token_embd_norm.{}",)),
    Rule(r"transformer\.h\.(\d+)\.post_attention_layernorm\.(\w+)", ("blk.{}.ffn_norm.{}",)),
)
LAYOUTS: Mapping[str, Layout] = {
    "llama": Layout(_permuted_heads),
    "mixtral": Layout(_permuted_heads, _ROUTED),
    "qwen2": Layout(),
    "qwen2_moe": Layout(rules=_EXPERTS),
    "qwen3": Layout(),
    "qwen3_moe": Layout(rules=_EXPERTS),
    "qwen3_5_text": Layout(_qwen3_5_heads, _QWEN3_5),
    "qwen3_5_moe_text": Layout(_qwen3_5_heads, (*_QWEN3_5, *_EXPERTS)),
    "phi3": Layout(),
    "gemma": Layout(_centred_norms),
    "gemma2": Layout(_centred_norms),
    "gemma3_text": Layout(_centred_norms),
    "gpt_oss": Layout(rules=_GPT_OSS),
    "minimax_m2": Layout(
        rules=(*_ROUTED, Rule(_LAYER + r"mlp\.e_score_correction_bias", ("blk.{}.exp_probs_b.bias",)))
    ),
    "falcon": Layout(_falcon_heads),
    "starcoder2": Layout(),
    "stablelm": Layout(rules=_STABLELM_NORMS),
    "nemotron": Layout(_centred_norms),
    "gpt2": Layout(_transposed),
    "bloom": Layout(_bloom_heads, _BLOOM),
    "lfm2": Layout(),
    "mamba": Layout(_negative_exponential),
    "falcon_mamba": Layout(_negative_exponential),
}
"""Layouts by `model_type`."""
