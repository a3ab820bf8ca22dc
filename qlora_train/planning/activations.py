"""Memory of forward and backward passes: what autograd saves for each decoder layer, and what exists for a moment.

Every term is a tensor of the step. In bytes per token, with c bytes of the compute dtype, a layer with fused kernels saves

    norms        c h each                     attention   c (q + k + v + output), 4 per head for the softmax
    inputs       c in, once per tensor that linear layers read; not the down projection's, which is recomputed
    gated MLP    c (gate + up)                LoRA        c r per adapted layer

and the reference saves norms in float32, the input of each adapted layer again, and two more tensors of a gated MLP. Tests
compare both with the storages that autograd really saves.
"""

import math
from dataclasses import dataclass, replace

from qlora_train.kernels.block_sizes import BLOCK_SIZE, TILE_ROWS
from qlora_train.kernels.checkpointing_levels import CheckpointingLevel
from qlora_train.planning.model_shape import LayerShape, LinearShape, ModelShape

FLOAT32_BYTES = 4
DROPOUT_MASK_BYTES = 1
OUTPUT_NAMES = ("down_proj", "c_proj", "fc2", "fc_out", "dense_4h_to_h", "w2", "output_linear")
"""Last linear layer of an MLP."""


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """The largest micro-batch.

    Attributes:
        num_tokens: padding included.
        longest_row: tokens of the longest row in it.
        num_labels: tokens with loss.
    """

    num_tokens: int
    longest_row: int
    num_labels: int


@dataclass(frozen=True, slots=True)
class Computation:
    """How a step is computed.

    Attributes:
        r: LoRA rank.
        compute_bytes: of a number in the compute dtype.
        fused_kernels: the parity check passed.
        has_dropout: LoRA dropout is on.
        caches_weights: 4-bit weights are dequantized once, so that no workspace is needed.
        is_quantized: the base is in 4 bits.
        chunk_tokens: labels whose logits exist at once; None: all of a micro-batch.
    """

    r: int
    compute_bytes: int = 2
    fused_kernels: bool = True
    has_dropout: bool = False
    caches_weights: bool = False
    is_quantized: bool = True
    chunk_tokens: int | None = None


def saved_bytes(
    model: ModelShape, layer: LayerShape, batch: MicroBatch, how: Computation, level: CheckpointingLevel
) -> int:
    """Return the bytes that a decoder layer saves for the backward pass."""
    tokens, c = batch.num_tokens, how.compute_bytes
    if level == "full":
        return tokens * c * model.hidden_size
    mlp = mlp_linears(layer) if level == "mlp" else ()
    per_token = _norm_bytes(model, layer, how) + _attention_bytes(layer, batch, how)
    per_token += _linear_bytes(layer, how, without=mlp) + _activation_bytes(layer, how, without=mlp)
    factors = sum(how.r * linear.width for linear in layer.linears if linear.is_adapted and linear not in mlp)
    return tokens * per_token + c * factors + _experts_bytes(layer, batch, how)


def _norm_bytes(model: ModelShape, layer: LayerShape, how: Computation) -> int:
    size = how.compute_bytes if how.fused_kernels else FLOAT32_BYTES
    head_norm = 0
    if layer.attention is not None and layer.attention.has_head_norm:
        head_norm = size * (layer.attention.query_width + layer.attention.key_width)
    return layer.num_norms * (size * model.hidden_size + FLOAT32_BYTES) + head_norm


def _attention_bytes(layer: LayerShape, batch: MicroBatch, how: Computation) -> int:
    attention, c = layer.attention, how.compute_bytes
    if attention is None:
        return 0
    query, key, value = attention.query_width, attention.key_width, attention.value_width
    if attention.is_eager:  # scores before and after the softmax, which is float32, with keys and values of every head
        return c * 3 * query + attention.num_heads * batch.longest_row * (2 * c + FLOAT32_BYTES)
    views = query + key if any(linear.name in ("qkv_proj", "query_key_value") for linear in layer.linears) else 0
    return c * (2 * query + key + value + views) + FLOAT32_BYTES * attention.num_heads


def _linear_bytes(layer: LayerShape, how: Computation, *, without: tuple[LinearShape, ...]) -> int:
    """Return what linear layers save per token: inputs, LoRA's r numbers, and dropout masks."""
    c, adapted = how.compute_bytes, [linear for linear in layer.linears if linear.is_adapted]
    low = sum(c * how.r for linear in adapted if linear not in without)
    if not how.fused_kernels:
        masks = DROPOUT_MASK_BYTES * sum(linear.in_features for linear in adapted) if how.has_dropout else 0
        return low + masks + c * sum(linear.in_features for linear in adapted)
    inputs = {linear.reads: linear.in_features for linear in adapted}
    masks = DROPOUT_MASK_BYTES * sum(inputs.values()) if how.has_dropout else 0
    output = _mlp_output(layer)
    if output is not None and layer.has_gated_mlp:
        inputs.pop(output.reads, None)
    return low + masks + c * sum(inputs.values())


def _activation_bytes(layer: LayerShape, how: Computation, *, without: tuple[LinearShape, ...]) -> int:
    """Return what the nonlinearity of an MLP saves per token."""
    output = _mlp_output(layer)
    if output is None or without:
        return 0
    if layer.has_gated_mlp:
        return how.compute_bytes * output.in_features * (2 if how.fused_kernels else 3)
    return how.compute_bytes * output.in_features


def _experts_bytes(layer: LayerShape, batch: MicroBatch, how: Computation) -> int:
    """Return what a mixture's experts save: inputs and outputs of each choice of a token, and rounded LoRA factors."""
    if not layer.experts:
        return 0
    c, chosen = how.compute_bytes, batch.num_tokens * layer.num_experts_per_token
    up, down = layer.experts[0], layer.experts[-1]
    gated = down.in_features if up.out_features == 2 * down.in_features else 0
    widths = up.in_features + up.out_features + gated + down.in_features + down.out_features
    adapted = [experts for experts in layer.experts if experts.is_adapted]
    used = min(up.count, chosen)
    factors = sum(used * how.r * experts.width for experts in adapted)
    weighted = FLOAT32_BYTES * down.out_features  # some families have routing weights in the compute dtype
    return chosen * (c * (widths + how.r * len(adapted)) + weighted) + c * factors


def _mlp_output(layer: LayerShape) -> LinearShape | None:
    return next((linear for linear in layer.linears if linear.name in OUTPUT_NAMES), None)


def mlp_linears(layer: LayerShape) -> tuple[LinearShape, ...]:
    """Return what `mlp` recomputes: gate, up and down of a gated MLP, whose input is saved by the norm before it."""
    names = ("gate_proj", "up_proj", "gate_up_proj", "down_proj")
    return tuple(linear for linear in layer.linears if linear.name in names) if layer.has_gated_mlp else ()


# --- workspaces -------------------------------------------------------------------------------------------------------


def backward_workspace_bytes(model: ModelShape, layer: LayerShape, batch: MicroBatch, how: Computation) -> int:
    """Return the peak of a layer's backward pass beyond what it saved: gradients of activations, one weight dequantized."""
    tokens, c = batch.num_tokens, how.compute_bytes
    output = _mlp_output(layer)
    # fused kernels recompute the product of a gated MLP, which the reference has saved
    num_wide = 3 if layer.has_gated_mlp and how.fused_kernels else 2
    wide = 0 if output is None else num_wide * output.in_features
    attention = layer.attention
    heads = 0 if attention is None else 2 * attention.query_width + attention.key_width + attention.value_width
    scores = 0
    if attention is not None and attention.is_eager:
        scores = tokens * batch.longest_row * attention.num_heads * (c + FLOAT32_BYTES)
    expert = 0
    if layer.experts:
        chosen = tokens * layer.num_experts_per_token
        expert = c * chosen * (layer.experts[-1].out_features + layer.experts[0].in_features)
    dense = tokens * c * (max(wide, heads) + 2 * model.hidden_size)
    return max(dense, expert, scores) + weight_workspace_bytes(layer, how)


def weight_workspace_bytes(layer: LayerShape, how: Computation) -> int:
    """Return the bytes of the largest weight that is dequantized while it is used, with its absmax in float32."""
    if not how.is_quantized:
        return 0
    linears = [] if how.caches_weights else [linear.numel for linear in layer.quantized_linears]
    largest = max([*linears, *(experts.matrix_numel for experts in layer.experts)], default=0)
    return largest * how.compute_bytes + FLOAT32_BYTES * math.ceil(largest / BLOCK_SIZE)


def forward_workspace_bytes(model: ModelShape, layer: LayerShape, batch: MicroBatch, how: Computation) -> int:
    """Return the peak of a layer without gradients: its widest tensors, and one weight dequantized.

    Of a mixture, inputs and outputs of every choice of a token exist while the last expert computes.
    """
    tokens, c = batch.num_tokens, how.compute_bytes
    wide = 3 * max(linear.out_features for linear in layer.linears)
    if layer.experts:
        up, down, chosen = layer.experts[0], layer.experts[-1], layer.num_experts_per_token
        wide = max(wide, chosen * (up.in_features + down.out_features + up.out_features // up.count))
    return tokens * c * (wide + 2 * model.hidden_size) + weight_workspace_bytes(layer, how)


def loss_bytes(model: ModelShape, batch: MicroBatch, how: Computation) -> int:
    """Return the peak of the loss: logits, and hidden states with their gradients at the labels.

    Without chunks: logits, log-probabilities in float32, and the gradients of both.
    """
    labels, c = batch.num_labels, how.compute_bytes
    if how.chunk_tokens is None:
        return labels * model.vocab_size * (2 * c + 2 * FLOAT32_BYTES)
    chunk = min(labels, how.chunk_tokens)
    return c * (chunk * model.vocab_size + 3 * labels * model.hidden_size)


def tiled(batch: MicroBatch) -> MicroBatch:
    """Return the part of a batch whose MLP activations exist at once where layers are checkpointed."""
    return replace(batch, num_tokens=min(batch.num_tokens, TILE_ROWS))
