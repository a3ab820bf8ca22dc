"""Shard a frozen base over the ranks of a mesh with FSDP2: a unit per decoder layer, and one for everything else.

Codes, absmax and 16-bit matrices are sharded. Norms and biases are replicated (0.01 % of the bytes), and so is an adapter,
which is attached later and which FSDP does not know. Frozen weights have no gradients to reduce.
"""

import logging
from collections.abc import Iterator, Mapping

import torch
from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from transformers.modeling_layers import GradientCheckpointingLayer

from qlora_train.kernels.expert_weights import BLOCK_SIZE, quantized_experts
from qlora_train.kernels.sharded_weights import describe_weight, prepare_experts, prepare_linear
from qlora_train.models.byte_check import check_gathered_bytes, hash_own_rows
from qlora_train.models.moe import expert_parameters
from qlora_train.models.shard_rows import place_rows
from qlora_train.parallel import context
from qlora_train.utils.errors import ConfigError

logger = logging.getLogger(__name__)

MIN_TORCH = (2, 12)
"""Older releases cannot shard a uint8 parameter."""


def check_torch(version: str = torch.__version__) -> None:
    """Refuse a torch that cannot shard 4-bit weights.

    Raises:
        ConfigError: torch is older than 2.12.
    """
    if tuple(int(part) for part in version.split(".")[:2]) < MIN_TORCH:
        raise ConfigError(
            f"parallel.strategy: fsdp shards uint8 weights, which torch {version} cannot; upgrade torch to 2.12 or newer, "
            "or set parallel.strategy: ddp"
        )


def shard_base(model: nn.Module, device: torch.device, sliced: Mapping[str, torch.Size]) -> None:
    """Shard a frozen model in place.

    Args:
        model: 4-bit weights and the tensors of `sliced` may be this rank's part alone.
        device: of the model.
        sliced: shapes of the 16-bit parameters that are loaded in part, by name.

    Raises:
        ModelError: ranks gather other bytes than they loaded.
    """
    for module in model.modules():
        if isinstance(module, Linear4bit):
            prepare_linear(module)
    for name, module in expert_parameters(model).items():
        if quantized_experts(module, name.rpartition(".")[2]):
            prepare_experts(module, name.rpartition(".")[2])
    rows = _full_rows(model, sliced)
    ignored = {parameter for parameter in model.parameters() if parameter.ndim < 2}
    mesh = init_device_mesh(device.type, (context().world_size,))
    units = [*decoder_layers(model), model]
    for unit in units:
        _expand(unit, rows)
        if unit is units[0]:
            hashes = hash_own_rows(unit)
        fully_shard(
            unit,
            mesh=mesh,
            reshard_after_forward=unit is not model,
            mp_policy=MixedPrecisionPolicy(),  # a param_dtype would cast
            ignored_params=ignored,
        )
    for module in model.modules():
        if isinstance(module, Linear4bit):
            describe_weight(module)
    name = next(name for name, module in model.named_modules() if module is units[0])
    check_gathered_bytes(units[0], name, hashes)


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """Return the outermost layers, in order: those that Transformers can checkpoint, else the longest list of modules."""
    found: list[nn.Module] = []
    inside: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer) and module not in inside:
            found.append(module)
            inside.update(module.modules())
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return found or list(max(lists, key=len, default=()))


def _full_rows(model: nn.Module, sliced: Mapping[str, torch.Size]) -> dict[Tensor, int]:
    """Return the number of rows, over all ranks, of each parameter of which this rank has a part."""
    rows: dict[Tensor, int] = {model.get_parameter(name): shape[0] for name, shape in sliced.items()}
    for module in model.modules():
        if isinstance(module, Linear4bit) and hasattr(module, "absmax"):
            rows |= dict.fromkeys((module.weight, module.absmax), module.quant_state.shape.numel() // BLOCK_SIZE)
    for name, module in expert_parameters(model).items():
        found = quantized_experts(module, name.rpartition(".")[2])
        if found is not None and found[1].has_block_rows:
            codes, weights = found
            rows |= dict.fromkeys((codes, weights.absmax), weights.shape.numel() // BLOCK_SIZE)
    return {parameter: count for parameter, count in rows.items() if len(parameter) < count}


def _expand(unit: nn.Module, rows: Mapping[Tensor, int]) -> None:
    """Give each partly loaded parameter of a unit its full shape: `fully_shard` keeps this rank's rows, and no others.

    The full tensors of one unit exist at a time, as in a forward pass.
    """
    expanded: dict[nn.Parameter, nn.Parameter] = {}
    for module, name, parameter in _parameters(unit):
        if parameter in rows:
            if parameter not in expanded:
                expanded[parameter] = nn.Parameter(place_rows(parameter.data, rows[parameter]), requires_grad=False)
            module._parameters[name] = expanded[parameter]


def _parameters(unit: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """Yield the parameters of a unit, tied ones repeatedly, without those of units inside."""
    for name, parameter in list(unit._parameters.items()):
        if parameter is not None:
            yield unit, name, parameter
    for child in unit.children():
        if not isinstance(child, FSDPModule):
            yield from _parameters(child)
