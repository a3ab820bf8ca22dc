"""The frozen base in the units that FSDP gathers. No torch."""

from dataclasses import dataclass

from qlora_train.kernels.block_sizes import BLOCK_SIZE
from qlora_train.planning.model_shape import LayerShape, ModelShape, quantization_constants_bytes

COMPUTE_BYTES = 2


@dataclass(frozen=True, slots=True)
class FrozenBytes:
    """Bytes of a 4-bit base by unit.

    Attributes:
        layer: the largest decoder layer: packed weights and their 8-bit absmax.
        root: embedding and head, in 16 bits.
        replicated: norms, the absmax of the absmax, and code tables, which every rank holds.
    """

    layer: int
    root: int
    replicated: int
    num_layers: int

    @property
    def sharded(self) -> int:
        """All shards together, of a model whose layers are equal."""
        return self.num_layers * self.layer + self.root


def frozen_bytes(model: ModelShape, *, compute_bytes: int = COMPUTE_BYTES) -> FrozenBytes:
    """Divide a double-quantized base into the units of FSDP."""
    root = compute_bytes * (model.embedding_numel + model.head_numel)
    constants = quantization_constants_bytes(model, double_quant=True) - model.quantized_numel // BLOCK_SIZE
    others = compute_bytes * model.unquantized_numel - root
    layer = max(map(layer_bytes, model.layers))
    return FrozenBytes(layer, root, constants + others, len(model.layers))


def layer_bytes(layer: LayerShape) -> int:
    """Return the bytes of a layer's packed weights and their 8-bit absmax."""
    numel = sum(linear.numel for linear in layer.quantized_linears)
    numel += sum(experts.count * experts.matrix_numel for experts in layer.experts)
    return numel // 2 + numel // BLOCK_SIZE
