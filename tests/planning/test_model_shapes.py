"""Shapes computed from config.json are those of Transformers' models."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_train.config import LoraSection, ModelSection
from qlora_train.planning.base_config import find_base_config
from qlora_train.planning.family_shapes import FAMILIES, family_shapes
from qlora_train.planning.meta_shapes import meta_shapes, model_on_meta
from tests.config.test_shipped_yaml import MODELS, NUM_PARAMETERS
from tests.support.gguf_files import write_gguf
from tests.support.pico import FAMILIES as PICO_FAMILIES
from tests.support.pico import build_config

VARIANTS: dict[str, dict[str, Any]] = {
    "biased": {"attention_bias": True, "mlp_bias": True, "use_bias": True},
    "tied": {"tie_word_embeddings": True},
    "narrow": {"head_dim": 8, "num_key_value_heads": 1},
}


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
@pytest.mark.parametrize("variant", [None, *VARIANTS])
def test_arithmetic_agrees_with_transformers_for_every_family(model_type: str, variant: str | None) -> None:
    config_json = build_config(model_type, **VARIANTS.get(variant or "", {})).to_dict()
    for lora in (LoraSection(), LoraSection(target_parameters=())):
        assert family_shapes(config_json, lora) == meta_shapes(config_json, lora)


@pytest.mark.parametrize("model_type", sorted(PICO_FAMILIES))
def test_every_weight_of_a_model_is_counted_once(model_type: str) -> None:
    config_json = json.loads(build_config(model_type).to_json_string())  # as the file has it, infinite floats included
    _, model = model_on_meta(config_json)
    shape = meta_shapes(config_json, LoraSection())
    assert shape.numel == sum(parameter.numel() for parameter in model.parameters())
    assert len(shape.layers) == build_config(model_type).num_hidden_layers


@pytest.mark.parametrize("name", sorted(MODELS))
def test_published_models_have_their_number_of_parameters(name: str) -> None:
    shape = family_shapes(MODELS[name], LoraSection())
    assert shape is not None
    assert shape.numel == NUM_PARAMETERS[name]


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_header_of_a_gguf_file_gives_the_shapes_of_its_model(
    model_type: str, pico: Callable[..., Path], tmp_path: Path
) -> None:
    folder = pico(model_type)
    file = write_gguf(folder, tmp_path / "pico.gguf")
    configs = [find_base_config(ModelSection(model_name_or_path=str(path))).content for path in (file, folder)]
    assert family_shapes(configs[0], LoraSection()) == family_shapes(configs[1], LoraSection())
