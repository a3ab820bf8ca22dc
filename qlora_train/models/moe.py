"""Where a mixture of experts keeps its weights and its routers, found by walking the model.

Transformers stores the experts of a layer as parameters of three dimensions, (experts, a, b), in a module whose class name
ends with "Experts". Linear layers that choose among them are routers: small, sensitive to rounding, and left in 16 bits.
"""

import re
from collections.abc import Iterator

from torch import nn
from torch.nn.utils import parametrize

from qlora_train.kernels.expert_weights import quantized_experts

_ROUTER_NAME = re.compile(r"router|gate")


def expert_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules that hold a stack of experts, with their full names."""
    for name, module in model.named_modules():
        class_name = type(module).__name__.removeprefix("Parametrized")  # torch's name for a parametrised class
        if class_name.endswith("Experts") and stacks(module):
            yield name, module


def expert_parameters(model: nn.Module) -> dict[str, nn.Module]:
    """Return the module of every stack of expert matrices by the parameter's full name, in 4 bits or not."""
    return {f"{name}.{parameter}": module for name, module in expert_modules(model) for parameter in stacks(module)}


def stacks(module: nn.Module) -> list[str]:
    """Return the names of a module's own stacks of experts, in the order that its class defines them."""
    plain = [name for name, parameter in module.named_parameters(recurse=False) if parameter.ndim == 3]
    quantized = [name for name in getattr(module, "parametrizations", ()) if quantized_experts(module, name)]
    return [*plain, *quantized]


def num_experts(module: nn.Module) -> int:
    """Return how many experts a module of `expert_modules` holds."""
    name = stacks(module)[0]
    found = quantized_experts(module, name)
    return int(found[1].shape[0] if found else getattr(module, name).shape[0])


def routers(model: nn.Module) -> dict[str, nn.Linear]:
    """Return the linear layers beside experts that choose among them, by full name.

    Such a layer is called router or gate, or lies in a module called so, and has an output for each expert, or a single
    one (the gate of a shared expert).
    """
    found: dict[str, nn.Linear] = {}
    for name, module in expert_modules(model):
        parent = name.rpartition(".")[0]
        sizes = {num_experts(module), 1}
        for inner, linear in model.get_submodule(parent).named_modules():
            chooses = isinstance(linear, nn.Linear) and linear.out_features in sizes and _ROUTER_NAME.search(inner)
            if chooses and not parametrize.is_parametrized(linear):
                found[f"{parent}.{inner}".lstrip(".")] = linear
    return found
