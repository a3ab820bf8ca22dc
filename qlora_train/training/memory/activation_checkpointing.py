"""Activation checkpointing per decoder layer: `none`, `mlp` (recompute the MLP's inside) or `full` (save the input only).

Recomputed activations are bitwise equal, so levels change memory and time only. The last matrix product of a checkpointed
layer is not recomputed: the backward pass does not need it.

With `train.gradient_checkpointing: auto` on a GPU, `plan_levels` gives the memory that the worst-case batch leaves free to
the layers, so that as little as possible is recomputed.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from qlora_train.config.schema import TrainSection
from qlora_train.kernels.checkpointing_levels import LEVELS, CheckpointingLevel
from qlora_train.kernels.fsdp_units import local_tensor
from qlora_train.kernels.fused_mlp import GatedMlp
from qlora_train.utils.errors import ConfigError

logger = logging.getLogger(__name__)


class LayerCheckpointing:
    """The checkpointing level of every decoder layer.

    Attributes:
        layers: in order; empty for architectures without `GradientCheckpointingLayer`.
        levels: one per layer.
    """

    def __init__(self, model: nn.Module, mlps: Sequence[GatedMlp]) -> None:
        self.layers = _outermost_layers(model)
        self._all_mlps = mlps
        self._mlps = [[mlp for mlp in mlps if mlp.module in set(layer.modules())] for layer in self.layers]
        self.levels: list[CheckpointingLevel] = ["none"] * len(self.layers)

    @property
    def is_full(self) -> bool:
        """Whether every layer saves its input only."""
        return set(self.levels) == {"full"}

    def supports(self, level: CheckpointingLevel) -> bool:
        """Return whether any layer can be set to the level."""
        return {"none": True, "mlp": any(self._mlps), "full": bool(self.layers)}[level]

    def set(self, levels: CheckpointingLevel | Sequence[CheckpointingLevel]) -> None:
        """Set one level for all layers, or one per layer."""
        self.levels = [levels] * len(self.layers) if isinstance(levels, str) else list(levels)
        for layer, mlps, level in zip(self.layers, self._mlps, self.levels, strict=True):
            layer.gradient_checkpointing = level == "full"
            layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
            for mlp in mlps:
                mlp.level = level

    def leave_to_transformers(self) -> None:
        """Prepare for Transformers' own checkpointing of all layers."""
        self.set("none")
        for mlp in self._all_mlps:
            mlp.level = "full"

    def recompute_cost(self, index: int, level: CheckpointingLevel) -> float:
        """Return the linear work that a layer recomputes at a level, relative to `full`."""
        gate_and_up = sum(mlp.gate_up_size for mlp in self._mlps[index])
        total = sum(module.in_features * module.out_features for module in _frozen_linears(self.layers[index]))
        last = sum(mlp.down_size for mlp in self._mlps[index])
        return {"none": 0.0, "mlp": gate_and_up / max(1, total - last), "full": 1.0}[level]

    def summary(self) -> str:
        """Return the number of layers at each level."""
        return ", ".join(f"{level} x {self.levels.count(level)}" for level in LEVELS if level in self.levels)


def _outermost_layers(model: nn.Module) -> list[Any]:
    layers: list[Any] = []
    inside: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer) and module not in inside:
            layers.append(module)
            inside.update(module.modules())
    return layers


def _frozen_linears(layer: nn.Module) -> Iterator[Any]:
    return (module for module in layer.modules() if isinstance(module, nn.Linear) and not module.weight.requires_grad)


def choose_checkpointing(train: TrainSection, layers: LayerCheckpointing, *, on_gpu: bool, supported: bool) -> bool:
    """Set the first level of all layers, and return whether Transformers has to checkpoint all layers instead.

    Args:
        layers: the layers; their level is set.
        on_gpu: the model is on a GPU.
        supported: Transformers supports checkpointing for this architecture.

    Raises:
        ConfigError: the model does not support the level.
    """
    level: CheckpointingLevel
    if train.gradient_checkpointing == "auto":
        level = "full" if on_gpu and supported else "none"
        reason = "first try on a GPU" if on_gpu else "on a CPU"
        reason = reason if supported else "this architecture does not support it"
        logger.info("gradient_checkpointing: %s (%s)", level, reason)
    else:
        level = train.gradient_checkpointing
    if level == "full" and not supported:
        raise ConfigError(
            "train.gradient_checkpointing: full, but Transformers does not support it for this architecture; allowed for "
            "it: auto or none"
        )
    if level == "full" and not layers.supports("full"):
        layers.leave_to_transformers()
        return True
    if not layers.supports(level):
        raise ConfigError(
            f"train.gradient_checkpointing: {level}, but no MLP of this model has fused kernels; allowed for it: auto, "
            "none or full"
        )
    layers.set(level)
    return False


# --- measurement ------------------------------------------------------------------------------------------------------


def saved_bytes(
    model: nn.Module, layers: LayerCheckpointing, forward: Callable[[], Any]
) -> dict[CheckpointingLevel, list[int]]:
    """Return the bytes that each layer saves for backward, by level, and restore the levels.

    Args:
        forward: computes a batch with gradients enabled, without a backward pass.
    """
    before, found = list(layers.levels), {}
    try:
        for level in filter(layers.supports, LEVELS):
            layers.set(level)
            with _counting(model, layers.layers) as sizes:
                forward()
            found[level] = list(sizes)
    finally:
        layers.set(before)
    return found


@contextmanager
def _counting(model: nn.Module, layers: Sequence[nn.Module]) -> Iterator[Sequence[int]]:
    """Count the bytes that autograd saves in each layer; nothing is saved, so at most one layer's exist at a time."""
    sizes = [0] * len(layers)
    current: int | None = None
    seen: dict[int, torch.UntypedStorage] = {}

    def enter(index: int | None) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            nonlocal current
            current = index
            seen.clear()

        return hook

    def pack(tensor: torch.Tensor) -> torch.Tensor | None:
        if current is None:
            return tensor  # a chunked loss unpacks it in the forward pass
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen[storage.data_ptr()] = storage  # kept alive, so that no later tensor of the layer reuses its address
            sizes[current] += storage.nbytes()
        return None

    handles = [layer.register_forward_pre_hook(enter(index)) for index, layer in enumerate(layers)]
    handles += [layer.register_forward_hook(enter(None)) for layer in layers]
    try:
        with ignoring_weights(model, saved_tensors_hooks(pack, lambda _: torch.empty(0))):
            yield sizes
    finally:
        for handle in handles:
            handle.remove()


def ignoring_weights(model: nn.Module, hooks: saved_tensors_hooks) -> saved_tensors_hooks:
    """Return hooks that skip a model's weights and views of them."""
    weights = {local_tensor(parameter).untyped_storage().data_ptr() for parameter in model.parameters()}

    def pack(tensor: torch.Tensor) -> Any:
        return tensor if tensor.untyped_storage().data_ptr() in weights else hooks.pack_hook(tensor)

    def unpack(packed: Any) -> torch.Tensor:
        tensor: torch.Tensor = packed if isinstance(packed, torch.Tensor) else hooks.unpack_hook(packed)
        return tensor

    return saved_tensors_hooks(pack, unpack)
