"""Find the expert weights and routers of a mixture of experts by walking the model.

Transformers stores a layer's experts as 3-D parameters, (experts, a, b), in a module whose class name ends with
"Experts". Routers stay in 16 bits: they are small, and sensitive to rounding."""

import re
from collections.abc import Iterator

from torch import nn
from torch.nn.utils import parametrize

from qlora_train.kernels.expert_weights import quantized_experts

_ROUTER_NAME = re.compile(r"router|gate")


def expert_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield full name and module of every experts module."""
    for name, module in model.named_modules():
        class_name = type(module).__name__.removeprefix("Parametrized")
        if class_name.endswith("Experts") and stacks(module):
            yield name, module


def expert_parameters(model: nn.Module) -> dict[str, nn.Module]:
    """Return the module of every expert parameter, in 4 bits or not, by the parameter's full name."""
    return {f"{name}.{parameter}": module for name, module in expert_modules(model) for parameter in stacks(module)}


def stacks(module: nn.Module) -> list[str]:
    """Return the names of a module's expert parameters, in definition order."""
    plain = [name for name, parameter in module.named_parameters(recurse=False) if parameter.ndim == 3]
    quantized = [name for name in getattr(module, "parametrizations", ()) if quantized_experts(module, name)]
    return [*plain, *quantized]


def num_experts(module: nn.Module) -> int:
    name = stacks(module)[0]
    found = quantized_experts(module, name)
    return int(found[1].shape[0] if found else getattr(module, name).shape[0])


def routers(model: nn.Module) -> dict[str, nn.Linear]:
    """Return the linear layers that route tokens to experts, by full name.

    They are beside the experts, have "router" or "gate" in their name, and have one output per expert, or a single one
    (gate of a shared expert)."""
    found: dict[str, nn.Linear] = {}
    for name, module in expert_modules(model):
        parent = name.rpartition(".")[0]
        sizes = {num_experts(module), 1}
        for inner, linear in model.get_submodule(parent).named_modules():
            routes = isinstance(linear, nn.Linear) and linear.out_features in sizes and _ROUTER_NAME.search(inner)
            if routes and not parametrize.is_parametrized(linear):
                found[f"{parent}.{inner}".lstrip(".")] = linear
    return found
