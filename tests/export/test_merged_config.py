"""config.json of a merged model: the base's own names and values, and those that Transformers 4 reads.

The expected names are those of Transformers 4.57's config classes. `scripts/compare_transformers.py` compares what 4.57
computes.
"""

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer

from qlora_train.config import ModelSection
from qlora_train.export.merging.merged_config import write_config
from qlora_train.models import resolve_base
from qlora_train.models.loading import model_config
from qlora_train.models.tokenizer import save_tokenizer
from tests.support.merging import merge, plain, save_adapter
from tests.support.pico import build_config
from tests.support.pico_multimodal import build_whole

Pico = Callable[..., Path]
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "factor": 8.0}
LONG = {"type": "longrope", "short_factor": [1.5] * 8, "long_factor": [3.0] * 8}
LAYERS = {"layer_types": ["sliding_attention", "full_attention"]}
OLD_NAMES: dict[str, dict[str, Any]] = {
    "llama": {"rope_theta": 500_000.0, "rope_scaling": LLAMA3},
    "mistral": {"rope_theta": 1_000_000.0},
    "qwen2": {"rope_theta": 1_000_000.0, "rope_scaling": YARN},
    "qwen3_moe": {"rope_theta": 1_000_000.0, "num_experts": 4},
    "granite": {"rope_theta": 300_000.0},
    "olmo2": {"rope_theta": 500_000.0},
    "deepseek_v3": {"rope_theta": 50_000.0, "rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}},
    "phi3": {"rope_theta": 20_000.0, "rope_scaling": LONG, "original_max_position_embeddings": 64},
    "glm4": {"rope_theta": 20_000.0, "partial_rotary_factor": 0.25},
    "gpt_neox": {"rotary_emb_base": 20_000, "rotary_pct": 0.5},
    "gemma3_text": {"rope_theta": 500_000.0, "rope_local_base_freq": 5_000.0, "rope_scaling": LINEAR, **LAYERS},
    "olmo3": {"rope_theta": 500_000.0, "rope_scaling": YARN, **LAYERS},
}  # fmt: skip
"""Settings by the names of Transformers 4, one row a way to write RoPE."""


def written(folder: Path, content: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    """Return config.json of a merge that changes nothing of a base with this one, and how the base was read."""
    base, merged = folder / "base", folder / "merged"
    for path in (base, merged):
        path.mkdir()
    (base / "config.json").write_text(json.dumps(content))
    config = AutoConfig.from_pretrained(base)
    write_config(merged, base, config)
    return json.loads((merged / "config.json").read_text()), config


@pytest.mark.parametrize("model_type", OLD_NAMES)
def test_a_base_with_old_names_keeps_them(model_type: str, tmp_path: Path) -> None:
    content = {
        **json.loads(build_config(model_type).to_json_string()),
        **OLD_NAMES[model_type],
        "torch_dtype": "bfloat16",
    }
    del content["rope_parameters"]
    merged, config = written(tmp_path, content)
    assert "rope_parameters" not in merged
    assert merged == {**content, "tie_word_embeddings": config.tie_word_embeddings}


@pytest.mark.parametrize("model_type", OLD_NAMES)
def test_a_base_with_new_names_gets_the_old_ones_too(model_type: str, tmp_path: Path) -> None:
    content = json.loads(build_config(model_type, **deepcopy(OLD_NAMES[model_type]), dtype="bfloat16").to_json_string())
    assert not {"rope_theta", "rotary_pct", "rope_scaling", "torch_dtype"} & content.keys()
    merged, config = written(tmp_path, content)
    assert {key: merged[key] for key in OLD_NAMES[model_type]} == OLD_NAMES[model_type]
    assert {key: merged[key] for key in content} == {**content, "tie_word_embeddings": config.tie_word_embeddings}
    assert merged["torch_dtype"] == "bfloat16"
    assert AutoConfig.from_pretrained(tmp_path / "merged").rope_parameters == config.rope_parameters | (
        {"type": "longrope"} if model_type == "phi3" else {}
    )


def test_an_old_name_that_overrules_a_new_one_is_written_as_both(tmp_path: Path) -> None:
    content = json.loads(build_config("llama", rope_theta=20_000.0).to_json_string())
    merged, config = written(tmp_path, {**content, "rope_scaling": YARN, "rope_theta": 30_000.0})
    assert config.rope_parameters == merged["rope_parameters"] == {**YARN, "rope_theta": 30_000.0}
    assert (merged["rope_theta"], merged["rope_scaling"]) == (30_000.0, YARN)


def test_rope_scaling_of_a_run_is_written_by_both_names(tmp_path: Path) -> None:
    content = json.loads(build_config("llama").to_json_string())
    del content["rope_parameters"]
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps({**content, "rope_theta": 40_000.0}))
    (tmp_path / "merged").mkdir()
    section = ModelSection(
        model_name_or_path=str(tmp_path / "base"), rope_scaling={"rope_type": "linear", "factor": 4.0}
    )
    config = model_config(resolve_base(section), section)
    write_config(tmp_path / "merged", tmp_path / "base", config)
    merged = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert merged["rope_theta"] == merged["rope_parameters"]["rope_theta"] == 40_000.0
    for scaling in (merged["rope_scaling"], merged["rope_parameters"]):
        assert (scaling["rope_type"], scaling["factor"]) == ("linear", 4.0)
    assert merged["max_position_embeddings"] == config.max_position_embeddings


def test_the_config_of_a_whole_model_stays_whole(tmp_path: Path) -> None:
    base = build_whole(tmp_path / "base", "gemma3")
    content = json.loads((base / "config.json").read_text())
    config = AutoConfig.from_pretrained(base)
    config.eos_token_id = config.get_text_config().eos_token_id = [2, 3]
    (tmp_path / "merged").mkdir()
    write_config(tmp_path / "merged", base, config)
    merged = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert merged["vision_config"] | content["vision_config"] == merged["vision_config"]
    assert merged["eos_token_id"] == merged["text_config"]["eos_token_id"] == [2, 3]
    rope = content["text_config"]["rope_parameters"]
    assert merged["text_config"]["rope_local_base_freq"] == rope["sliding_attention"]["rope_theta"]
    assert merged["architectures"] == content["architectures"]


def test_a_merge_onto_a_classifier_is_a_language_model(pico: Pico, tmp_path: Path) -> None:
    base = tmp_path / "base"
    model = plain(pico("llama"))
    model.save_pretrained(base)
    content = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**content, "architectures": ["LlamaForSequenceClassification"]}))
    tensors = load_file(base / "model.safetensors")
    save_file({**tensors, "score.weight": torch.ones(2, 64)}, base / "model.safetensors", metadata={"format": "pt"})
    adapter = save_adapter(model, tmp_path / "adapter")
    merge(base, adapter, tmp_path / "merged")
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_tokenizer_settings_have_names_that_transformers_4_reads(pico: Pico, tmp_path: Path, model_type: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(pico(model_type))
    save_tokenizer(tokenizer, tmp_path)
    content = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert content["tokenizer_class"] in ("PreTrainedTokenizerFast", "Qwen2Tokenizer")
    assert not isinstance(content.get("extra_special_tokens"), list)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert type(again) is type(tokenizer)
    assert again.all_special_tokens == tokenizer.all_special_tokens
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
