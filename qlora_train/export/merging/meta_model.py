"""The model of a config without its weights: names, shapes and kinds of parameters that no file tells."""

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
    """A model on the meta device and what a merge asks of it.

    Attributes:
        model: the model; its parameters have shapes and no values.
        shapes: of its parameters and stored buffers, by name.
        embedding: module name of the input embeddings.
        head: module name of the output head.
        tied: whether the model makes the two one matrix.
        linears: module names of the linear layers that a 4-bit load quantises.
        conv1d: module names of the linear layers that are stored as (in, out), as GPT-2's are.
        experts: names of the parameters that hold one matrix an expert, (experts, ...), in three dimensions.
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
        """Names of the parameters that no other parameter gives their values."""
        tied = self.model.all_tied_weights_keys
        return frozenset(name for name, _ in self.model.named_parameters() if name not in tied)

    @property
    def quantized(self) -> frozenset[str]:
        """Names of the parameters that a 4-bit load quantises."""
        return frozenset(f"{name}.weight" for name in self.linears) | self.experts

    def kept_in_float32(self, dtype: torch.dtype) -> frozenset[str]:
        """Return the names that Transformers keeps in float32 when it loads the rest in `dtype`."""
        patterns = [pattern.replace("*", ".*") for pattern in self.model._get_dtype_plan(dtype)]
        return frozenset(name for name in self.shapes if any(re.search(pattern, name) for pattern in patterns))


def build_meta_model(config: Any, *, trust_remote_code: bool = False) -> MetaModel:
    """Build the model of a Transformers config, or the text part of a multimodal one, without memory and name its parts."""
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
    """Return the module names of the linear layers that a 4-bit load quantises.

    Args:
        model: on any device, as it is before quantisation.
        architecture: its row, which says what is quantised and what is not besides what the library decides.
    """
    named = modules_to_not_convert(model, architecture.keep_16bit)
    kept = HfQuantizer.get_modules_to_not_convert(model, named, model._keep_in_fp32_modules)
    return frozenset(
        name
        for name, module in model.named_modules()
        if (type(module) in (torch.nn.Linear, Conv1D) or type(module).__name__ in architecture.linear_classes)
        and should_convert_module(name, kept)
    )
