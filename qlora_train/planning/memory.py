"""The memory of a QLoRA run, counted from config.json alone: nothing is downloaded, nothing is allocated.

The model is built on the meta device, so that every weight is counted as it will be stored, whatever the architecture.
The step is a formula. Its terms are what autograd keeps for one decoder layer, what the checkpoints of the others hold,
and what the loss needs; a test holds it against an allocation-by-allocation count of real steps. A GB is 10**9 bytes.

Counted is the plain path with all logits of a micro-batch at once; a step takes less where the loss is made in pieces
(`loss.choose_chunk_tokens`), and more where dequantised weights are kept.

Attention is taken to keep no scores, as flash and sdpa kernels do; `eager` needs a square of the length on top. Not
counted either: the CUDA context (0.3 to 0.6 GB), the fragmentation of the allocator, and whatever else uses the device.
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
from qlora_train.config.optimizers import TrainedTensor, automatic_optimizer
from qlora_train.kernels.expert_weights import ABSMAX_BLOCK_SIZE, BLOCK_SIZE
from qlora_train.models.moe import expert_parameters, routers
from qlora_train.models.text_only import text_model
from qlora_train.utils.errors import ModelError

CODE_TABLE_BYTES = 16 * 4
OFFSET_BYTES = 4
ABSMAX_TABLE_BYTES = 256 * 4 + OFFSET_BYTES
"""The 256 values of the 8-bit scales, and their offset."""
COMPUTE_BYTES = 2
"""Of a number in bfloat16 or float16."""
ADAPTER_BYTES = 4
OPTIMIZER_BLOCK_SIZE = 256
OPTIMIZER_MIN_NUMEL = 4096
"""bitsandbytes keeps the state of smaller tensors in float32."""
OPTIMIZER_TABLES_BYTES = 2 * 256 * 4
HIDDEN_BYTES_PER_TOKEN = 26
"""Kept for each number of a layer's hidden state besides the linears' inputs and outputs: two norms in float32 with
their results, the rotated query and key, the attention's output, the residual stream."""
DROPOUT_MASK_BYTES = 1
"""Kept for each number that an adapter reads, where LoRA dropout is on (`kernels.dropout`)."""
EXPERTS_PER_TOKEN_KEYS = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk")
LOSS_BYTES_PER_LOGIT = 12
"""A logit in bfloat16, its log-probability in float32, the gradients of both."""


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes on the device, by what they are for.

    Attributes:
        quantized_weights_bytes: packed 4-bit weights.
        quantization_state_bytes: block scales, their scales, and code tables.
        other_weights_bytes: embeddings, output head, norms and biases, in 16 bits.
        adapter_bytes: LoRA in float32.
        optimizer: what `train.optim: auto` is.
        optimizer_bytes: two moments, in float32, or in 8 bits with block scales.
        gradients_bytes: of the adapter, in float32.
        checkpoints_bytes: hidden states kept by gradient checkpointing.
        forward_layer_bytes: highest use while one decoder layer is computed and keeps nothing but its input.
        layer_bytes: highest use while one decoder layer is computed again and differentiated.
        loss_bytes: highest use of logits and their gradients.
        autocast_bytes: 16-bit copies of the adapter, alive during the forward pass.
        accumulates: gradients of earlier micro-batches are alive during a whole step.
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
        """Highest use of a forward and backward pass beyond weights and optimizer, gradients included.

        The backward pass frees a checkpoint where it makes gradients: of the two, the larger counts, not the sum, unless
        gradients of an earlier micro-batch are there already.
        """
        forward = self.checkpoints_bytes + self.autocast_bytes + self.forward_layer_bytes
        loss = self.checkpoints_bytes + self.loss_bytes
        backward = max(self.checkpoints_bytes, self.gradients_bytes) + self.layer_bytes
        if self.accumulates:
            return self.gradients_bytes + max(forward, loss, self.checkpoints_bytes + self.layer_bytes)
        return max(forward, loss, backward)

    @property
    def total_bytes(self) -> int:
        """Highest use of a run."""
        return self.weights_bytes + self.optimizer_bytes + self.step_bytes


@dataclass(frozen=True, slots=True)
class _Weight:
    """A linear layer's matrix, or the matrices of a stack of experts, of which a token sees `per_token`."""

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
        """Numbers that are read and written for a token."""
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
    """Count the memory of a run: 4-bit base, LoRA on every linear but the head, checkpointing, `train.optim: auto`.

    Args:
        config_json: the content of config.json.
        r: rank of the adapter.
        tokens: batch times length of the largest micro-batch.
        num_labels: tokens of it that carry loss; None is all of them.
        double_quant: the block scales are quantised too.
        accumulates: more than one micro-batch a step.
        dropout: LoRA dropout is on.
        gpu_bytes: memory of the GPU, which decides the optimizer; 0 takes the one with the smaller state.

    Raises:
        ModelError: Transformers has no causal language model of this model_type.
    """
    config, model = _on_meta(config_json)
    weights = list(_quantized_weights(model, config, detect(config_json)))
    quantized = sum(weight.numel for weight in weights)
    adapted = [weight for weight in weights if weight.carries_adapter]
    adapters = [r * size * weight.count for weight in adapted for size in (weight.in_features, weight.out_features)]
    read = [tokens * weight.in_features * weight.per_token for weight in adapted] if dropout else [0]
    dropped_bytes = COMPUTE_BYTES * max(read)  # of one adapter's input, beside which its mask stays
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
    """Yield what the loader stores in 4 bits, and whether `all-linear` puts an adapter on it."""
    linears = find_linears(model)
    targets = choose_targets(model, linears, LoraSection(), architecture)
    kept = {*routers(model), *(name for name in linears if name.rpartition(".")[2] in architecture.keep_16bit)}
    for name, module in linears.items():
        if name not in kept:
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
    """Return the bytes that bitsandbytes stores beside the packed weights of one tensor of `numel` numbers."""
    blocks = math.ceil(numel / BLOCK_SIZE)
    if not double_quant:
        return blocks * 4 + CODE_TABLE_BYTES
    return blocks + math.ceil(blocks / ABSMAX_BLOCK_SIZE) * 4 + CODE_TABLE_BYTES + ABSMAX_TABLE_BYTES


def _state_bytes(weight: _Weight, double_quant: bool) -> int:
    """Return the bytes beside packed weights; the experts of a stack share their code tables."""
    tables = CODE_TABLE_BYTES + (ABSMAX_TABLE_BYTES if double_quant else 0)
    shared = (weight.count - 1) * (tables - (OFFSET_BYTES if double_quant else 0))
    return weight.count * quantization_state_bytes(weight.matrix_numel, double_quant) - shared


def optimizer_bytes(numels: Iterable[int]) -> int:
    """Return the bytes of bitsandbytes' 8-bit AdamW for tensors of these sizes; paged state counts as if resident."""

    def of_tensor(numel: int) -> int:
        if numel < OPTIMIZER_MIN_NUMEL:
            return 2 * 4 * numel
        return 2 * (numel + 4 * math.ceil(numel / OPTIMIZER_BLOCK_SIZE))

    return sum(of_tensor(numel) for numel in numels) + OPTIMIZER_TABLES_BYTES


def _layer_bytes(weights: list[_Weight], config: Any, tokens: int) -> int:
    """Highest use of one layer: what its weights read and write, what is around them, and one dequantised matrix."""
    width = sum(weight.width for weight in weights) / config.num_hidden_layers
    kept = tokens * (COMPUTE_BYTES * width + HIDDEN_BYTES_PER_TOKEN * config.hidden_size)
    return math.ceil(kept) + COMPUTE_BYTES * max(weight.matrix_numel for weight in weights)
