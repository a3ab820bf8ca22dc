"""Which of PEFT's wrappers around a module changes which of its parameters (`target_parameters`).

A module of experts holds its matrices as parameters of its own, and PEFT wraps the whole module once for each of them,
one wrapper around the other. The file numbers the wrappers by their depth and does not name the parameters. PEFT goes
through a module's parameters in the order of their registration, and through the sorted targets where a parameter is
computed (parametrised, as a quantised one is); the shapes say which of the two it was.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qlora_train.utils.errors import MergeError


@dataclass(frozen=True)
class WrappedParameter:
    """A parameter that PEFT wraps: its full name, its shape, the rank asked for, and whether experts are (in, out)."""

    name: str
    shape: tuple[int, ...]
    rank: int
    is_transposed: bool

    @property
    def num_experts(self) -> int:
        """The matrices that it stacks; 1 for a matrix."""
        return self.shape[0] if len(self.shape) == 3 else 1

    def factors(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of A, (rank * experts, in), and B, (out, rank * experts)."""
        first, second = self.shape[-2:]
        num_out, num_in = (second, first) if len(self.shape) == 3 and self.is_transposed else (first, second)
        return (self.rank * self.num_experts, num_in), (num_out, self.rank * self.num_experts)


def targeted_parameters(model: Any, targets: Sequence[str]) -> dict[str, list[str]]:
    """Return the parameters that PEFT finds for `target_parameters`, by module, in the order of their registration."""
    found: dict[str, list[str]] = {}
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            full = f"{module_name}.{name}"
            if parameter.ndim in (2, 3) and any(full == target or full.endswith(f".{target}") for target in targets):
                found.setdefault(module_name, []).append(full)
    return found


def in_wrapping_order(
    where: str, parameters: Sequence[WrappedParameter], factors: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]
) -> list[WrappedParameter]:
    """Return a module's parameters in the order of its wrappers.

    Args:
        where: the adapter's file and the module, for messages.
        parameters: in the order of their registration.
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
            f"{where} has factors of one shape for {', '.join(p.name for p in parameters)}, and nothing says which is "
            "whose; use the adapter unmerged"
        )
    return fitting[0]
