"""The memory of a QLoRA run, computed from config.json alone.

Weights are counted on a meta model, for any architecture. The step is a formula: what autograd saves for one decoder layer,
the activation checkpoints of the others, and the loss; a test compares it with an allocation-by-allocation count of real
steps. A GB is 10**9 bytes.

The formula is for the reference kernels with all logits of a micro-batch at once. Not counted: attention scores of `eager`,
the dequantized weight cache, the CUDA context (0.3 to 0.6 GB), fragmentation, other users of the device.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig
from transformers.pytorch_utils import Conv1D

from qlora_train.adapters import choose_targets, find_linears
from qlora_train.adapters.targets import is_target
from qlora_train.architectures import Architecture, detect
from qlora_train.config import LoraSection
from qlora_train.config.optimizers import CODE_TABLE_BYTES as OPTIMIZER_TABLE_BYTES
from qlora_train.config.optimizers import (
    MIN_QUANTIZED_NUMEL,
    TrainedTensor,
    automatic_optimizer,
    optimizer_state_bytes,
)
from qlora_train.kernels.expert_weights import ABSMAX_BLOCK_SIZE, BLOCK_SIZE
from qlora_train.models.moe import expert_parameters, routers
from qlora_train.models.text_only import text_model
from qlora_train.utils.errors import ModelError

CODE_TABLE_BYTES = 16 * 4
OFFSET_BYTES = 4
ABSMAX_TABLE_BYTES = 256 * 4 + OFFSET_BYTES
"""The 256 values of the 8-bit scales, and their offset."""
COMPUTE_BYTES = 2
ADAPTER_BYTES = 4
HIDDEN_BYTES_PER_TOKEN = 26
"""Saved per element of a layer's hidden state besides the linears' inputs and outputs: two norms in float32 with their
results, the rotated query and key, the attention output, the residual stream."""
DROPOUT_MASK_BYTES = 1
"""Saved per element of an adapter's input with LoRA dropout."""
EXPERTS_PER_TOKEN_KEYS = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk")
LOSS_BYTES_PER_LOGIT = 12
"""A logit in bfloat16, its log-probability in float32, and the gradients of both."""


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes on the device, by purpose.

    Attributes:
        quantized_weights_bytes: packed 4-bit weights.
        quantization_state_bytes: absmax, its scales, and code tables.
        other_weights_bytes: embeddings, output head, norms and biases, in 16 bits.
        optimizer: what `train.optim: auto` selects.
        optimizer_bytes: two moments, in float32, or in 8 bits with block scales.
        checkpoints_bytes: hidden states saved by gradient checkpointing.
        forward_layer_bytes: peak of one checkpointed decoder layer in the forward pass.
        layer_bytes: peak of one decoder layer that is recomputed and differentiated.
        loss_bytes: peak of logits and their gradients.
        autocast_bytes: 16-bit copies of the adapter, alive during the forward pass.
        accumulates: gradients of earlier micro-batches are alive during the whole step.
    """

    quantized_weights_bytes: int
    quantization_state_bytes: int
    other_weights_bytes: int
    adapter_bytes: int
    optimizer: str
    optimizer_bytes: int
    gradients_bytes: int
    checkpoints_bytes: int
    forward_layer_bytes: int
    layer_bytes: int
    loss_bytes: int
    autocast_bytes: int
    accumulates: bool

    @property
    def weights_bytes(self) -> int:
        """The base model and the adapter."""
        base = self.quantized_weights_bytes + self.quantization_state_bytes + self.other_weights_bytes
        return base + self.adapter_bytes

    @property
    def step_bytes(self) -> int:
        """Peak of forward and backward pass beyond weights and optimizer, gradients included.

        The backward pass frees a checkpoint when it creates gradients, so the larger of the two counts, unless gradients
        of an earlier micro-batch exist.
        """
        forward = self.checkpoints_bytes + self.autocast_bytes + self.forward_layer_bytes
        loss = self.checkpoints_bytes + self.loss_bytes
        backward = max(self.checkpoints_bytes, self.gradients_bytes) + self.layer_bytes
        if self.accumulates:
            return self.gradients_bytes + max(forward, loss, self.checkpoints_bytes + self.layer_bytes)
        return max(forward, loss, backward)

    @property
    def total_bytes(self) -> int:
        """Peak of the run."""
        return self.weights_bytes + self.optimizer_bytes + self.step_bytes


@dataclass(frozen=True, slots=True)
class _Weight:
    """A linear layer's matrix, or `count` expert matrices, of which each token uses `per_token`."""

    in_features: int
    out_features: int
    carries_adapter: bool
    count: int = 1
    per_token: int = 1

    @property
    def matrix_numel(self) -> int:
        return self.in_features * self.out_features

    @property
    def numel(self) -> int:
        return self.count * self.matrix_numel

    @property
    def width(self) -> int:
        """Input and output elements per token."""
        return self.per_token * (self.in_features + self.out_features)


def memory_plan(
    config_json: Mapping[str, Any],
    *,
    r: int,
    tokens: int,
    num_labels: int | None = None,
    double_quant: bool = True,
    accumulates: bool = False,
    dropout: bool = False,
    gpu_bytes: int = 0,
) -> MemoryPlan:
    """Plan the memory of a run: 4-bit base, LoRA on every linear but the head, full checkpointing, `train.optim: auto`.

    Args:
        config_json: the content of config.json.
        r: rank of the adapter.
        tokens: batch size times sequence length of the largest micro-batch.
        num_labels: label tokens in it; None is all.
        double_quant: double quantization of absmax.
        accumulates: more than one micro-batch per step.
        dropout: LoRA dropout is on.
        gpu_bytes: memory of the GPU, which selects the optimizer; 0 selects the one with the smaller state.

    Raises:
        ModelError: Transformers has no causal language model of this model_type.
    """
    config, model = _on_meta(config_json)
    weights = list(_quantized_weights(model, config, detect(config_json)))
    quantized = sum(weight.numel for weight in weights)
    adapted = [weight for weight in weights if weight.carries_adapter]
    adapters = [r * size * weight.count for weight in adapted for size in (weight.in_features, weight.out_features)]
    read = [tokens * weight.in_features * weight.per_token for weight in adapted] if dropout else [0]
    dropped_bytes = COMPUTE_BYTES * max(read)  # one adapter's input, beside its saved mask
    mask_bytes = DROPOUT_MASK_BYTES * math.ceil(sum(read) / config.num_hidden_layers)
    optimizer = automatic_optimizer([TrainedTensor((numel,)) for numel in adapters], gpu_bytes)
    num_other = sum(parameter.numel() for parameter in model.parameters()) - quantized
    return MemoryPlan(
        quantized_weights_bytes=sum(weight.count * math.ceil(weight.matrix_numel / 2) for weight in weights),
        quantization_state_bytes=sum(_state_bytes(weight, double_quant) for weight in weights),
        other_weights_bytes=num_other * COMPUTE_BYTES,
        adapter_bytes=sum(adapters) * ADAPTER_BYTES,
        optimizer=optimizer,
        optimizer_bytes=optimizer_bytes(adapters) if optimizer == "paged_adamw_8bit" else 8 * sum(adapters),
        gradients_bytes=sum(adapters) * ADAPTER_BYTES,
        checkpoints_bytes=config.num_hidden_layers * tokens * config.hidden_size * COMPUTE_BYTES,
        forward_layer_bytes=max(COMPUTE_BYTES * (w.matrix_numel + 2 * tokens * w.width) for w in weights)
        + dropped_bytes
        + DROPOUT_MASK_BYTES * max(read),
        layer_bytes=_layer_bytes(weights, config, tokens) + dropped_bytes + mask_bytes,
        loss_bytes=LOSS_BYTES_PER_LOGIT * (tokens if num_labels is None else num_labels) * config.vocab_size,
        autocast_bytes=sum(adapters) * COMPUTE_BYTES,
        accumulates=accumulates,
    )


def _quantized_weights(model: Any, config: Any, architecture: Architecture) -> Iterator[_Weight]:
    """Yield the weights that the loader quantizes, and whether `all-linear` adapts them."""
    linears = find_linears(model)
    targets = choose_targets(model, linears, LoraSection(), architecture)
    skipped = {*routers(model), *(name for name in linears if name.rpartition(".")[2] in architecture.keep_16bit)}
    for name, module in linears.items():
        if name not in skipped:
            yield _Weight(*_features(module), is_target(name, targets))
    per_token = next((count for key in EXPERTS_PER_TOKEN_KEYS if (count := getattr(config, key, None))), 1)
    for name, module in expert_parameters(model).items():
        count, rows, columns = getattr(module, name.rpartition(".")[2]).shape
        yield _Weight(columns, rows, True, count, per_token)


def _features(linear: Any) -> tuple[int, int]:
    if isinstance(linear, Conv1D):
        return linear.nx, linear.nf
    return linear.in_features, linear.out_features


def _on_meta(config_json: Mapping[str, Any]) -> tuple[Any, Any]:
    settings = {key: value for key, value in config_json.items() if key != "model_type"}
    try:
        config = AutoConfig.for_model(config_json.get("model_type"), **settings)
        with torch.device("meta"):
            model = text_model(config).build(config)
    except ValueError as error:
        reason = str(error).strip().split("\n", 1)[0]
        raise ModelError(f"config.json: no causal language model can be built from it: {reason}") from error
    return config.get_text_config(), model


def quantization_state_bytes(numel: int, double_quant: bool) -> int:
    """Return the bytes of bitsandbytes' quantization state of one tensor."""
    blocks = math.ceil(numel / BLOCK_SIZE)
    if not double_quant:
        return blocks * 4 + CODE_TABLE_BYTES
    return blocks + math.ceil(blocks / ABSMAX_BLOCK_SIZE) * 4 + CODE_TABLE_BYTES + ABSMAX_TABLE_BYTES


def _state_bytes(weight: _Weight, double_quant: bool) -> int:
    # the experts of a stack share their code tables
    tables = CODE_TABLE_BYTES + (ABSMAX_TABLE_BYTES if double_quant else 0)
    shared = (weight.count - 1) * (tables - (OFFSET_BYTES if double_quant else 0))
    return weight.count * quantization_state_bytes(weight.matrix_numel, double_quant) - shared


def optimizer_bytes(numels: Iterable[int]) -> int:
    """Return the bytes of bitsandbytes' 8-bit AdamW state; paged state counts as resident."""
    tensors = [TrainedTensor((numel,)) for numel in numels]
    num_quantized = sum(tensor.numel >= MIN_QUANTIZED_NUMEL for tensor in tensors)
    # in memory all tensors share the two code tables, which a checkpoint stores for each
    shared = 2 * OPTIMIZER_TABLE_BYTES * (num_quantized - 1)
    return sum(optimizer_state_bytes("adamw_8bit", tensor) for tensor in tensors) - shared


def _layer_bytes(weights: list[_Weight], config: Any, tokens: int) -> int:
    # inputs and outputs of its weights, norms and attention, and one dequantized matrix
    width = sum(weight.width for weight in weights) / config.num_hidden_layers
    saved = tokens * (COMPUTE_BYTES * width + HIDDEN_BYTES_PER_TOKEN * config.hidden_size)
    return math.ceil(saved) + COMPUTE_BYTES * max(weight.matrix_numel for weight in weights)
