"""What each layer of a model computes again in the backward pass instead of keeping it.

Levels, from most memory to least: a layer keeps everything (`none`); everything but the inside of its MLP, which is
computed again (`mlp`); its input alone (`layer`). What is computed again has the same bits, so that levels change memory
and time alone. A layer's last product, which the backward pass does not need, is not computed again.

On a GPU `auto` gives the memory that the largest batch leaves free to the layers that then have least to compute again.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from qlora_train.config.schema import TrainSection
from qlora_train.kernels.fused_mlp import GatedMlp, Level
from qlora_train.training.memory.activation_offloading import but_for_weights
from qlora_train.utils.errors import ConfigError

logger = logging.getLogger(__name__)

LEVELS: tuple[Level, ...] = ("none", "mlp", "layer")

OUTSIDE = -1
"""The place that is no layer's."""


class Recomputation:
    """The layers of a model whose level can be set one by one.

    Attributes:
        layers: of the decoder, in order; none where Transformers recomputes all layers of an architecture or none.
        levels: of each.
    """

    def __init__(self, model: nn.Module, mlps: Sequence[GatedMlp]) -> None:
        self.layers = _outermost(model)
        self._every_mlp = mlps
        self._mlps = [[mlp for mlp in mlps if mlp.module in set(layer.modules())] for layer in self.layers]
        self.levels: list[Level] = ["none"] * len(self.layers)

    @property
    def keeps_inputs_alone(self) -> bool:
        """Whether every layer is computed again from its input."""
        return set(self.levels) == {"layer"}

    def can(self, level: Level) -> bool:
        """Say whether any layer has a level of its own."""
        return {"none": True, "mlp": any(self._mlps), "layer": bool(self.layers)}[level]

    def set(self, levels: Level | Sequence[Level]) -> None:
        """Set the level of every layer."""
        self.levels = [levels] * len(self.layers) if isinstance(levels, str) else list(levels)
        for layer, mlps, level in zip(self.layers, self._mlps, self.levels, strict=True):
            layer.gradient_checkpointing = level == "layer"
            layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
            for mlp in mlps:
                mlp.level = level

    def leave_to_transformers(self) -> None:
        """Let Transformers compute every layer again."""
        self.set("none")
        for mlp in self._every_mlp:
            mlp.level = "layer"

    def work(self, place: int, level: Level) -> float:
        """Return how much of a layer's linear work a level computes again, as a share of what `layer` does."""
        makers = sum(weight for mlp in self._mlps[place] for weight in mlp.maker_sizes())
        every = sum(module.in_features * module.out_features for module in _linears(self.layers[place]))
        last = sum(mlp.down_size() for mlp in self._mlps[place])
        return {"none": 0.0, "mlp": makers / max(1, every - last), "layer": 1.0}[level]

    def described(self) -> str:
        """Say how many layers are at which level."""
        counts = {level: self.levels.count(level) for level in LEVELS}
        said = {"none": "keep everything", "mlp": "compute their MLP again", "layer": "keep their input alone"}
        return ", ".join(f"{count} layers {said[level]}" for level, count in counts.items() if count)


def _outermost(model: nn.Module) -> list[Any]:
    found: list[Any] = []
    inside: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer) and module not in inside:
            found.append(module)
            inside.update(module.modules())
    return found


def _linears(layer: nn.Module) -> Iterator[Any]:
    return (module for module in layer.modules() if isinstance(module, nn.Linear) and not module.weight.requires_grad)


def choose_recomputation(
    train: TrainSection, recomputation: Recomputation, *, on_gpu: bool, supported: bool
) -> tuple[Level, bool]:
    """Return the level of all layers to begin with, and whether Transformers is to recompute all of them instead.

    Args:
        train: the settings.
        recomputation: the layers whose level can be set.
        on_gpu: where they are.
        supported: Transformers can recompute this architecture's layers.

    Raises:
        ConfigError: what is asked for cannot be done for this model.
    """
    if train.gradient_checkpointing != "auto":
        if train.gradient_checkpointing and not supported:
            raise ConfigError(_cannot("gradient_checkpointing: true", "set it to false or auto"))
        return "none", train.gradient_checkpointing
    level = train.recompute
    if level == "auto":
        level = "layer" if on_gpu and supported else "none"
        logger.info("recompute: %s (%s)", level, _reason(on_gpu, supported))
    if level == "layer" and not supported:
        raise ConfigError(_cannot("recompute: layer", "set it to none or auto"))
    if level == "layer" and not recomputation.can("layer"):
        return "none", True
    if not recomputation.can(level):
        raise ConfigError(
            f"train.recompute: {level}, but no MLP of this model computes on the fast path; allowed for it: auto, none or "
            "layer"
        )
    return level, False


def _reason(on_gpu: bool, supported: bool) -> str:
    if not supported:
        return "this architecture does not support it"
    return "on a GPU, to begin with" if on_gpu else "memory is no limit on a CPU"


def _cannot(setting: str, way_out: str) -> str:
    return f"train.{setting}, but Transformers cannot recompute the activations of this architecture; {way_out}"


# --- a plan -----------------------------------------------------------------------------------------------------------


def kept_bytes(model: nn.Module, recomputation: Recomputation, run: Callable[[], Any]) -> dict[Level, list[int]]:
    """Return what each layer keeps for the backward pass, by level.

    No more than one layer's is there at a time. The levels are as they were afterwards.

    Args:
        model: the whole model.
        recomputation: its layers.
        run: computes a batch with it, with gradients, and makes none.
    """
    before, found = list(recomputation.levels), {}
    try:
        for level in LEVELS:
            if recomputation.can(level):
                recomputation.set(level)
                with _counting(model, recomputation.layers) as sizes:
                    run()
                found[level] = [sizes[place] for place in range(len(recomputation.layers))]
    finally:
        recomputation.set(before)
    return found


@contextmanager
def _counting(model: nn.Module, layers: Sequence[nn.Module]) -> Iterator[Mapping[int, int]]:
    """Count the bytes of the tensors that autograd saves while each layer computes; layers keep nothing."""
    sizes = dict.fromkeys((OUTSIDE, *range(len(layers))), 0)
    now, seen = OUTSIDE, dict[int, torch.UntypedStorage]()

    def begin(place: int) -> Callable[..., None]:
        def note(*_: Any) -> None:
            nonlocal now
            now = place
            seen.clear()

        return note

    def pack(tensor: torch.Tensor) -> torch.Tensor | None:
        if now == OUTSIDE:
            return tensor  # a chunked loss reads it in the forward pass
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen[storage.data_ptr()] = storage  # held, so that no other tensor of the layer takes its place
            sizes[now] += storage.nbytes()
        return None

    handles = [layer.register_forward_pre_hook(begin(place)) for place, layer in enumerate(layers)]
    handles += [layer.register_forward_hook(begin(OUTSIDE)) for layer in layers]
    try:
        with but_for_weights(model, saved_tensors_hooks(pack, lambda _: torch.empty(0))):
            yield sizes
    finally:
        for handle in handles:
            handle.remove()


def plan_levels(
    kept: Mapping[Level, Sequence[int]], work: Callable[[int, Level], float], budget_bytes: float
) -> list[Level]:
    """Return the level of each layer that leaves least to compute again and keeps no more than the budget.

    Two orders are tried: first as many layers as fit that keep everything, then of the others as many as fit that compute
    their MLP again; or the other way round. The last layers come first: what they keep is free soonest.

    Args:
        kept: bytes of each layer, by level.
        work: (layer, level) -> what is computed again.
        budget_bytes: what all layers may keep beyond what they keep at `layer`.
    """
    plans = [_filled(kept, order, budget_bytes) for order in (("none", "mlp"), ("mlp", "none"))]
    return min(plans, key=lambda levels: sum(work(place, level) for place, level in enumerate(levels)))


def _filled(kept: Mapping[Level, Sequence[int]], order: Sequence[Level], budget_bytes: float) -> list[Level]:
    levels: list[Level] = ["layer"] * len(kept["layer"])
    for wanted in order:
        for place in reversed(range(len(levels) if wanted in kept else 0)):
            more = kept[wanted][place] - kept[levels[place]][place]
            if LEVELS.index(wanted) < LEVELS.index(levels[place]) and more <= budget_bytes:
                levels[place] = wanted
                budget_bytes -= more
    return levels
