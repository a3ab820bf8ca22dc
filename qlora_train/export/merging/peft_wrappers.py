"""Find which of PEFT's wrappers around a module changes which of its parameters (`target_parameters`).

PEFT wraps a module of experts once per targeted parameter, one wrapper around the other. The file numbers the wrappers by
depth and does not name the parameters. PEFT wraps plain parameters in the order of registration and parametrized
(quantized) ones in the order of their sorted names; the shapes tell the two orders apart.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qlora_train.utils.errors import MergeError

Shape = tuple[int, ...]


@dataclass(frozen=True)
class WrappedParameter:
    """A parameter that PEFT wraps; `is_transposed`: its experts are stored as (in, out)."""

    name: str
    shape: Shape
    rank: int
    is_transposed: bool

    @property
    def num_experts(self) -> int:
        """Number of stacked matrices."""
        return self.shape[0] if len(self.shape) == 3 else 1

    def factors(self) -> tuple[Shape, Shape]:
        """Return the shapes of A, (rank * experts, in), and B, (out, rank * experts)."""
        first, second = self.shape[-2:]
        num_out, num_in = (second, first) if len(self.shape) == 3 and self.is_transposed else (first, second)
        return (self.rank * self.num_experts, num_in), (num_out, self.rank * self.num_experts)


def targeted_parameters(model: Any, targets: Sequence[str]) -> dict[str, list[str]]:
    """Return the parameters that PEFT finds for `target_parameters`, by module, in the order of registration."""
    found: dict[str, list[str]] = {}
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            full = f"{module_name}.{name}"
            if parameter.ndim in (2, 3) and any(full == target or full.endswith(f".{target}") for target in targets):
                found.setdefault(module_name, []).append(full)
    return found


def in_wrapping_order(
    where: str, parameters: Sequence[WrappedParameter], factors: Sequence[tuple[Shape, Shape]]
) -> list[WrappedParameter]:
    """Return a module's parameters in the order of its wrappers.

    Args:
        where: prefix of error messages.
        parameters: in the order of registration.
        factors: shapes of A and B of each wrapper, the innermost first.

    Raises:
        MergeError: the shapes fit no order, or both.
    """
    orders = (list(parameters), sorted(parameters, key=lambda parameter: parameter.name))
    fitting = [order for order in orders if [parameter.factors() for parameter in order] == list(factors)]
    if not fitting:
        expected = ", ".join(f"{p.name} {p.factors()}" for p in parameters)
        raise MergeError(
            f"{where} has factors A and B of {', '.join(map(str, factors))}, but its base and settings ask for {expected}; "
            "merge onto the base that the adapter was trained on"
        )
    if len(fitting) == 2 and fitting[0] != fitting[1]:
        raise MergeError(
            f"{where} has factors of the same shape for {', '.join(p.name for p in parameters)}, so that their order is "
            "unknown; use the adapter unmerged"
        )
    return fitting[0]
