"""The model of a config on the meta device: names, shapes and kinds of parameters, without weights."""

import re
from dataclasses import dataclass
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from qlora_train.architectures import Architecture, detect
from qlora_train.models.hf_quantizer import modules_to_not_convert
from qlora_train.models.moe import expert_parameters
from qlora_train.models.text_only import text_model


@dataclass(frozen=True)
class MetaModel:
    """A model on the meta device and the names of its parts.

    Attributes:
        model: on the meta device.
        shapes: of its parameters and persistent buffers, by name.
        embedding: module name of the input embeddings.
        head: module name of the output embeddings.
        tied: whether the two share one matrix.
        linears: module names of the linear layers that a 4-bit load quantizes.
        conv1d: module names of the linear layers stored as (in, out), as in GPT-2.
        experts: names of the parameters of stacked expert matrices, (experts, ...).
    """

    model: Any
    shapes: dict[str, tuple[int, ...]]
    embedding: str
    head: str
    tied: bool
    linears: frozenset[str]
    conv1d: frozenset[str]
    experts: frozenset[str]

    @property
    def untied(self) -> frozenset[str]:
        """Names of the parameters that are not tied to another."""
        tied = self.model.all_tied_weights_keys
        return frozenset(name for name, _ in self.model.named_parameters() if name not in tied)

    @property
    def quantized(self) -> frozenset[str]:
        """Names of the parameters that a 4-bit load quantizes."""
        return frozenset(f"{name}.weight" for name in self.linears) | self.experts

    def float32_parameters(self, dtype: torch.dtype) -> frozenset[str]:
        """Return the names that Transformers loads in float32 when the rest is `dtype`."""
        patterns = [pattern.replace("*", ".*") for pattern in self.model._get_dtype_plan(dtype)]
        return frozenset(name for name in self.shapes if any(re.search(pattern, name) for pattern in patterns))


def build_meta_model(config: Any, *, trust_remote_code: bool = False) -> MetaModel:
    """Build the model of a Transformers config, or the text part of a multimodal one, on the meta device."""
    with torch.device("meta"):
        model = text_model(config).build(config, trust_remote_code=trust_remote_code)
    names = {id(module): name for name, module in model.named_modules()}
    embedding, head = names[id(model.get_input_embeddings())], names[id(model.get_output_embeddings())]
    tied = model.all_tied_weights_keys
    return MetaModel(
        model=model,
        shapes={name: tuple(tensor.shape) for name, tensor in model.state_dict().items()},
        embedding=embedding,
        head=head,
        tied={f"{embedding}.weight", f"{head}.weight"} <= {*tied.keys(), *tied.values()},
        linears=quantized_linears(model, detect(config.to_dict())),
        conv1d=frozenset(name for name, module in model.named_modules() if isinstance(module, Conv1D)),
        experts=frozenset(expert_parameters(model)),
    )


def quantized_linears(model: Any, architecture: Architecture) -> frozenset[str]:
    """Return the module names of the linear layers that a 4-bit load quantizes, of a model that is not quantized."""
    named = modules_to_not_convert(model, architecture.keep_16bit)
    skipped = HfQuantizer.get_modules_to_not_convert(model, named, model._keep_in_fp32_modules)
    return frozenset(
        name
        for name, module in model.named_modules()
        if (type(module) in (torch.nn.Linear, Conv1D) or type(module).__name__ in architecture.linear_classes)
        and should_convert_module(name, skipped)
    )
