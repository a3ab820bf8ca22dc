"""Shard a frozen base over the ranks of a mesh with FSDP2: a unit per decoder layer, and one for everything else.

Codes, absmax and 16-bit matrices are sharded. Norms and biases are replicated (0.01 % of the bytes), and so is an adapter,
which is attached later and which FSDP does not know. Frozen weights have no gradients to reduce.
"""

import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from transformers.modeling_layers import GradientCheckpointingLayer

from qlora_train.kernels.expert_weights import quantized_experts
from qlora_train.kernels.sharded_weights import describe_weight, num_blocks, prepare_experts, prepare_linear
from qlora_train.models.byte_check import check_gathered_bytes, hash_own_rows
from qlora_train.models.malloc_trim import MemoryTrimmer
from qlora_train.models.moe import expert_parameters
from qlora_train.models.shard_rows import place_rows
from qlora_train.models.strategy import shards_bytes
from qlora_train.parallel import context
from qlora_train.utils.errors import ConfigError

logger = logging.getLogger(__name__)


def check_torch(version: str = torch.__version__) -> None:
    """Refuse a torch that cannot shard 4-bit weights.

    Raises:
        ConfigError: torch is older than 2.12.
    """
    if not shards_bytes(version):
        raise ConfigError(
            f"parallel.strategy: fsdp shards uint8 weights, which torch {version} cannot; upgrade torch to 2.12 or newer, "
            "or set parallel.strategy: ddp"
        )


def shard_base(
    model: nn.Module, device: torch.device, sliced: Mapping[str, torch.Size], *, check_bytes: bool = True
) -> None:
    """Shard a frozen model in place.

    Args:
        model: 4-bit weights and the tensors of `sliced` may be this rank's part alone.
        device: of the model.
        sliced: shapes of the 16-bit parameters that are loaded in part, by name.
        check_bytes: gather the first layer and compare its bytes (`byte_check`); fake tensors have none.

    Raises:
        ModelError: ranks gather other bytes than they loaded.
    """
    for module in model.modules():
        if isinstance(module, Linear4bit):
            prepare_linear(module)
    for name, module in expert_parameters(model).items():
        if quantized_experts(module, name.rpartition(".")[2]):
            prepare_experts(module, name.rpartition(".")[2])
    counts = _row_counts(model, sliced)
    ignored = {parameter for parameter in model.parameters() if parameter.ndim < 2}
    mesh = init_device_mesh(device.type, (context().world_size,))
    units, memory = [*decoder_layers(model), model], MemoryTrimmer()
    for unit in units:
        memory.trim()  # before FSDP copies this rank's rows
        _expand(unit, counts)
        if unit is units[0] and check_bytes:
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
    if check_bytes:
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


RowCounts = dict[tuple[nn.Module, str], int]
"""Rows over all ranks, by module and parameter name: the parameters themselves would stay alive beside FSDP's copies."""


def _row_counts(model: nn.Module, sliced: Mapping[str, torch.Size]) -> RowCounts:
    """Return the rows of each parameter that loading may have cut."""
    counts: RowCounts = {}
    for full_name, shape in sliced.items():
        module_name, _, name = full_name.rpartition(".")
        counts[model.get_submodule(module_name), name] = shape[0]
    for module in model.modules():
        if isinstance(module, Linear4bit) and "absmax" in module._parameters:
            counts |= dict.fromkeys(((module, "weight"), (module, "absmax")), num_blocks(module.quant_state.shape))
    for full_name, experts in expert_parameters(model).items():
        name = full_name.rpartition(".")[2]
        found = quantized_experts(experts, name)
        if found is not None and found[1].has_block_rows:
            codes_owner: Any = experts.parametrizations[name]  # type: ignore[index]
            counts |= dict.fromkeys(((codes_owner, "original"), (found[1], "absmax")), num_blocks(found[1].shape))
    return counts


def _expand(unit: nn.Module, counts: RowCounts) -> None:
    """Give each partly loaded parameter of a unit its full shape: `fully_shard` keeps this rank's rows, and no others.

    The full tensors of one unit exist at a time, as in a forward pass.
    """
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for module, name, parameter in _parameters(unit):
        places.setdefault(id(parameter), []).append((module, name))  # several if it is tied
    for tied in places.values():
        module, name = tied[0]
        num_rows = max(counts.get(place, 0) for place in tied)
        if len(module.get_parameter(name)) < num_rows:
            whole = nn.Parameter(place_rows(module.get_parameter(name), num_rows), requires_grad=False)
            for module, name in tied:
                module._parameters[name] = whole  # frees the part


def _parameters(unit: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """Yield the matrices of a unit, tied ones repeatedly, without those of units inside."""
    for name, parameter in unit._parameters.items():
        if parameter is not None and parameter.ndim >= 2:
            yield unit, name, parameter
    for child in unit.children():
        if not isinstance(child, FSDPModule):
            yield from _parameters(child)
