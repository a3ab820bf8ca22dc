"""Conversions that Transformers does while it loads: what can be undone is, what cannot is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, conversion_mapping
from transformers.core_model_loading import Chunk, ConversionOps, Transpose, WeightConverter, revert_weight_conversion

from qlora_train.export.merging.meta_model import build_meta_model
from qlora_train.export.merging.tensor_layout import NameMapping, check_reversible, group_tensors
from qlora_train.utils.errors import MergeError
from tests.support.merging import Tensors, logits, merged_logits, plain, save_adapter, tensor_shapes, with_tensors


@pytest.mark.parametrize(
    "model_type",
    ["ernie4_5_moe", "glm4_moe", "jamba", "longcat_flash", "minimax_m2", "nemotron_h", "olmo_hybrid", "phimoe"],
)
def test_every_saved_tensor_is_mapped_and_written_back(model_type: str) -> None:
    """Names and shapes of models of full size; no weights."""
    meta_model = build_meta_model(AutoConfig.for_model(model_type))
    saved = revert_weight_conversion(meta_model.model, dict(meta_model.model.state_dict()))
    shapes = {name: tuple(tensor.shape) for name, tensor in saved.items()}
    assert shapes.keys() != meta_model.shapes.keys(), "the file's names are the model's, which proves nothing"
    names = NameMapping(meta_model.model)
    groups = group_tensors(names, shapes)
    assert {parameter for group in groups for parameter in group.parameters} == meta_model.shapes.keys()
    for group in groups:
        check_reversible(group, names, shapes)


def converting(monkeypatch: pytest.MonkeyPatch, converter: WeightConverter) -> None:
    """Give Llama a converter of its own, which Transformers uses for loading too."""
    conversion_mapping.get_checkpoint_conversion_mapping("llama")  # fills the table
    monkeypatch.setitem(conversion_mapping._checkpoint_conversion_mapping_cache, "LlamaForCausalLM", [converter])


@pytest.mark.parametrize("merge_base", ["original", "dequantized"])
def test_one_tensor_that_makes_several_parameters_is_written_as_one(
    pico_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, merge_base: str
) -> None:
    adapter = save_adapter(plain(pico_llama), tmp_path / "adapter", target_modules=["up_proj", "q_proj"])
    settings = {"merge_base": merge_base, "load_dtype": torch.bfloat16}
    expected = merged_logits(pico_llama, adapter, tmp_path / "apart", **settings)

    def fused(tensors: Tensors) -> Tensors:
        for layer in range(2):
            names = [f"model.layers.{layer}.mlp.{part}_proj.weight" for part in ("gate", "up")]
            tensors[f"model.layers.{layer}.mlp.gate_up.weight"] = torch.cat([tensors.pop(name) for name in names])
        return tensors

    parts = ["mlp.gate_proj.weight", "mlp.up_proj.weight"]
    converting(monkeypatch, WeightConverter("mlp.gate_up.weight", parts, [Chunk(0)]))
    base = with_tensors(pico_llama, tmp_path / "base", fused)
    got = merged_logits(base, adapter, tmp_path / "merged", **settings)
    torch.testing.assert_close(got, expected, atol=0, rtol=0)
    assert tensor_shapes(tmp_path / "merged") == tensor_shapes(base)


class Halved(ConversionOps):
    """A conversion that loses the last bits of what it takes."""

    def convert(self, input_dict: dict[str, Any], target_patterns: list[str], **_: Any) -> dict[str, Any]:
        return {target_patterns[0]: next(iter(input_dict.values()))[0].to(torch.float8_e5m2).to(torch.bfloat16)}

    @property
    def reverse_op(self) -> ConversionOps:
        return Halved()


class OneWay(Halved):
    """A conversion that nobody wrote the reverse of."""

    @property
    def reverse_op(self) -> ConversionOps:
        raise NotImplementedError("no way back")


@pytest.mark.parametrize(
    ("operation", "message"),
    [
        (
            Transpose(0, 1, check_dims=True),
            r"cannot be written back: .*down_proj.weight is \(128, 64\) and would be \(64, 128\)",
        ),
        (OneWay(), r"cannot be written back: NotImplementedError\('no way back'\); use the adapter unmerged"),
        (Halved(), r"down_proj.weight: Transformers' conversion to .*down_proj.weight is not reversible exactly"),
    ],
    ids=["transposed when shapes ask for it", "no way back", "lossy"],
)
def test_irreversible_conversion_is_refused(
    pico_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: ConversionOps, message: str
) -> None:
    adapter = save_adapter(plain(pico_llama), tmp_path / "adapter")

    def transposed(tensors: Tensors) -> Tensors:
        wants = isinstance(operation, Transpose)
        return {name: t.T.contiguous() if wants and "down_proj" in name else t for name, t in tensors.items()}

    base = with_tensors(pico_llama, tmp_path / "base", transposed)
    converting(monkeypatch, WeightConverter("mlp.down_proj.weight", "mlp.down_proj.weight", [operation]))
    assert logits(AutoModelForCausalLM.from_pretrained(base)).isfinite().all(), "Transformers reads it"
    with pytest.raises(MergeError, match=message):
        merged_logits(base, adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
