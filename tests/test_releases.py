"""Releases in 8 and 4 bits: what is loaded is the NF4 of the 16-bit weights that the format's definition gives."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from safetensors.torch import load_file, save_file

from qlora_train.errors import ConfigError, ModelError
from qlora_train.loader import load_model
from qlora_train.loader.experts import expert_parameters
from tests.runs import losses, make_config, train_run

Pico = Callable[..., Path]
BLOCK = 32
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
FP8 = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK], "activation_scheme": "dynamic"}


def stored_as(base: Path, folder: Path, tensors: dict[str, torch.Tensor], quantization: dict[str, Any] | None) -> Path:
    """Copy a base with other tensors, and what config.json says of them."""
    shutil.copytree(base, folder)
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    config = json.loads((folder / "config.json").read_text())
    if quantization is not None:
        config["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def in_fp8(base: Path, folder: Path) -> tuple[Path, Path]:
    """Return a base as it would be released in FP8, and the 16-bit base that this stands for."""
    released, plain = {}, {}
    for name, tensor in load_file(base / "model.safetensors").items():
        if "proj" not in name:
            released[name] = plain[name] = tensor
            continue
        rows, columns = tensor.shape
        codes = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
        scales = torch.empty(-(-rows // BLOCK), -(-columns // BLOCK))
        weight = torch.empty(rows, columns)
        for i in range(scales.shape[0]):
            for j in range(scales.shape[1]):
                part = (slice(BLOCK * i, BLOCK * (i + 1)), slice(BLOCK * j, BLOCK * (j + 1)))
                scales[i, j] = tensor[part].abs().max().float() / 448
                codes[part] = (tensor[part].float() / scales[i, j]).to(torch.float8_e4m3fn)
                weight[part] = codes[part].float() * scales[i, j]
        released |= {name: codes, f"{name}_scale_inv": scales}
        plain[name] = weight.to(torch.bfloat16)
    return stored_as(base, folder / "fp8", released, FP8), stored_as(base, folder / "plain", plain, None)


def in_mxfp4(base: Path, folder: Path) -> tuple[Path, Path]:
    """The same for experts in MXFP4, from random codes."""
    generator = torch.Generator().manual_seed(0)
    released, plain = {}, {}
    for name, tensor in load_file(base / "model.safetensors").items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            released[name] = plain[name] = tensor
            continue
        experts, columns, rows = tensor.shape
        blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), dtype=torch.uint8, generator=generator)
        scales = torch.randint(120, 126, (experts, rows, columns // 32), dtype=torch.uint8, generator=generator)
        weight = torch.empty(tensor.shape)
        for expert, row, group, pair in torch.cartesian_prod(*map(torch.arange, blocks.shape)).tolist():
            byte = int(blocks[expert, row, group, pair])
            for place, code in enumerate((byte & 15, byte >> 4)):
                value = E2M1[code & 7] * (-1) ** (code >> 3) * 2.0 ** (int(scales[expert, row, group]) - 127)
                weight[expert, 32 * group + 2 * pair + place, row] = value
        released |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        plain[name] = weight.to(torch.bfloat16)
    return (
        stored_as(base, folder / "mxfp4", released, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}),
        stored_as(base, folder / "plain", plain, None),
    )


def weights_of(folder: Path, base: Path) -> dict[str, torch.Tensor]:
    """Return every weight of a base as it is computed with."""
    config = make_config(folder, base, "quantization.bnb_4bit_compute_dtype=bfloat16")
    model: Any = load_model(config.model, config.quantization).model
    found = {name: parameter.data for name, parameter in model.named_parameters() if parameter.is_floating_point()}
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit):
            found[f"{name}.weight"] = dequantize_4bit(module.weight.data, module.weight.quant_state)
    for name, module in expert_parameters(model).items():
        found[name] = getattr(module, name.rpartition(".")[2])
    return found


@pytest.mark.parametrize(("model_type", "store"), [("llama", in_fp8), ("qwen3_moe", in_fp8), ("gpt_oss", in_mxfp4)])
def test_what_is_loaded_is_the_nf4_of_the_weights_it_stands_for(
    model_type: str, store: Callable[[Path, Path], tuple[Path, Path]], pico: Pico, tmp_path: Path
) -> None:
    released, plain = store(pico(model_type), tmp_path)
    found, wanted = weights_of(tmp_path, released), weights_of(tmp_path, plain)
    assert found.keys() == wanted.keys()
    for name, weight in wanted.items():
        assert torch.equal(found[name], weight), name


def test_it_trains_and_its_merge_is_refused_in_one_line(pico_llama: Path, tmp_path: Path) -> None:
    released, _ = in_fp8(pico_llama, tmp_path)
    run = train_run(tmp_path, released, "train.max_steps=3")
    assert losses(run)[-1] < losses(run)[0]
    with pytest.raises(
        ConfigError,
        match=r"export\.merge: true, but .*fp8 is stored in fp8, which a merge does not",
    ):
        train_run(tmp_path, released, "train.max_steps=3", "export.merge=true", name="merged")


def test_codes_without_scales_and_other_formats_are_refused(pico_llama: Path, tmp_path: Path) -> None:
    released, _ = in_fp8(pico_llama, tmp_path)
    tensors = load_file(released / "model.safetensors")
    bare = {name: tensor for name, tensor in tensors.items() if not name.endswith("q_proj.weight_scale_inv")}
    config = make_config(tmp_path, stored_as(pico_llama, tmp_path / "bare", bare, FP8))
    with pytest.raises(
        ModelError, match=r"bare: .*q_proj\.weight is stored in 8 bits \(fp8\), and its scales .* not there"
    ):
        load_model(config.model, config.quantization)
    config = make_config(tmp_path, stored_as(pico_llama, tmp_path / "gptq", tensors, {"quant_method": "gptq"}))
    with pytest.raises(ModelError, match="quantised already with gptq, which is not read"):
        load_model(config.model, config.quantization)
