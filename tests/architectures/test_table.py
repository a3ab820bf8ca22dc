"""The table of architectures against the config classes and models that it describes."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from qlora_train.architectures import (
    ARCHITECTURES,
    POSITION_KEYS,
    check_max_length,
    check_target_modules,
    default_chat_template,
    detect,
    max_positions,
)
from qlora_train.models.hardware import choose_attention
from qlora_train.models.loading import supports_sdpa
from qlora_train.models.moe import expert_parameters, routers
from qlora_train.utils.errors import ConfigError, ModelError
from tests.support.pico import FAMILIES, build_config

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
LLAMA_2 = {"model_type": "llama", "max_position_embeddings": 4096}
LLAMA_3_1 = {
    "model_type": "llama",
    "max_position_embeddings": 131072,
    "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192},
}
PHI_3_5 = {"model_type": "phi3", "max_position_embeddings": 131072, "original_max_position_embeddings": 4096}


def on_meta(model_type: str) -> torch.nn.Module:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(build_config(model_type))


def positions(config: dict[str, Any]) -> int | None:
    return max_positions(config, detect(config))


def check(config: dict[str, Any], max_length: int, rope_scaling: dict[str, Any] | None = None) -> None:
    check_max_length(config, detect(config), max_length, rope_scaling)


def test_every_pico_family_has_a_row_and_every_row_is_a_causal_language_model() -> None:
    assert set(FAMILIES) <= set(ARCHITECTURES) <= set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_linear_names_are_those_of_the_model_without_its_head(model_type: str) -> None:
    model = on_meta(model_type)
    outside = {model.get_output_embeddings(), *routers(model).values()}
    linears = {
        name.rsplit(".", 1)[-1]
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and module not in outside
    }
    assert linears == set(ARCHITECTURES[model_type].linear_names)


@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_linears_with_as_many_outputs_as_experts_are_routers(model_type: str) -> None:
    model = on_meta(model_type)
    names = {name for name, module in model.named_modules() if getattr(module, "out_features", 0) == 4}
    if expert_parameters(model):
        assert names <= set(routers(model)) | {name for name in names if name.endswith(("in_proj_a", "in_proj_b"))}
    else:
        assert not routers(model)


@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_default_positions_are_those_of_the_config_class(model_type: str) -> None:
    defaults = AutoConfig.for_model(model_type).to_dict()
    expected = next((defaults[key] for key in POSITION_KEYS if isinstance(defaults.get(key), int)), None)
    assert positions({"model_type": model_type}) == expected


@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_default_attention_is_that_of_transformers_without_flash(model_type: str) -> None:
    row = ARCHITECTURES[model_type]
    if not row.attention_reason:  # where there is a reason, releases of Transformers differ
        chosen = choose_attention("auto", row, CPU, torch.float32, has_sdpa=supports_sdpa(build_config(model_type)))
        assert on_meta(model_type).config._attn_implementation == chosen
    assert bool(row.attention_reason) == (row.attention != "sdpa")


def test_detect_reads_the_saved_config(pico) -> None:
    for model_type in ("llama", "gemma3_text"):
        config = AutoConfig.from_pretrained(pico(model_type)).to_dict()
        assert detect(config) is ARCHITECTURES[model_type]
        assert positions(config) == 256


def test_unknown_model_type_gets_the_generic_row() -> None:
    row = detect({"model_type": "brand_new", "n_positions": 512})
    assert (row.known, row.model_type) == (False, "brand_new")
    assert positions({"model_type": "brand_new", "n_positions": 512}) == 512
    assert positions({"model_type": "brand_new"}) is None
    check({"model_type": "brand_new"}, 10**6)


@pytest.mark.parametrize("config", [{}, {"model_type": None}, {"model_type": ""}, {"model_type": 7}])
def test_missing_model_type_is_one_line(config: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match="model_type") as caught:
        detect(config)
    assert "\n" not in str(caught.value)


def test_max_length_up_to_the_positions_is_accepted() -> None:
    check(LLAMA_2, 4096)
    check(LLAMA_3_1, 131072)
    check(PHI_3_5, 131072)


def test_max_length_beyond_the_positions_names_all_three_settings() -> None:
    with pytest.raises(ConfigError) as caught:
        check(LLAMA_2, 4097)
    message = str(caught.value)
    for part in ("data.max_length", "4097", "4096 positions", "model.rope_scaling", "factor: 2.0"):
        assert part in message
    assert "\n" not in message


def test_rope_scaling_multiplies_the_positions() -> None:
    scaling = {"rope_type": "linear", "factor": 2.0}
    check(LLAMA_2, 8192, scaling)
    with pytest.raises(ConfigError, match="reaches 8192"):
        check(LLAMA_2, 8193, scaling)


def test_rope_scaling_of_the_user_replaces_that_of_the_checkpoint() -> None:
    check(LLAMA_3_1, 65536, {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192})
    with pytest.raises(ConfigError, match="reaches 65536"):
        check(LLAMA_3_1, 65537, {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192})
    with pytest.raises(ConfigError, match="reaches 8192"):
        check(PHI_3_5, 8193, {"rope_type": "yarn", "factor": 2.0})


def test_rope_scaling_in_the_checkpoint_extends_its_positions() -> None:
    rope = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    assert positions({"model_type": "qwen2", "max_position_embeddings": 32768, "rope_scaling": rope}) == 131072


def test_alibi_has_unlimited_positions() -> None:
    assert positions({"model_type": "falcon", "alibi": True}) is None
    assert positions({"model_type": "falcon", "alibi": False}) == 2048


def test_target_of_another_architecture_is_refused_early() -> None:
    with pytest.raises(ConfigError, match=r"lora.target_modules: q_proj.*qkv_proj"):
        check_target_modules(ARCHITECTURES["phi3"], ("q_proj", "o_proj"))
    check_target_modules(ARCHITECTURES["phi3"], ("qkv_proj", "layers.0.mlp.down_proj", "lm_head", "embed_tokens"))
    check_target_modules(ARCHITECTURES["phi3"], "all-linear")
    check_target_modules(detect({"model_type": "brand_new"}), ("q_proj",))


def test_sdpa_is_refused_or_differs_if_the_row_refuses_it() -> None:
    for row in ARCHITECTURES.values():
        if not row.attention_reason:
            continue
        configs = [build_config(row.model_type, attn_logit_softcapping=0.05) for _ in range(2)]
        eager = AutoModelForCausalLM.from_config(configs[0], attn_implementation="eager").eval()
        try:
            sdpa = AutoModelForCausalLM.from_config(configs[1], attn_implementation="sdpa").eval()
        except ValueError:  # newer releases refuse it
            continue
        sdpa.load_state_dict(eager.state_dict())
        ids = torch.arange(16)[None] + 5
        with torch.no_grad():
            assert (eager(ids).logits - sdpa(ids).logits).abs().max() > 1e-3


def test_turn_tokens_select_the_chat_template(pico_llama) -> None:
    llama = ARCHITECTURES["llama"]
    assert default_chat_template(llama, AutoTokenizer.from_pretrained(pico_llama).get_vocab()) == "chatml"
    assert default_chat_template(llama, {"<|start_header_id|>": 1}) == "llama3"
    assert default_chat_template(llama, {}) == "llama2"


def test_table_needs_no_torch() -> None:
    code = "import sys, qlora_train.architectures; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_docs_page_is_generated_from_the_table(tmp_path: Path) -> None:
    made = tmp_path / "architectures.md"
    subprocess.run([sys.executable, "scripts/architectures.py", str(made)], cwd=ROOT, check=True)
    assert (ROOT / "docs" / "architectures.md").read_text() == made.read_text(), "run: python scripts/architectures.py"
