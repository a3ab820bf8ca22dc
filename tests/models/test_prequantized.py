"""Releases in FP8 and MXFP4: the NF4 of exactly the weights that they stand for, trained on and merged as any 16-bit base.

The reference decodes each number from its bits by the definition of its format, and multiplies by scales one by one.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_train.config import ModelSection, QuantizationSection
from qlora_train.export.merging.base_checkpoint import BaseCheckpoint
from qlora_train.models import LoadedModel, load_model
from qlora_train.utils.errors import MergeError, ModelError
from tests.support.merging import merge, save_adapter
from tests.support.runs import losses, train_run

Pico = Callable[..., Path]
Tensors = dict[str, torch.Tensor]
WEIGHTS = "model.safetensors"
BLOCK = (48, 40)
"""Divides neither 64 nor 128, so that the last block of each row and column is cut, as in DeepSeek's projections."""
LINEARS = ("proj.weight",)
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
COMPRESSED = {
    "quant_method": "compressed-tensors", "format": "float-quantized",
    "config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}}},
}  # fmt: skip


def decoded(bits: torch.Tensor, exponent_bits: int, mantissa_bits: int) -> torch.Tensor:
    """Return the values of small floating-point numbers, by the definition: sign, biased exponent, mantissa."""
    bits, bias = bits.long(), 2 ** (exponent_bits - 1) - 1
    sign = 1 - 2 * (bits >> (exponent_bits + mantissa_bits)).double()
    exponent = (bits >> mantissa_bits) & (2**exponent_bits - 1)
    fraction = (bits & (2**mantissa_bits - 1)).double() / 2**mantissa_bits
    normal = (1 + fraction) * 2.0 ** (exponent - bias).double()
    return sign * torch.where(exponent == 0, fraction * 2.0 ** (1 - bias), normal)


def fp8(weight: torch.Tensor, block: tuple[int, int], scale_dtype: torch.dtype) -> tuple[Tensors, torch.Tensor]:
    """Return codes and scales of a matrix whose blocks share a scale, and the weights that they stand for."""
    rows, columns = block
    codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    means = torch.empty(weight.shape, dtype=torch.float64)
    scales = torch.empty(-(-weight.shape[0] // rows), -(-weight.shape[1] // columns), dtype=scale_dtype)
    for down in range(scales.shape[0]):
        for across in range(scales.shape[1]):
            place = slice(down * rows, (down + 1) * rows), slice(across * columns, (across + 1) * columns)
            scales[down, across] = weight[place].abs().max() / 448
            scale = scales[down, across].double()
            codes[place] = (weight[place].double() / scale).to(torch.float8_e4m3fn)
            means[place] = decoded(codes[place].view(torch.uint8), 4, 3) * scale
    return {"": codes, "scales": scales}, means


def blocks(weight: torch.Tensor, scale_dtype: torch.dtype = torch.float32) -> tuple[Tensors, torch.Tensor]:
    parts, means = fp8(weight, BLOCK, scale_dtype)
    return {"": parts[""], "_scale_inv": parts["scales"]}, means


def whole(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    parts, means = fp8(weight, tuple(weight.shape), torch.float32)
    return {"": parts[""], "_scale_inv": parts["scales"].reshape(())}, means


def channels(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    parts, means = fp8(weight, (1, weight.shape[1]), torch.bfloat16)
    return {"": parts[""], "_scale": parts["scales"]}, means


def mxfp4(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """Return random codes and scales in the layout of gpt-oss for a stack (experts, in, out), and what they stand for."""
    experts, inside, out = weight.shape
    codes = torch.randint(0, 256, (experts, out, inside // 32, 16), dtype=torch.uint8)
    scales = torch.randint(118, 124, (experts, out, inside // 32), dtype=torch.uint8)
    means = torch.empty(experts, out, inside, dtype=torch.float64)
    for place in range(inside):
        group, byte, shift = place // 32, place % 32 // 2, 4 * (place % 2)
        means[..., place] = decoded((codes[..., group, byte] >> shift) & 15, 2, 1) * 2.0 ** (
            scales[..., group].double() - 127
        )
    return {"_blocks": codes, "_scales": scales}, means.transpose(1, 2)


Store = Callable[[torch.Tensor], tuple[Tensors, torch.Tensor]]


def written(
    base: Path, folder: Path, config: Mapping[str, Any], store: Store, ends: tuple[str, ...]
) -> tuple[Path, Path]:
    """Write a pico base as a release, and the 16-bit base that it stands for; return both."""
    torch.manual_seed(5)
    released, plain = (Path(shutil.copytree(base, folder / name)) for name in ("released", "plain"))
    stored, means = {}, {}
    for name, tensor in load_file(base / WEIGHTS).items():
        stored[name] = means[name] = tensor
        if name.endswith(ends):
            parts, weight = store(tensor.float())
            del stored[name]
            stored |= {name + end: part.contiguous() for end, part in parts.items()}
            means[name] = weight.float().to(torch.bfloat16).contiguous()
    assert len(stored) > len(means)
    if config["quant_method"] == "fp8":  # which may hold what no weight is made of
        stored["model.layers.0.self_attn.q_proj.activation_scale"] = torch.ones(())
    save_file(stored, released / WEIGHTS, metadata={"format": "pt"})
    save_file(means, plain / WEIGHTS, metadata={"format": "pt"})
    content = json.loads((base / "config.json").read_text())
    (released / "config.json").write_text(json.dumps({**content, "quantization_config": config}))
    return released, plain


CASES: dict[str, tuple[str, dict[str, Any], Store, tuple[str, ...]]] = {
    "blocks": ("llama", {**FP8, "weight_block_size": list(BLOCK)}, blocks, LINEARS),
    "blocks with bfloat16 scales": (
        "llama", {**FP8, "weight_block_size": list(BLOCK)}, partial(blocks, scale_dtype=torch.bfloat16), LINEARS,
    ),
    "one scale a tensor": ("llama", FP8, whole, LINEARS),
    "one scale a row": ("llama", {**FP8, "quant_method": "fbgemm_fp8"}, channels, LINEARS),
    "compressed": ("llama", COMPRESSED, channels, LINEARS),
    "experts one by one": ("qwen3_moe", {**FP8, "weight_block_size": list(BLOCK)}, blocks, LINEARS),
    "experts in 4 bits": ("gpt_oss", {"quant_method": "mxfp4"}, mxfp4, ("gate_up_proj", "down_proj")),
}  # fmt: skip


def load(folder: Path, **settings: Any) -> LoadedModel:
    section = QuantizationSection(bnb_4bit_compute_dtype="bfloat16", **settings)
    return load_model(ModelSection(model_name_or_path=str(folder)), section)


def tensors_of(loaded: LoadedModel) -> Tensors:
    """Return all that a model holds: parameters, buffers, and the states of 4-bit layers."""
    model = loaded.model
    return {**dict(model.named_parameters()), **dict(model.named_buffers()), **model.state_dict()}


@pytest.mark.parametrize("in_4bit", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_prequantized_base_loads_as_its_16_bit_weights(
    case: str, in_4bit: bool, pico: Pico, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model_type, config, store, ends = CASES[case]
    released, plain = written(pico(model_type), tmp_path, config, store, ends)
    with caplog.at_level("DEBUG"):
        found = tensors_of(load(released, load_in_4bit=in_4bit))
    assert f"weights: stored in {config['quant_method']}" in caplog.text
    expected = tensors_of(load(plain, load_in_4bit=in_4bit))
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


@pytest.mark.parametrize("merge_base", ["original", "dequantized"])
@pytest.mark.parametrize("case", ["blocks", "experts one by one", "experts in 4 bits"])
def test_prequantized_base_merges_to_16_bits(case: str, merge_base: Any, pico: Pico, tmp_path: Path) -> None:
    model_type, config, store, ends = CASES[case]
    released, plain = written(pico(model_type), tmp_path, config, store, ends)
    adapter = save_adapter(load(plain).model, tmp_path / "adapter", target_modules=["q_proj", "v_proj", "o_proj"])
    merged = {}
    for base in (released, plain):
        merge(
            base, adapter, tmp_path / f"{base.name}-merged",
            merge_base=merge_base, quantization=QuantizationSection(), dtype=torch.bfloat16,
        )  # fmt: skip
        merged[base.name] = load_file(tmp_path / f"{base.name}-merged" / WEIGHTS)
    assert "quantization_config" not in json.loads((tmp_path / "released-merged" / "config.json").read_text())
    assert merged["released"].keys() == merged["plain"].keys()
    assert all(torch.equal(tensor, merged["plain"][name]) for name, tensor in merged["released"].items())


def test_prequantized_base_trains_and_merges(pico_llama: Path, tmp_path: Path) -> None:
    config = {**FP8, "weight_block_size": list(BLOCK)}
    released, _ = written(pico_llama, tmp_path, config, blocks, LINEARS)
    run = train_run(tmp_path, released, "train.max_steps=3", "export.merge=true")
    assert losses(run)[-1] < losses(run)[0]
    stored = load_file(run.merged / WEIGHTS)
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}


def test_e8m0_scales_are_powers_of_two(pico_llama: Path, tmp_path: Path) -> None:
    """Bytes and torch's own type for them are the same numbers."""

    def powers(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        codes = (weight * 64).to(torch.float8_e4m3fn)
        exponents = torch.full((-(-weight.shape[0] // 48), -(-weight.shape[1] // 40)), 121, dtype=torch.uint8)
        return {"": codes, "_scale_inv": exponents}, decoded(codes.view(torch.uint8), 4, 3) / 64

    config = {**FP8, "weight_block_size": list(BLOCK), "scale_fmt": "ue8m0"}
    released, plain = written(pico_llama, tmp_path, config, powers, LINEARS)
    expected = tensors_of(load(plain, load_in_4bit=False))
    for view in (torch.uint8, torch.float8_e8m0fnu):
        stored = load_file(released / WEIGHTS)
        scales = {name: tensor.view(view) for name, tensor in stored.items() if name.endswith("_scale_inv")}
        save_file({**stored, **scales}, released / WEIGHTS, metadata={"format": "pt"})
        found = tensors_of(load(released, load_in_4bit=False))
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_mismatched_scales_are_one_line(pico_llama: Path, tmp_path: Path) -> None:
    config = {**FP8, "weight_block_size": list(BLOCK)}
    released, _ = written(pico_llama, tmp_path, config, blocks, LINEARS)
    whole_file = load_file(released / WEIGHTS)
    scale = "model.layers.1.mlp.up_proj.weight_scale_inv"
    for changed, message in (
        (
            {name: tensor for name, tensor in whole_file.items() if name != scale},
            r"its scales \(\S+up_proj.weight_scale_inv",
        ),
        ({**whole_file, scale: torch.ones(2, 3)}, r"up_proj\.weight: a weight of \(128, 64\) has scales of \(2, 3\)"),
    ):
        save_file(changed, released / WEIGHTS, metadata={"format": "pt"})
        with pytest.raises(ModelError, match=message) as caught:
            load(released)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "config",
    [
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "awq"},
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
        {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {}},
        {**COMPRESSED, "config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "int", "symmetric": True}}}},
    ],
)
def test_other_formats_are_refused_by_load_and_merge(config: Any, pico_llama: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(pico_llama, tmp_path / "base"))
    content = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**content, "quantization_config": config}))
    method = config["quant_method"]
    message = rf"is already quantized with {method}.* which is not supported .*; use the original 16-bit model"
    with pytest.raises(ModelError, match=message):
        load(base)
    with pytest.raises(MergeError, match=message):
        BaseCheckpoint(base)
