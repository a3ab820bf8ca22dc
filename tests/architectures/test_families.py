"""Every family of the architecture table: load -> quantize -> adapter -> steps -> packing -> resume -> merge -> reload.

A merged model is plain Transformers code on plain 16-bit weights: that its logits are those of the adapter on the 4-bit
base says that loading, the experts' own arithmetic, the adapter and the merge all compute the same model.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qlora_train.adapters import load_trained
from qlora_train.architectures import ARCHITECTURES, check_packing
from qlora_train.models import load_model, resolve_base
from qlora_train.models.moe import expert_parameters
from qlora_train.planning.meta_shapes import meta_shapes
from qlora_train.planning.model_shape import packed_bytes, quantization_constants_bytes
from qlora_train.runs import RunFolder
from qlora_train.utils.errors import ConfigError
from tests.architectures.conftest import LONG, Table
from tests.support.merging import merge
from tests.support.pico import build_pico
from tests.support.runs import adapter_bytes, losses, make_config, stopped_copy, train_run

SETTINGS = ("quantization.bnb_4bit_compute_dtype=float32", "train.max_steps=5", "train.save_steps=2", "data.eval=0.25")
SHORT = ("llama", "gemma2", "gpt2", "falcon", "mixtral", "gpt_oss", "deepseek_v3", "jetmoe", "jamba", "qwen3_next")
"""Families whose resume is tested by default."""
MIXTURES = 29
"""Number of families with experts."""


@pytest.fixture(scope="module")
def straight(pico: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], RunFolder]:
    """`straight(model_type)` trains a family, once."""

    @cache
    def train(model_type: str) -> RunFolder:
        return train_run(tmp_path_factory.mktemp(model_type), pico(model_type), *SETTINGS, name="straight")

    return train


@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_family_trains_in_4_bits_and_merges_to_the_same_model(
    model_type: str, pico: Callable[..., Path], straight: Callable[[str], RunFolder], tmp_path: Path, table: Table
) -> None:
    base, row, run = pico(model_type), ARCHITECTURES[model_type], straight(model_type)
    assert losses(run)[-1] < losses(run)[0] - 0.05
    table[model_type]["loss"] = f"{losses(run)[0]:.2f} -> {losses(run)[-1]:.2f}"

    config = make_config(tmp_path, base, *SETTINGS, name="straight")
    loaded = load_model(config.model, config.quantization)
    assert loaded.architecture is row
    assert loaded.quantization_summary.quantized_share > 0.95
    experts = expert_parameters(loaded.model)
    assert not [name for name in loaded.quantization_summary.unquantized if name.split(" ")[0] in experts]
    planned = meta_shapes(loaded.model.config.to_dict(), config.lora)
    found = loaded.quantization_summary.weight_bytes + loaded.quantization_summary.table_bytes
    assert packed_bytes(planned) + quantization_constants_bytes(planned, double_quant=True) == found
    table[model_type]["4 bits"] = f"{100 * loaded.quantization_summary.quantized_share:.1f} %"
    table[model_type]["experts in 4 bits"] = "100 %" if experts else "no experts"

    adapted = load_trained(loaded, run.adapter)
    assert 4 * sum(rows * columns for rows, columns in planned.adapter_shapes(config.lora.r)) == sum(
        tensor.nbytes for tensor in load_file(run.adapter / "adapter_model.safetensors").values()
    )
    merge(
        resolve_base(config.model).folder,
        run.adapter,
        tmp_path / "merged",
        merge_base="dequantized",
        quantization=config.quantization,
        dtype=torch.float32,
    )
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    ids = torch.arange(40).reshape(2, 20) * 3 + 5
    with torch.no_grad():
        wanted, found = (model(input_ids=ids, use_cache=False).logits for model in (adapted, merged))
        with adapted.disable_adapter():
            untrained = adapted(input_ids=ids, use_cache=False).logits
    assert (wanted - untrained).abs().max() > 0.01, "the adapter changes nothing"
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=2e-4)
    table[model_type]["merged"] = f"equal ({float((found - wanted).abs().max()):.0e})"


@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES) if LONG else SHORT)
def test_stopped_run_resumes_bitwise(
    model_type: str, pico: Callable[..., Path], straight: Callable[[str], RunFolder], table: Table
) -> None:
    run = straight(model_type)
    stopped_copy(run, run.path.with_name("stopped"))
    resumed = train_run(run.path.parent, pico(model_type), *SETTINGS, name="stopped")
    assert adapter_bytes(resumed) == adapter_bytes(run)
    table[model_type]["resumed"] = "same bits"


@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_family_packs_or_names_the_reason(
    model_type: str, pico: Callable[..., Path], tmp_path: Path, table: Table
) -> None:
    """The losses and gradients of packs are compared in tests/training/test_packed_training.py."""
    row = ARCHITECTURES[model_type]
    if row.packing_error:
        with pytest.raises(ConfigError, match="packed documents would attend to each other"):
            check_packing(row)
    elif LONG:
        run = train_run(tmp_path, pico(model_type), *SETTINGS, "data.packing=true")
        assert losses(run)[-1] < losses(run)[0]
    table[model_type]["packed"] = f"refused: {row.packing_error}" if row.packing_error else "isolated"


def test_families_with_experts_have_experts(pico: Callable[..., Path]) -> None:
    found = []
    for model_type in ARCHITECTURES:
        model = AutoModelForCausalLM.from_pretrained(pico(model_type))
        found += [model_type] if expert_parameters(model) else []
    assert len(found) == MIXTURES, found


def test_unknown_type_trains_on_the_generic_row_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = build_pico(tmp_path / "base", "bitnet")
    with caplog.at_level("WARNING"):
        run = train_run(tmp_path, base, *SETTINGS)
    assert losses(run)[-1] < losses(run)[0]
    warnings = [record.getMessage() for record in caplog.records if "bitnet" in record.getMessage()]
    assert len(warnings) == 1, warnings
