"""What a QLoRA step must compute: floating-point operations of one pass forward and backward, nothing computed twice.

A product of (m, k) and (k, n) is 2 m k n operations. With N the weights of the base's linear layers and P those of the
adapter on them, a token costs

- base: 2 N forward and 2 N for the gradient of its input; frozen weights have no gradient of their own;
- adapter: 2 P forward and 4 P backward, for the gradients of its input and of its weights;

a row of S tokens costs, in each layer with query heads of w numbers together and causal attention, where pairs of a token
and one that it sees are S (S + 1) / 2, or fewer in a sliding window:

- attention: 4 w a pair forward (scores, and the sum of the values) and 8 w backward (gradients of both factors of both);

and a token with a label costs, with a hidden state of h numbers and a vocabulary of V

- head: 2 h V forward and 2 h V backward, as it is frozen.

Norms, activations, rotary positions, the loss and the optimizer are not counted, nor is 4-bit arithmetic, nor what a kernel
or gradient checkpointing computes again: so the measure is one for all trainers ("model FLOPs utilization", Chowdhery et
al. 2022, https://arxiv.org/abs/2204.02311, appendix B). The gradient of the first layer's input is counted although a
trainer may leave it out.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The sizes that decide the cost of a model.

    Attributes:
        linears: (in, out) of every linear layer but the head.
        windows: of each layer, the most tokens that a token sees; infinite where it is plainly causal.
        attention_width: numbers of all query heads together.
        hidden_size: of the head's input.
        vocab_size: of its output.
    """

    linears: tuple[tuple[int, int], ...]
    windows: tuple[float, ...]
    attention_width: int
    hidden_size: int
    vocab_size: int


@dataclass(frozen=True, slots=True)
class StepFlops:
    """Operations of a pass forward and backward, by part."""

    base: float
    adapter: float
    attention: float
    head: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.base + self.adapter + self.attention + self.head


def model_shape(config_json: Mapping[str, Any]) -> ModelShape:
    """Return the sizes of a dense decoder of one attention layer a block.

    Args:
        config_json: the content of config.json.

    Raises:
        ValueError: a mixture of experts, or layers without softmax attention, for which the formulas do not hold.
    """
    settings = {key: value for key, value in config_json.items() if key not in ("model_type", "quantization_config")}
    config = AutoConfig.for_model(config_json["model_type"], **settings)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    head = model.get_output_embeddings()
    linears = {name: part for name, part in model.named_modules() if isinstance(part, nn.Linear) and part is not head}
    counted = sum(part.weight.numel() for part in linears.values())
    matrices = [weight for weight in model.parameters() if weight.ndim > 1]
    embeddings = {id(model.get_input_embeddings().weight), id(head.weight)}
    if counted != sum(weight.numel() for weight in matrices if id(weight) not in embeddings):
        raise ValueError(
            f"config.json: model_type {config.model_type}: not every weight is a linear layer's that each token passes; "
            "operations are counted for dense decoders alone"
        )
    layer_types = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    if others := sorted(set(layer_types) - {"full_attention", "sliding_attention"}):
        raise ValueError(f"config.json: layer_types: {', '.join(others)}: operations are counted for attention alone")
    windows = {"full_attention": math.inf, "sliding_attention": getattr(config, "sliding_window", None) or math.inf}
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return ModelShape(
        linears=tuple((part.in_features, part.out_features) for part in linears.values()),
        windows=tuple(windows[kind] for kind in layer_types),
        attention_width=config.num_attention_heads * head_dim,
        hidden_size=head.in_features,
        vocab_size=head.out_features,
    )


def step_flops(shape: ModelShape, *, r: int, row_lengths: Sequence[int], num_labels: int) -> StepFlops:
    """Return the operations of a batch.

    Args:
        shape: of the model.
        r: rank of the adapter, which is on every linear layer but the head.
        row_lengths: tokens of each row, padding left out; of packed rows, those of each document.
        num_labels: tokens that carry loss.
    """
    num_tokens = sum(row_lengths)
    base_weights = sum(rows * columns for rows, columns in shape.linears)
    adapter_weights = sum(r * (rows + columns) for rows, columns in shape.linears)
    num_pairs = sum(_pairs(length, window) for length in row_lengths for window in shape.windows)
    return StepFlops(
        base=4 * base_weights * num_tokens,
        adapter=6 * adapter_weights * num_tokens,
        attention=12 * shape.attention_width * num_pairs,
        head=4 * shape.hidden_size * shape.vocab_size * num_labels,
    )


def _pairs(length: int, window: float) -> float:
    """Return how many pairs there are of a token and one that it sees, itself included."""
    within = int(min(length, window))
    return within * (within + 1) / 2 + (length - within) * within
