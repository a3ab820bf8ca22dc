"""Gated MLPs, found by their parts and a trial: down(f(gate(x)) * up(x)), gate and up as two layers or one."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qlora_train.kernels.checkpointing_levels import CheckpointingLevel
from qlora_train.kernels.ops.gated import ACTIVATIONS, Activation, gated_linear
from qlora_train.kernels.shared_input import InputGroup
from qlora_train.kernels.tiled import checkpoint_tiled, compute_tiled, exceeds_tile

GATE_AND_UP = (("gate_proj", "up_proj"), ("gate_up_proj",))
"""Names of the projections in Transformers."""
ACTIVATION_NAMES = ("act_fn", "activation_fn")
UNSUPPORTED = (TypeError, RuntimeError, ValueError, AttributeError)
"""Raised by a module that takes other arguments or makes other shapes."""


@dataclass(slots=True)
class GatedMlp:
    """An MLP that computes down(f(gate(x)) * up(x)).

    Attributes:
        projections: gate and up.
        activation: f.
        level: checkpointing of its layer. `mlp` saves the MLP's input and recomputes gate and up; `full` does so for
            inputs of more than a tile, whose activations then exist for one tile at a time.
    """

    module: Any
    projections: tuple[Any, ...]
    activation: Activation
    level: CheckpointingLevel = "none"

    @classmethod
    def find(cls, module: nn.Module) -> "GatedMlp | None":
        """Return the gated MLP that a module computes; None if it computes something else."""
        parts = dict(module.named_children())
        names = next((names for names in GATE_AND_UP if parts.keys() >= {*names, "down_proj"}), None)
        function = next((parts[name] for name in ACTIVATION_NAMES if name in parts), None)
        activation = None if function is None else _find_activation(function)
        if names is None or activation is None or "forward" in vars(module):
            return None
        mlp = cls(module, tuple(parts[name] for name in names), activation)
        return mlp if mlp._matches_module() else None

    def forward_with(self, down: InputGroup) -> Callable[..., Any]:
        """Return a forward that fuses the product with the adapted down projection."""
        own, [layer] = self.module.forward, down.layers

        def compute(x: Tensor) -> Tensor:
            gate, up = self._gate_and_up(x)
            if not gate.dtype == up.dtype == down.weights[0].dtype:
                output: Tensor = layer(self.activation.forward(gate) * up)
                return output
            return gated_linear(gate, up, self.activation, down.lora_layers())

        def forward(x: Tensor, *arguments: Any, **keywords: Any) -> Any:
            if arguments or keywords or not down.applies(layer):
                return own(x, *arguments, **keywords)
            recomputes = self.level == "mlp" or (self.level == "full" and exceeds_tile(x))
            if recomputes and torch.is_grad_enabled():
                trained = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
                return checkpoint_tiled(compute, x, trained)
            return compute_tiled(compute, x)

        return forward

    @property
    def gate_up_size(self) -> int:
        """Number of weights in gate and up."""
        return sum(projection.in_features * projection.out_features for projection in self.projections)

    @property
    def down_size(self) -> int:
        """Number of weights in the down projection."""
        size: int = self.module.down_proj.in_features * self.module.down_proj.out_features
        return size

    def _gate_and_up(self, x: Tensor) -> tuple[Tensor, Tensor]:
        outputs = [projection(x) for projection in self.projections]
        gate, up = outputs if len(outputs) == 2 else outputs[0].chunk(2, dim=-1)
        return gate, up

    @torch.no_grad()
    def _matches_module(self) -> bool:
        """Compare with the module in training mode: some have a dropout."""
        training = [part for part in self.module.modules() if part.training]
        self.module.train()
        try:
            with torch.random.fork_rng():
                return self._matches_on_random_input()
        finally:
            self.module.eval()
            for part in training:
                part.training = True

    def _matches_on_random_input(self) -> bool:
        weight = next(self.module.parameters())
        features = getattr(self.projections[0], "in_features", 0)
        x = torch.randn(1, 3, features, generator=torch.Generator().manual_seed(0)).to(weight.device)
        x = x.to(weight.dtype if weight.is_floating_point() else torch.bfloat16)
        try:
            expected = self.module(x)
            gate, up = self._gate_and_up(x)
            actual = self.module.down_proj(self.activation.forward(gate) * up)
        except torch.OutOfMemoryError:  # no evidence against the module
            raise
        except UNSUPPORTED:
            return False
        return isinstance(expected, Tensor) and torch.equal(expected, actual)


def _find_activation(function: nn.Module) -> Activation | None:
    x = torch.randn(256, generator=torch.Generator().manual_seed(0)) * 3
    try:
        with torch.no_grad():
            expected = function(x)
    except UNSUPPORTED:
        return None
    equal = (each for each in ACTIVATIONS.values() if torch.allclose(each.forward(x), expected, rtol=1e-6, atol=1e-7))
    return next(equal, None)
