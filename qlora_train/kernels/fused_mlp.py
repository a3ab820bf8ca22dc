"""Gated MLPs, found by their parts and by trying them: down(f(gate(x)) * up(x)), with gate and up apart or in one layer."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from qlora_train.kernels.ops.gated import ACTIVATIONS, Activation, gated_linear
from qlora_train.kernels.shared_input import Group
from qlora_train.kernels.tiled import fill_tiles, in_tiles, recomputed_in_tiles

CheckpointingLevel = Literal["none", "mlp", "full"]
"""What a decoder layer recomputes in the backward pass: nothing, its MLP, or everything."""

GATE_AND_UP = (("gate_proj", "up_proj"), ("gate_up_proj",))
"""Names of the layers that make gate and up, in Transformers' files."""
ACTIVATION_NAMES = ("act_fn", "activation_fn")


@dataclass(slots=True)
class GatedMlp:
    """An MLP that computes down(f(gate(x)) * up(x)).

    Attributes:
        module: it.
        makers: its layers that make gate and up, two or one.
        activation: f.
        level: of the layer it is in. At `mlp` it keeps its input alone, and computes gate and up again in the backward
            pass; at `full` it does so for inputs of more than a tile, whose inside then exists a tile at a time.
    """

    module: Any
    makers: tuple[Any, ...]
    activation: Activation
    level: CheckpointingLevel = "none"

    @classmethod
    def of(cls, module: nn.Module) -> "GatedMlp | None":
        """Return how a module computes; None where it computes something else."""
        parts = dict(module.named_children())
        names = next((names for names in GATE_AND_UP if parts.keys() >= {*names, "down_proj"}), None)
        function = next((parts[name] for name in ACTIVATION_NAMES if name in parts), None)
        activation = None if function is None else _activation(function)
        if names is None or activation is None or "forward" in vars(module):
            return None
        mlp = cls(module, tuple(parts[name] for name in names), activation)
        return mlp if mlp._is_what_it_computes() else None

    def forward_with(self, down: Group) -> Callable[..., Any]:
        """Return its forward, with the layer `down`, which is adapted, computed together with the product before it."""
        own, [layer] = self.module.forward, down.layers

        def compute(x: Tensor) -> Tensor:
            gate, up = self._gate_and_up(x)
            if not gate.dtype == up.dtype == down.weights[0].dtype:
                product: Tensor = layer(self.activation.forward(gate) * up)
                return product
            return gated_linear(gate, up, self.activation, down.now())

        def forward(x: Tensor, *arguments: Any, **keywords: Any) -> Any:
            if arguments or keywords or not down.applies(layer):
                return own(x, *arguments, **keywords)
            if self.level == "mlp" or (self.level == "full" and fill_tiles(x)):
                return recomputed_in_tiles(compute, x, self._trained())
            return in_tiles(compute, x)

        return forward

    def maker_sizes(self) -> list[int]:
        """Return the numbers of the weights that make gate and up."""
        return [maker.in_features * maker.out_features for maker in self.makers]

    def down_size(self) -> int:
        """Return the numbers of the weight after the product."""
        size: int = self.module.down_proj.in_features * self.module.down_proj.out_features
        return size

    def _trained(self) -> list[Tensor]:
        return [parameter for parameter in self.module.parameters() if parameter.requires_grad]

    def _gate_and_up(self, x: Tensor) -> tuple[Tensor, Tensor]:
        made = [maker(x) for maker in self.makers]
        gate, up = made if len(made) == 2 else made[0].chunk(2, dim=-1)
        return gate, up

    @torch.no_grad()
    def _is_what_it_computes(self) -> bool:
        """Say whether it is, in training: some have a dropout."""
        training = [part for part in self.module.modules() if part.training]
        self.module.train()
        try:
            with torch.random.fork_rng():
                return self._is_equal_on_numbers()
        finally:
            self.module.eval()
            for part in training:
                part.training = True

    def _is_equal_on_numbers(self) -> bool:
        weight = next(self.module.parameters())
        features = getattr(self.makers[0], "in_features", 0)
        x = torch.randn(1, 3, features, generator=torch.Generator().manual_seed(0)).to(weight.device)
        x = x.to(weight.dtype if weight.is_floating_point() else torch.bfloat16)
        try:
            wanted = self.module(x)
            gate, up = self._gate_and_up(x)
            found = self.module.down_proj(self.activation.forward(gate) * up)
        except torch.OutOfMemoryError:  # says nothing about the module
            raise
        except (TypeError, RuntimeError, ValueError, AttributeError):
            return False
        return isinstance(wanted, Tensor) and torch.equal(wanted, found)


def _activation(function: nn.Module) -> Activation | None:
    x = torch.randn(256, generator=torch.Generator().manual_seed(0)) * 3
    try:
        with torch.no_grad():
            wanted = function(x)
    except (TypeError, RuntimeError, ValueError, AttributeError):
        return None
    same = (each for each in ACTIVATIONS.values() if torch.allclose(each.forward(x), wanted, rtol=1e-6, atol=1e-7))
    return next(same, None)
