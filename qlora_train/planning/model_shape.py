"""The shapes of a base model that determine its memory: weights, and what a decoder layer saves for backward.

`family_shapes` computes them from config.json; `meta_shapes` walks a model on the meta device. No torch.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from qlora_train.kernels.block_sizes import ABSMAX_BLOCK_SIZE, BLOCK_SIZE

CODE_TABLE_BYTES = 16 * 4
OFFSET_BYTES = 4
ABSMAX_TABLE_BYTES = 256 * 4 + OFFSET_BYTES
"""The 256 values of the 8-bit absmax, and their offset."""


@dataclass(frozen=True, slots=True)
class LinearShape:
    """A frozen linear layer.

    Attributes:
        name: the last part of its full name.
        reads: number of its input among those of the decoder layer; layers of one number read the same tensor.
        is_adapted: it carries LoRA.
        is_quantized: it is stored in 4 bits; routers are not.
    """

    name: str
    in_features: int
    out_features: int
    reads: int
    is_adapted: bool = True
    is_quantized: bool = True

    @property
    def numel(self) -> int:
        """Number of weights, without the bias."""
        return self.in_features * self.out_features

    @property
    def width(self) -> int:
        """Elements of input and output per token."""
        return self.in_features + self.out_features


@dataclass(frozen=True, slots=True)
class ExpertsShape:
    """Stacked expert matrices, one per expert."""

    name: str
    count: int
    in_features: int
    out_features: int
    is_adapted: bool = True

    @property
    def matrix_numel(self) -> int:
        """Number of weights of one expert."""
        return self.in_features * self.out_features

    @property
    def width(self) -> int:
        """Elements of input and output per token and expert."""
        return self.in_features + self.out_features


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """Softmax attention.

    Attributes:
        key_width: of all key heads together; `value_width` likewise.
        has_head_norm: queries and keys are normalized.
        is_eager: the scores are stored.
    """

    num_heads: int
    query_width: int
    key_width: int
    value_width: int
    has_head_norm: bool = False
    is_eager: bool = False


@dataclass(frozen=True, slots=True)
class LayerShape:
    """A decoder layer.

    Attributes:
        linears: in the order of the model, routers included.
        num_experts_per_token: experts that a token passes.
        num_norms: norms of the hidden state.
        has_gated_mlp: its MLP is f(gate) * up.
        other_numel: norms and biases.
    """

    linears: tuple[LinearShape, ...]
    attention: AttentionShape | None
    num_norms: int
    other_numel: int
    has_gated_mlp: bool = False
    experts: tuple[ExpertsShape, ...] = ()
    num_experts_per_token: int = 0

    @property
    def quantized_linears(self) -> tuple[LinearShape, ...]:
        """The linear layers in 4 bits."""
        return tuple(linear for linear in self.linears if linear.is_quantized)


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A base model.

    Attributes:
        head_numel: of an output head that is not tied to the embedding.
        other_numel: everything outside of decoder layers except embedding and head.
        outer_linears: quantized linear layers outside of decoder layers.
    """

    hidden_size: int
    vocab_size: int
    layers: tuple[LayerShape, ...]
    embedding_numel: int
    head_numel: int
    other_numel: int
    outer_linears: tuple[LinearShape, ...] = ()

    def linears(self) -> Iterator[LinearShape]:
        """Yield the linear layers that are stored in 4 bits."""
        yield from self.outer_linears
        for layer in self.layers:
            yield from layer.quantized_linears

    def experts(self) -> Iterator[ExpertsShape]:
        """Yield the stacked expert weights."""
        for layer in self.layers:
            yield from layer.experts

    @property
    def quantized_numel(self) -> int:
        """Number of weights that are stored in 4 bits."""
        experts = sum(experts.count * experts.matrix_numel for experts in self.experts())
        return sum(linear.numel for linear in self.linears()) + experts

    @property
    def unquantized_numel(self) -> int:
        """Number of weights that stay in 16 bits."""
        routers = sum(linear.numel for layer in self.layers for linear in layer.linears if not linear.is_quantized)
        layers = sum(layer.other_numel for layer in self.layers)
        return self.embedding_numel + self.head_numel + self.other_numel + layers + routers

    @property
    def numel(self) -> int:
        """Number of weights."""
        return self.quantized_numel + self.unquantized_numel

    @property
    def active_numel(self) -> int:
        """Number of linear weights that a token passes, without the head."""
        linears = sum(linear.numel for layer in self.layers for linear in layer.linears)
        per_token = sum(
            layer.num_experts_per_token * each.matrix_numel for layer in self.layers for each in layer.experts
        )
        return linears + per_token + sum(linear.numel for linear in self.outer_linears)

    def active_adapter_numel(self, r: int) -> int:
        """Return the number of LoRA weights that a token passes."""
        experts = sum(
            layer.num_experts_per_token * each.width
            for layer in self.layers
            for each in layer.experts
            if each.is_adapted
        )
        return r * (sum(linear.width for linear in self.linears() if linear.is_adapted) + experts)

    def adapter_shapes(self, r: int) -> Iterator[tuple[int, int]]:
        """Yield the shapes of the LoRA factors; PEFT stores those of all experts as one tensor."""
        for linear in self.linears():
            if linear.is_adapted:
                yield r, linear.in_features
                yield linear.out_features, r
        for experts in self.experts():
            if experts.is_adapted:
                yield experts.count * r, experts.in_features
                yield experts.out_features, experts.count * r


def packed_bytes(model: ModelShape) -> int:
    """Return the bytes of all 4-bit codes, two per byte."""
    linears = sum(math.ceil(linear.numel / 2) for linear in model.linears())
    return linears + sum(each.count * math.ceil(each.matrix_numel / 2) for each in model.experts())


def quantization_constants_bytes(model: ModelShape, double_quant: bool) -> int:
    """Return the bytes of absmax, its scales and the code tables of all 4-bit weights."""
    linears = sum(quantization_state_bytes(linear.numel, double_quant) for linear in model.linears())
    return linears + sum(_stack_state_bytes(experts, double_quant) for experts in model.experts())


def quantization_state_bytes(numel: int, double_quant: bool) -> int:
    """Return the bytes of bitsandbytes' quantization state of one tensor."""
    blocks = math.ceil(numel / BLOCK_SIZE)
    if not double_quant:
        return blocks * 4 + CODE_TABLE_BYTES
    return blocks + math.ceil(blocks / ABSMAX_BLOCK_SIZE) * 4 + CODE_TABLE_BYTES + ABSMAX_TABLE_BYTES


def _stack_state_bytes(experts: ExpertsShape, double_quant: bool) -> int:
    # the experts of a stack share their code tables
    tables = CODE_TABLE_BYTES + (ABSMAX_TABLE_BYTES if double_quant else 0)
    shared = (experts.count - 1) * (tables - (OFFSET_BYTES if double_quant else 0))
    return experts.count * quantization_state_bytes(experts.matrix_numel, double_quant) - shared
