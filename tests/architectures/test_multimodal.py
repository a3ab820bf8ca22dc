"""Text-only loading of multimodal checkpoints; adapters and merges fit the whole model.

The reference is the whole model in plain Transformers: what was merged, and PEFT's own loading of the adapter onto it.
"""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForMultimodalLM

from qlora_train.adapters import find_linears, load_trained
from qlora_train.architectures import TEXT_ARCHITECTURES, TEXT_TYPES, check_packing, detect, max_positions
from qlora_train.config import ModelSection
from qlora_train.export.merging import merge_finished_run
from qlora_train.models import load_model, resolve_base
from qlora_train.models.loading import model_config
from qlora_train.models.moe import expert_parameters, routers
from qlora_train.models.text_only import check_causal, text_model
from qlora_train.planning.meta_shapes import meta_shapes
from qlora_train.planning.model_shape import packed_bytes, quantization_constants_bytes
from qlora_train.runs import RunFolder
from qlora_train.utils.errors import ConfigError, ModelError
from tests.architectures.conftest import LONG, Table
from tests.support.merging import merge
from tests.support.pico import FAMILIES
from tests.support.pico_multimodal import WHOLE, build_whole, build_whole_config
from tests.support.runs import adapter_bytes, losses, make_config, stopped_copy, train_run

SETTINGS = ("quantization.bnb_4bit_compute_dtype=float32", "train.max_steps=5", "train.save_steps=2", "data.eval=0.25")
SHORT = ("gemma3", "llama4", "mistral3", "qwen2_vl", "qwen3_5", "qwen3_vl_moe")
TRIED = sorted(WHOLE) if LONG else SHORT
PROCESSOR = "preprocessor_config.json"
IDS = torch.arange(40).reshape(2, 20) * 3 + 5


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`whole(model_type) -> folder` of a pico checkpoint, built once a session."""
    built: dict[str, Path] = {}

    def get(model_type: str) -> Path:
        if model_type not in built:
            built[model_type] = build_whole(tmp_path_factory.mktemp(f"whole-{model_type}-"), model_type)
        return built[model_type]

    return get


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=IDS, use_cache=False).logits


def load_merge(base: Path, run: RunFolder, config: Any, output: Path, onto: Any) -> Any:
    merge(base, run.adapter, output, merge_base=onto, quantization=config.quantization)
    return AutoModelForMultimodalLM.from_pretrained(output, dtype=torch.float32)


@pytest.mark.parametrize("model_type", sorted(WHOLE))
def test_text_model_computes_as_the_whole_model(model_type: str, whole: Callable[[str], Path]) -> None:
    folder = whole(model_type)
    reference = AutoModelForMultimodalLM.from_pretrained(folder, dtype=torch.float32)
    text = text_model(AutoConfig.from_pretrained(folder))
    model, info = text.model_class.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    names = {name for name, _ in reference.named_parameters()} - {name for name, _ in model.named_parameters()}
    assert names
    assert all(any(name.startswith(f"{module.name}.") for module in text.omitted_modules) for name in names)
    assert sum(module.num_weights for module in text.omitted_modules) == sum(
        parameter.numel() for name, parameter in reference.named_parameters() if name in names
    )
    torch.testing.assert_close(logits(model), logits(reference), rtol=0, atol=0)


@pytest.mark.parametrize("model_type", sorted(WHOLE))
def test_row_and_positions_are_those_of_the_text_config(model_type: str) -> None:
    config = build_whole_config(model_type)
    row = detect(config.to_dict())
    assert row.known
    assert row.model_type == config.get_text_config().model_type
    assert max_positions(config.to_dict(), row) == 256
    without = {key: value for key, value in config.to_dict().items() if key != "text_config"}
    assert detect(without).model_type == TEXT_TYPES[model_type]


@pytest.mark.parametrize("model_type", sorted(TEXT_TYPES))
def test_text_types_are_those_of_the_config_classes(model_type: str) -> None:
    assert AutoConfig.for_model(model_type).get_text_config().model_type == TEXT_TYPES[model_type]


@pytest.mark.parametrize("model_type", [name for name in sorted(WHOLE) if TEXT_TYPES[name] in TEXT_ARCHITECTURES])
def test_text_only_rows_match_their_models(model_type: str) -> None:
    config, row = build_whole_config(model_type), TEXT_ARCHITECTURES[TEXT_TYPES[model_type]]
    with torch.device("meta"):
        model = text_model(config).build(config)
    beside = routers(model)
    linears = {name.rpartition(".")[2] for name in find_linears(model) if name not in beside}
    assert linears == set(row.linear_names)
    usual = AutoConfig.for_model(model_type).get_text_config().to_dict()
    assert usual["max_position_embeddings"] == row.default_positions


@pytest.mark.parametrize("model_type", TRIED)
def test_adapter_and_merge_fit_the_whole_model(
    model_type: str, whole: Callable[[str], Path], tmp_path: Path, table: Table, caplog: pytest.LogCaptureFixture
) -> None:
    base = whole(model_type)
    run = train_run(tmp_path, base, *SETTINGS, name="straight")
    assert losses(run)[-1] < losses(run)[0] - 0.05
    config = make_config(tmp_path, base, *SETTINGS, name="straight")
    caplog.clear()
    with caplog.at_level("DEBUG"):
        loaded = load_model(config.model, config.quantization)
    messages = [record.getMessage() for record in caplog.records if record.getMessage().startswith("text-only:")]
    assert len(messages) == 1
    assert all(module.name in messages[0] for module in loaded.omitted_modules)
    assert loaded.omitted_modules
    assert loaded.quantization_summary.quantized_share > 0.95
    planned = meta_shapes(loaded.model.config.to_dict(), config.lora)
    found = loaded.quantization_summary.weight_bytes + loaded.quantization_summary.table_bytes
    assert packed_bytes(planned) + quantization_constants_bytes(planned, double_quant=True) == found
    experts = expert_parameters(loaded.model)
    assert not [name for name in loaded.quantization_summary.unquantized if name.split(" ")[0] in experts]

    wanted = logits(load_trained(loaded, run.adapter))
    folder = resolve_base(config.model).folder
    merged = logits(load_merge(folder, run, config, tmp_path / "merged", "dequantized"))
    torch.testing.assert_close(merged, wanted, rtol=1e-3, atol=2e-4)

    before, after = (load_file(place / "model.safetensors") for place in (base, tmp_path / "merged"))
    assert before.keys() == after.keys()
    plain = AutoModelForMultimodalLM.from_pretrained(base, dtype=torch.float32)
    merged_again = AutoModelForMultimodalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    modules = [module.name for module in loaded.omitted_modules]
    for name in modules:
        for one, other in zip(
            plain.get_submodule(name).parameters(), merged_again.get_submodule(name).parameters(), strict=True
        ):
            assert torch.equal(one, other)

    untrained = logits(plain)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys")
        on_whole = logits(PeftModel.from_pretrained(plain, str(run.adapter)))
    assert (on_whole - untrained).abs().max() > 0.01, "the adapter changes nothing"
    original = logits(load_merge(folder, run, config, tmp_path / "original", "original"))
    torch.testing.assert_close(on_whole, original, rtol=1e-3, atol=2e-4)
    assert (tmp_path / "merged" / PROCESSOR).read_text() == (base / PROCESSOR).read_text()
    table[model_type] |= {
        "4 bits": f"{100 * loaded.quantization_summary.quantized_share:.1f} %",
        "merged": "equal (whole)",
    }


@pytest.mark.parametrize("model_type", TRIED if LONG else SHORT[:1])
def test_stopped_text_only_run_resumes_bitwise(model_type: str, whole: Callable[[str], Path], tmp_path: Path) -> None:
    straight = train_run(tmp_path, whole(model_type), *SETTINGS, name="straight")
    stopped_copy(straight, tmp_path / "stopped")
    assert adapter_bytes(train_run(tmp_path, whole(model_type), *SETTINGS, name="stopped")) == adapter_bytes(straight)


@pytest.mark.parametrize("model_type", TRIED)
def test_text_model_packs_or_names_the_reason(model_type: str, whole: Callable[[str], Path], tmp_path: Path) -> None:
    row = detect(build_whole_config(model_type).to_dict())
    if row.packing_error:
        with pytest.raises(ConfigError, match="packed documents would attend to each other"):
            check_packing(row)
    else:
        run = train_run(tmp_path, whole(model_type), *SETTINGS, "data.packing=true")
        assert losses(run)[-1] < losses(run)[0]


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("paligemma", "attention over text is bidirectional"),
        ("qwen2_audio", "reads the device of its audio encoder"),
        ("phi4_multimodal", "its encoders are inside the language model"),
        ("florence2", "an encoder-decoder"),
    ],
)
def test_model_that_needs_its_encoders_is_refused_in_one_line(model_type: str, reason: str) -> None:
    with pytest.raises(ModelError, match=reason) as caught:
        text_model(AutoConfig.for_model(model_type))
    assert "\n" not in str(caught.value)


def test_bidirectional_text_model_is_refused(whole: Callable[[str], Path]) -> None:
    """PaliGemma's mask is bidirectional over the prompt."""
    text = {"model_type": "gemma", **FAMILIES["gemma"]}
    torch.manual_seed(0)
    with pytest.raises(ModelError, match="depend on later tokens"):
        check_causal(AutoModelForMultimodalLM.from_config(build_whole_config("paligemma", text)))
    check_causal(AutoModelForMultimodalLM.from_pretrained(whole("gemma3")))


@pytest.mark.parametrize("model_type", sorted(WHOLE))
def test_text_models_of_the_table_are_causal(model_type: str, whole: Callable[[str], Path]) -> None:
    model = AutoModelForMultimodalLM.from_pretrained(whole(model_type), dtype=torch.float32).train()
    changed = torch.cat([IDS[:, :-1], IDS[:, :1]], dim=1)
    with torch.no_grad():
        one, other = (model(input_ids=ids, use_cache=False).logits[:, :-1] for ids in (IDS, changed))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_text_only_run_is_merged_and_evaluated(whole: Callable[[str], Path], tmp_path: Path) -> None:
    run = train_run(tmp_path, whole("llava"), *SETTINGS, "export.max_loss_increase=10")
    choice = merge_finished_run.merge(run.path, device="cpu")
    assert set(choice.losses) == {"original", "dequantized"}
    assert AutoConfig.from_pretrained(run.merged).architectures == ["LlavaForConditionalGeneration"]
    for folder in (run.adapter, run.merged):
        assert "AutoModelForMultimodalLM.from_pretrained" in (folder / "README.md").read_text()


@pytest.mark.parametrize("model_type", ["llava", "qwen3_vl"])
def test_rope_scaling_applies_to_the_text_config(model_type: str, whole: Callable[[str], Path]) -> None:
    scaling = {"rope_type": "linear", "factor": 2.0}
    section = ModelSection(model_name_or_path=str(whole(model_type)), rope_scaling=scaling)
    text = model_config(resolve_base(section), section).get_text_config()
    assert text.max_position_embeddings == 512
    assert text.rope_parameters.items() >= scaling.items()
    assert ("mrope_section" in text.rope_parameters) == (model_type == "qwen3_vl")
