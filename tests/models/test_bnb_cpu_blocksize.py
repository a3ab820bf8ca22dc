"""4-bit weights whose rows are no whole number of blocks: computed, trained and merged as they are stored."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import quantize_4bit
from bitsandbytes.nn import Linear4bit
from transformers import AutoModelForCausalLM

from qlora_train.kernels.install import install
from qlora_train.kernels.ops.dequantize import dequantize
from qlora_train.objectives.label_losses import label_losses
from qlora_train.training.parity.gradients import compare_gradients, gradients_of
from tests.support import nf4_reference
from tests.support.runs import adapted_model, train_run

Pico = Callable[..., Path]
IDS = torch.arange(60).reshape(3, 20) * 5 % 300 + 4
EXACT = "quantization.bnb_4bit_compute_dtype=float32"


def stored(weight: torch.Tensor) -> torch.Tensor:
    """Return a weight as 4 bits hold it, by the definition."""
    codes, absmax = nf4_reference.quantize_4bit(weight)
    absmax = nf4_reference.double_dequantize(nf4_reference.double_quantize(absmax))
    return nf4_reference.dequantize_4bit(codes, absmax, weight.shape)


@pytest.mark.parametrize("shape", [(4, 96), (5, 32), (576, 160), (3, 50), (130, 130), (64, 128)])
@pytest.mark.parametrize("nested", [False, True])
def test_weights_of_any_shape_dequantize_as_stored(shape: tuple[int, int], nested: bool) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    packed, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=nested)
    codes, absmax = nf4_reference.quantize_4bit(weight)
    if nested:
        absmax = nf4_reference.double_dequantize(nf4_reference.double_quantize(absmax))
    wanted = nf4_reference.dequantize_4bit(codes, absmax, weight.shape)
    torch.testing.assert_close(dequantize(packed, state, torch.float32), wanted, rtol=0, atol=1e-3)


@pytest.mark.parametrize("fast", [False, True])
def test_model_with_partial_blocks_matches_its_dequantized_weights(fast: bool, pico: Pico, tmp_path: Path) -> None:
    base = pico("llama", intermediate_size=96)
    adapted = adapted_model(tmp_path, base)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    quantized = {name for name, module in adapted.model.named_modules() if isinstance(module, Linear4bit)}
    for name, module in plain.named_modules():
        if f"base_model.model.{name}.base_layer" in quantized:
            module.weight.data = stored(module.weight.data)
    with torch.no_grad(), adapted.model.disable_adapter():
        found = adapted.model(input_ids=IDS).logits
        torch.testing.assert_close(found, plain(input_ids=IDS).logits, rtol=1e-3, atol=1e-3)
    whole = adapted_model(tmp_path / "whole", base, "quantization.load_in_4bit=false")
    for name, module in whole.model.named_modules():
        if name in quantized:
            module.weight.data = stored(module.weight.data.float()).to(module.weight.dtype)
    batch = {"input_ids": IDS, "labels": IDS}
    wanted = gradients_of(whole, batch)
    if fast:
        install(adapted.model, lambda: label_losses(adapted.model, **batch))
    assert compare_gradients(wanted, gradients_of(adapted, batch)).gradient < 1e-2


def test_merge_of_partial_blocks_matches_the_trained_model(pico: Pico, tmp_path: Path) -> None:
    run = train_run(
        tmp_path, pico("llama", intermediate_size=96), EXACT, "export.merge=true", "export.merge_base=dequantized",
        "export.max_divergence=0.001",
    )  # fmt: skip
    assert (run.path / "merged" / "config.json").is_file()
