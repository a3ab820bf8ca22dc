"""Shapes of any architecture, by walking a model on the meta device. Imports torch and Transformers."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig
from transformers.pytorch_utils import Conv1D

from qlora_train.adapters import choose_targets, find_linears
from qlora_train.adapters.expert_lora import choose_expert_parameters
from qlora_train.adapters.targets import is_target
from qlora_train.architectures import Architecture, detect
from qlora_train.config import LoraSection
from qlora_train.models.moe import expert_parameters, routers
from qlora_train.models.text_only import text_model
from qlora_train.planning.family_shapes import INPUT_NAMES
from qlora_train.planning.model_shape import AttentionShape, ExpertsShape, LayerShape, LinearShape, ModelShape
from qlora_train.utils.errors import ModelError
from qlora_train.utils.visible_text import shortened

EXPERTS_PER_TOKEN_KEYS = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk")
UNBUILDABLE = (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RuntimeError, StrictDataclassError)
"""What Transformers raises for settings of a wrong type or size."""
MAX_REASON = 200
_LAYER = re.compile(r"(.*?)\.(\d+)\.")
_HEAD_NORM = re.compile(r"\b(q|k|query|key)_?(layer)?norm\b")


def meta_shapes(config_json: Mapping[str, Any], lora: LoraSection) -> ModelShape:
    """Return the shapes of a base and where its adapter is.

    Args:
        config_json: the content of config.json.

    Raises:
        ModelError: Transformers has no causal language model of this model_type.
        ConfigError: unknown target modules.
    """
    config, model = model_on_meta(config_json)
    return _Walk(model, config, detect(config_json), lora).shape()


def model_on_meta(config_json: Mapping[str, Any]) -> tuple[Any, Any]:
    """Return the text config and a model without weights, as the loader builds it.

    Raises:
        ModelError: Transformers has no causal language model of this model_type.
    """
    dropped = ("model_type", "quantization_config")
    settings = {key: _with_floats(value) for key, value in config_json.items() if key not in dropped}
    try:
        config = AutoConfig.for_model(config_json.get("model_type"), **settings)
        with torch.device("meta"):
            model = text_model(config).build(config)
    except UNBUILDABLE as error:
        reason = shortened(" ".join(str(error).split()), MAX_REASON)
        raise ModelError(f"config.json: no causal language model can be built from it: {reason}") from error
    return config.get_text_config(), model


def _with_floats(value: Any) -> Any:
    """Return a value of config.json with the floats that Transformers writes as `{"__float__": "Infinity"}`."""
    if isinstance(value, dict):
        tag = value.get("__float__")
        return float(tag) if isinstance(tag, str) else {key: _with_floats(item) for key, item in value.items()}
    return [_with_floats(item) for item in value] if isinstance(value, list) else value


class _Walk:
    def __init__(self, model: Any, config: Any, architecture: Architecture, lora: LoraSection) -> None:
        self.model, self.config, self.architecture = model, config, architecture
        self.linears = find_linears(model)
        self.targets = choose_targets(model, self.linears, lora, architecture)
        self.adapted_experts = set(choose_expert_parameters(model, lora))
        kept = (name for name in self.linears if name.rpartition(".")[2] in architecture.keep_16bit)
        self.unquantized = {*routers(model), *kept}
        self.parameters = dict(model.named_parameters())
        embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings()
        self.embedding = embedding
        self.head = None if head is None or head.weight is embedding else head.weight

    def shape(self) -> ModelShape:
        prefixes = self._layer_prefixes()
        layers = tuple(self._layer(prefix) for prefix in prefixes)
        inside = {name for name in self.parameters if any(name.startswith(prefix) for prefix in prefixes)}
        outside = {name: self.parameters[name] for name in self.parameters.keys() - inside}
        outer = tuple(linear for linear in self._linears("", outside) if linear.is_quantized)
        known = [parameter for parameter in (self.embedding, self.head) if parameter is not None]
        others = sum(each.numel() for each in outside.values() if all(each is not one for one in known))
        return ModelShape(
            hidden_size=self.config.hidden_size,
            vocab_size=self.config.vocab_size,
            layers=layers,
            embedding_numel=self.embedding.numel(),
            head_numel=0 if self.head is None else self.head.numel(),
            other_numel=others - sum(linear.numel for linear in outer),
            outer_linears=outer,
        )

    def _layer_prefixes(self) -> list[str]:
        """Return the name prefix of each decoder layer: the longest list of modules that has linear layers."""
        found = dict.fromkeys(
            match[0] for name in (*self.linears, *expert_parameters(self.model)) if (match := _LAYER.match(name))
        )
        return list(found)

    def _layer(self, prefix: str) -> LayerShape:
        inside = {name: each for name, each in self.parameters.items() if name.startswith(prefix)}
        linears = tuple(self._linears(prefix, inside))
        experts = tuple(self._experts(prefix))
        counted = sum(linear.numel for linear in linears) + sum(each.count * each.matrix_numel for each in experts)
        norms = [name for name, each in inside.items() if self._is_hidden_norm(name, each)]
        names = {linear.name for linear in linears}
        per_token = next((n for key in EXPERTS_PER_TOKEN_KEYS if (n := getattr(self.config, key, None))), 1)
        return LayerShape(
            linears=linears,
            attention=self._attention(linears, inside),
            num_norms=len(norms),
            other_numel=sum(parameter.numel() for parameter in inside.values()) - counted,
            has_gated_mlp=bool(names & {"gate_proj", "gate_up_proj"}),
            experts=experts,
            num_experts_per_token=per_token if experts else 0,
        )

    def _linears(self, prefix: str, inside: Mapping[str, Any]) -> Iterator[LinearShape]:
        groups: dict[str, int] = {}
        names = [name for name in self.linears if f"{name}.weight" in inside]
        parents = list(dict.fromkeys(name.rpartition(".")[0] for name in names))
        for full in sorted(names, key=lambda name: _order(name, parents)):
            parent, _, name = full.removeprefix(prefix).rpartition(".")
            rows, columns = _features(self.linears[full])
            reads = groups.setdefault(parent if name in INPUT_NAMES else f"{parent}.{name}", len(groups))
            is_quantized = full not in self.unquantized
            yield LinearShape(name, rows, columns, reads, is_quantized and is_target(full, self.targets), is_quantized)

    def _experts(self, prefix: str) -> Iterator[ExpertsShape]:
        for full, module in expert_parameters(self.model).items():
            if full.startswith(prefix):
                name = full.rpartition(".")[2]
                count, rows, columns = getattr(module, name).shape
                yield ExpertsShape(name, count, columns, rows, full in self.adapted_experts)

    def _is_hidden_norm(self, name: str, parameter: Any) -> bool:
        is_norm = "norm" in name.rpartition(".")[0].rpartition(".")[2] or ".ln_" in name
        is_weight = name.endswith("weight") and parameter.shape == (self.config.hidden_size,)
        return is_norm and is_weight and not _HEAD_NORM.search(name)

    def _attention(self, linears: tuple[LinearShape, ...], inside: Mapping[str, Any]) -> AttentionShape | None:
        config = self.config
        heads = getattr(config, "num_attention_heads", 0) or 0
        sizes = {linear.name: linear.out_features for linear in linears}
        if not heads:
            return None
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        key_heads = getattr(config, "num_key_value_heads", None) or heads
        return AttentionShape(
            num_heads=heads,
            query_width=sizes.get("q_proj", heads * head_dim),
            key_width=sizes.get("k_proj", key_heads * head_dim),
            value_width=sizes.get("v_proj", key_heads * head_dim),
            has_head_norm=any(map(_HEAD_NORM.search, inside)),
            is_eager=self.architecture.attention == "eager",
        )


def _order(full: str, parents: list[str]) -> tuple[int, bool]:
    """Return the rank of a linear layer: within a module, those that read its input come first."""
    parent, _, name = full.rpartition(".")
    return parents.index(parent), name not in INPUT_NAMES


def _features(linear: Any) -> tuple[int, int]:
    if isinstance(linear, Conv1D):
        return linear.nx, linear.nf
    return linear.in_features, linear.out_features
