"""Models, reduced to names and shapes of tensors, that llama.cpp's quantizer treats differently.

`scripts/record_quants.py` quantizes them with `llama-quantize` and records what it writes.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

WIDE, NARROW, ODD = 256, 96, 80
"""Row lengths: blocks of 256, of 32 and of neither."""
NUM_TOKENS = 64
_MULTIPLIER = 2654435761


@dataclass(frozen=True)
class QuantCase:
    """A model: its architecture and settings, and the shape of each tensor, the row length first."""

    architecture: str
    settings: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]


def case(
    architecture: str = "llama", *, layers: int = 4, heads: int = 4, kv_heads: int = 2, width: int = WIDE, experts: int = 0,
    tied: bool = False, fused: bool = False, only: tuple[str, ...] = (), extra: dict[str, tuple[int, ...]] | None = None,
    **settings: Any,
) -> QuantCase:  # fmt: skip
    """Return a model; `fused` has one matrix for query, key and value; `only` are the tensors of layers, all if empty."""
    narrow = 2 * width
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (width, NUM_TOKENS), "output_norm.weight": (width,)}
    if not tied:
        shapes["output.weight"] = (width, NUM_TOKENS)
    attention = ("attn_qkv", "attn_output") if fused else ("attn_q", "attn_k", "attn_v", "attn_output")
    for layer in range(layers):
        shapes |= {f"blk.{layer}.{name}.weight": (width, width) for name in attention}
        shapes[f"blk.{layer}.ffn_norm.weight"] = (width,)
        suffix, stack = ("_exps", (experts,)) if experts else ("", ())
        for name, shape in (("ffn_gate", (width, narrow)), ("ffn_up", (width, narrow)), ("ffn_down", (narrow, width))):
            shapes[f"blk.{layer}.{name}{suffix}.weight"] = (*shape, *stack)
        if experts:
            shapes[f"blk.{layer}.ffn_gate_inp.weight"] = (width, experts)
    if only:
        shapes = {
            name: shape for name, shape in shapes.items() if not name.startswith("blk.") or name.split(".")[2] in only
        }
    shapes |= extra or {}
    found = {
        "block_count": layers, "context_length": 64, "embedding_length": width, "feed_forward_length": narrow,
        "attention.head_count": heads, "attention.head_count_kv": kv_heads, "attention.layer_norm_rms_epsilon": 1e-5,
        "attention.layer_norm_epsilon": 1e-5, "vocab_size": NUM_TOKENS,
    }  # fmt: skip
    if experts:
        found |= {"expert_count": experts, "expert_used_count": 2}
    return QuantCase(architecture, found | settings, shapes)


CASES = {
    "llama": case(layers=20),
    "few layers": case(layers=1),
    "shared heads": case(layers=8, heads=8),
    "no shared heads, tied": case(layers=8, kv_heads=4, tied=True),
    "narrow": case(layers=8, width=NARROW),
    "narrow, tied": case(layers=8, width=NARROW, tied=True),
    "neither": case(layers=2, width=ODD),
    "70B": case(layers=80, heads=8, kv_heads=1, width=32, only=("attn_v", "ffn_down")),
    "65B": case(layers=80, heads=4, kv_heads=4, width=32, only=("attn_v", "ffn_down")),
    "72B": case("qwen2", layers=80, kv_heads=4, width=32, only=("attn_v",)),
    "8 experts": case(layers=16, experts=8),
    "8 experts, one layer": case(layers=1, experts=8),
    "16 experts": case("qwen3moe", layers=16, experts=16, heads=8, expert_feed_forward_length=2 * WIDE),
    "falcon": case("falcon", layers=20, kv_heads=1, fused=True),
    "phi3": case("phi3", layers=12, fused=True, **{"rope.dimension_count": 64, "attention.sliding_window": 0}),
    "gpt2": case("gpt2", layers=12, fused=True, tied=True, extra={"position_embd.weight": (WIDE, 64)}),
}


def write_case(found: QuantCase, path: Path, kind: str = "F32", *, with_values: bool = True) -> Path:
    """Write a case as GGUF with matrices of one type; its values are the same on every machine."""
    writer = gguf.GGUFWriter(path, found.architecture)
    for key, value in found.settings.items():
        add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
        add(f"{found.architecture}.{key}", value)
    for number, (name, shape) in enumerate(found.shapes.items()):
        stored = gguf.GGMLQuantizationType[kind] if len(shape) > 1 else gguf.GGMLQuantizationType.F32
        values = _values(number, shape) if with_values else np.zeros(shape[::-1], np.float32)
        writer.add_tensor(name, gguf.quantize(values, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _values(number: int, shape: tuple[int, ...]) -> np.ndarray[Any, np.dtype[np.float32]]:
    count = int(np.prod(shape))
    index = np.arange(count, dtype=np.uint64) + np.uint64(count * number)
    uniform = (index * np.uint64(_MULTIPLIER) % np.uint64(2**32)).astype(np.float64) / 2**32 - 0.5
    return (uniform**3).astype(np.float32).reshape(shape[::-1])


def encode_types(types: dict[str, str]) -> str:
    """Write types of tensors, in the order of names, as `Q4_K*3 Q6_K`."""
    runs: list[list[Any]] = []
    for name in sorted(types):
        if runs and runs[-1][0] == types[name]:
            runs[-1][1] += 1
        else:
            runs.append([types[name], 1])
    return " ".join(kind if count == 1 else f"{kind}*{count}" for kind, count in runs)
