"""Every shipped config and recipe is valid, fits its model's architecture, and has a dry run on bundled rows."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from qlora_train.adapters import choose_targets, find_linears
from qlora_train.architectures import check_max_length, detect
from qlora_train.config import LoraSection, load_config
from qlora_train.config.schema import DataSection
from qlora_train.data import prepare_data
from qlora_train.data.default_chat_templates import CHAT_TEMPLATES
from qlora_train.planning.held_memory import CUDA_CONTEXT_BYTES
from qlora_train.planning.memory import plan_memory, step_settings
from qlora_train.planning.run_plan import model_shapes
from qlora_train.utils.constants import UNTOUCHED_SHARE
from tests.support.pico import build_tokenizer

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))  # cluster/ holds jobs, not configs
LOCAL_CONFIGS = ("demo", "demo_dpo")
"""Configs whose base is generated, without a published config.json."""
NF4_BLOCK = 64
"""NF4 block size."""


def values(model_type, hidden, intermediate, layers, heads, kv_heads, vocabulary, positions, **others):
    """Return the values of a published config.json that determine shapes."""
    return {
        "model_type": model_type,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": positions,
        **others,
    }


UNTIED, TIED = {"tie_word_embeddings": False}, {"tie_word_embeddings": True}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 48,
    "long_factor": [1.0] * 48,
    "original_max_position_embeddings": 4096,
}
MODELS = {
    "meta-llama/Llama-2-7b-hf": values("llama", 4096, 11008, 32, 32, 32, 32000, 4096, **UNTIED),
    "meta-llama/Llama-2-70b-hf": values("llama", 8192, 28672, 80, 64, 8, 32000, 4096, **UNTIED),
    "meta-llama/Llama-3.1-8B": values(
        "llama", 4096, 14336, 32, 32, 8, 128256, 131072, rope_parameters=LLAMA3_ROPE, **UNTIED
    ),
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": values("llama", 2048, 5632, 22, 32, 4, 32000, 2048, **UNTIED),
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": values("llama", 2048, 8192, 24, 32, 32, 49152, 8192, **TIED),
    "mistralai/Mistral-7B-v0.1": values(
        "mistral", 4096, 14336, 32, 32, 8, 32000, 32768, sliding_window=4096, **UNTIED
    ),
    "Qwen/Qwen2.5-0.5B-Instruct": values("qwen2", 896, 4864, 24, 14, 2, 151936, 32768, **TIED),
    "Qwen/Qwen2.5-1.5B": values("qwen2", 1536, 8960, 28, 12, 2, 151936, 131072, **TIED),
    "Qwen/Qwen2.5-1.5B-Instruct": values("qwen2", 1536, 8960, 28, 12, 2, 151936, 32768, **TIED),
    "Qwen/Qwen2.5-3B-Instruct": values("qwen2", 2048, 11008, 36, 16, 2, 151936, 32768, **TIED),
    "Qwen/Qwen2.5-7B-Instruct": values("qwen2", 3584, 18944, 28, 28, 4, 152064, 32768, **UNTIED),
    "Qwen/Qwen2.5-14B-Instruct": values("qwen2", 5120, 13824, 48, 40, 8, 152064, 32768, **UNTIED),
    "Qwen/Qwen2.5-32B-Instruct": values("qwen2", 5120, 27648, 64, 40, 8, 152064, 32768, **UNTIED),
    "Qwen/Qwen3-8B": values("qwen3", 4096, 12288, 36, 32, 8, 151936, 40960, head_dim=128, **UNTIED),
    "Qwen/Qwen3-30B-A3B": values(
        "qwen3_moe", 2048, 6144, 48, 32, 4, 151936, 40960, head_dim=128, num_experts=128, num_experts_per_tok=8,
        moe_intermediate_size=768, **UNTIED,
    ),
    "google/gemma-2-9b-it": values("gemma2", 3584, 14336, 42, 16, 8, 256000, 8192, head_dim=256, **TIED),
    "microsoft/Phi-3.5-mini-instruct": values(
        "phi3", 3072, 8192, 32, 32, 32, 32064, 131072, original_max_position_embeddings=4096,
        rope_parameters=LONGROPE, sliding_window=262144, pad_token_id=32000, **UNTIED,
    ),
}  # fmt: skip
NUM_PARAMETERS = {
    "meta-llama/Llama-2-7b-hf": 6_738_415_616,
    "meta-llama/Llama-2-70b-hf": 68_976_648_192,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": 1_100_048_384,
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": 1_711_376_384,
    "mistralai/Mistral-7B-v0.1": 7_241_732_096,
    "Qwen/Qwen2.5-0.5B-Instruct": 494_032_768,
    "Qwen/Qwen2.5-1.5B": 1_543_714_304,
    "Qwen/Qwen2.5-1.5B-Instruct": 1_543_714_304,
    "Qwen/Qwen2.5-3B-Instruct": 3_085_938_688,
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
    "Qwen/Qwen2.5-14B-Instruct": 14_770_033_664,
    "Qwen/Qwen2.5-32B-Instruct": 32_763_876_352,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-30B-A3B": 30_532_122_624,
    "google/gemma-2-9b-it": 9_241_705_984,
    "microsoft/Phi-3.5-mini-instruct": 3_821_079_552,
}
"""Sizes of the published checkpoints: a wrong value in MODELS would miss them."""


def name_of(path):
    return f"{path.parent.name}/{path.stem}"


SHIPPED = [path for path in CONFIGS + RECIPES if path.stem not in LOCAL_CONFIGS]
shipped = pytest.mark.parametrize("path", SHIPPED, ids=name_of)


@pytest.fixture(scope="module")
def meta_model():
    """Build a model's architecture without weights, once per set of values."""
    built = {}

    def build(model_id):
        key = repr(MODELS[model_id])
        if key not in built:
            config = AutoConfig.for_model(**MODELS[model_id])
            with torch.device("meta"):
                built[key] = AutoModelForCausalLM.from_config(config)
        return built[key]

    return build


def test_promised_files_exist():
    assert {path.stem for path in CONFIGS} >= {
        "llama7b", "llama3.1-8b", "mistral7b", "qwen2.5-7b", "qwen3-8b", "gemma2-9b", "phi3.5-mini", "tinyllama",
        "llama70b", "llama70b-2x24gb", "qwen3-30b-a3b",
    }  # fmt: skip
    assert {path.stem for path in RECIPES} >= {
        "chat", "instruction", "completion", "dpo", "orpo", "kto", "tool_calling", "reasoning", "extraction",
        "continued_pretraining", "new_tokens", "mixture_of_experts", "small_gpu", "long_context", "new_model",
        "from_openai",
    }  # fmt: skip
    readme = (ROOT / "recipes" / "README.md").read_text()
    assert set(re.findall(r"\]\((\w+\.yaml)\)", readme)) == {path.name for path in RECIPES}


@pytest.mark.parametrize("path", CONFIGS + RECIPES, ids=name_of)
def test_shipped_file_is_a_valid_config(path):
    load_config(path)


@shipped
def test_adapter_covers_every_linear_but_the_head(path, meta_model):
    config = load_config(path)
    json_values = MODELS[config.model.model_name_or_path]
    model = meta_model(config.model.model_name_or_path)
    linears = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    head = {name for name in linears if name.rsplit(".", 1)[-1] == "lm_head"}
    assert len(head) == 1
    found = find_linears(model)
    assert set(found) == linears - head
    names = detect(json_values).linear_names
    assert len(found) == json_values["num_hidden_layers"] * len(names)
    targets = choose_targets(model, found, config.lora, detect(json_values))
    assert set(targets) == set(names)


@shipped
def test_every_quantised_weight_divides_into_nf4_blocks(path, meta_model):
    model = meta_model(load_config(path).model.model_name_or_path)
    for name, linear in find_linears(model).items():
        assert linear.in_features % NF4_BLOCK == 0, name


@shipped
def test_rows_fit_into_the_models_positions(path):
    config = load_config(path)
    json_values = MODELS[config.model.model_name_or_path]
    architecture = detect(json_values)
    assert architecture.known
    check_max_length(json_values, architecture, config.data.max_length, config.model.rope_scaling)
    factor = config.model.rope_scaling["factor"] if config.model.rope_scaling else 1
    assert config.data.max_length <= json_values["max_position_embeddings"] * factor


@shipped
def test_chat_template_is_bundled_or_the_models(path):
    template = load_config(path).model.chat_template
    assert template is None or template in CHAT_TEMPLATES


@pytest.mark.parametrize("model_id", list(MODELS))
def test_values_are_those_of_the_published_checkpoint(model_id, meta_model):
    assert sum(parameter.numel() for parameter in meta_model(model_id).parameters()) == NUM_PARAMETERS[model_id]


@pytest.mark.parametrize("path", [path for path in CONFIGS if path.stem not in LOCAL_CONFIGS], ids=name_of)
def test_config_has_a_dry_run_on_bundled_rows(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    command = re.search(r"^# Dry run: qlora-train (.*)$", path.read_text(), re.MULTILINE)[1]
    file, *overrides = shlex.split(command)
    assert Path(file) == path.relative_to(ROOT)
    assert_rows_are_usable(load_config(file, overrides).data)


SMALL_GPU = ROOT / "recipes" / "small_gpu.yaml"
GPU_ROW = re.compile(
    r"^# \| (?P<gpu>\d+) GB \| (?P<model>\S+) \| (?P<r>\d+) \| (?P<rows>\d+) \| (?P<length>\d+) \| (?P<peak>[\d.]+) GB \|$",
    re.MULTILINE,
)
GPU_ROWS = list(GPU_ROW.finditer(SMALL_GPU.read_text(encoding="utf-8")))


@pytest.mark.parametrize("row", GPU_ROWS, ids=lambda row: f"{row['gpu']}GB-{row['model']}")
def test_planned_peak_of_a_small_gpu_is_the_planners_and_fits(row):
    rows, length, json_values = int(row["rows"]), int(row["length"]), MODELS[row["model"]]
    model = model_shapes(json_values, LoraSection())
    settings = step_settings(model, r=int(row["r"]), num_tokens=rows * length, accumulates=True)
    needed_bytes = plan_memory(model, settings).needed_bytes
    assert float(row["peak"]) == pytest.approx((needed_bytes - CUDA_CONTEXT_BYTES) / 1e9, abs=0.06)
    assert needed_bytes < int(row["gpu"]) * 2**30 * (1 - UNTOUCHED_SHARE)


def test_first_row_of_the_small_gpus_is_the_recipe_itself():
    assert {int(row["gpu"]) for row in GPU_ROWS} == {6, 8, 12, 16, 24}
    config, first = load_config(SMALL_GPU), GPU_ROWS[0]
    found = (config.model.model_name_or_path, config.lora.r, config.train.per_device_train_batch_size)
    assert found == (first["model"], int(first["r"]), int(first["rows"]))
    assert config.data.max_length == int(first["length"])


@pytest.mark.parametrize(
    "name",
    ["chat", "conversations", "instruction", "questions", "completion", "text", "extraction", "tags", "openai_chat"],
)
def test_bundled_rows_are_recognised_and_unique(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    data = DataSection.model_validate({"train": f"data/examples/{name}.jsonl", "eval": 0.1})
    assert_rows_are_usable(data)


def assert_rows_are_usable(data: DataSection) -> None:
    """Every row is usable and unique, and a held-out share leaves rows on both sides."""
    prepared = prepare_data(data, build_tokenizer(), seed=42)
    source = prepared.report.sources[0].summary
    assert source.num_records >= 20
    assert source.dropped.counts == {}
    assert all(split.num_duplicates == 0 for split in prepared.report.splits.values())
    assert 0 < len(prepared.eval) < len(prepared.train)
