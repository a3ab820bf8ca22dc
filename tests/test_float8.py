"""Forward products in float8: the numbers, and runs that ask for them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_train.errors import ConfigError, TrainingError
from qlora_train.kernels import float8, groups
from qlora_train.kernels.float8 import in_float8, product
from qlora_train.trainer import float8 as asked
from qlora_train.trainer.gradients import Bounds
from tests.runs import adapter_bytes, losses, stopped_copy, train_run

BFLOAT16 = "quantization.bnb_4bit_compute_dtype=bfloat16"
SETTINGS = (BFLOAT16, "train.max_steps=3", "train.save_steps=1", "train.fp8=true")


NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def e4m3_values() -> torch.Tensor:
    """Return what 8 bits can be by the format's definition: 4 bits of exponent around 7, 3 of mantissa, no infinity."""
    small = [mantissa / 8 * 2.0**-6 for mantissa in range(8)]
    large = [(1 + mantissa / 8) * 2.0 ** (exponent - 7) for exponent in range(1, 16) for mantissa in range(8)]
    magnitudes = torch.tensor(small + large[:-1], dtype=torch.float64)  # the last pattern is not a number
    return torch.cat([-magnitudes.flip(0), magnitudes])


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_numbers_are_rounded_to_the_nearest_and_rows_have_scales_of_their_own(size: float) -> None:
    x = torch.randn(5, 48, generator=torch.Generator().manual_seed(0)) * size * torch.logspace(-3, 3, 5)[:, None]
    x[3] = 0
    numbers, scales = in_float8(x.bfloat16())
    exact = x.bfloat16().double()
    assert torch.equal(numbers.double().abs().amax(1), torch.tensor([448.0, 448, 448, 0, 448], dtype=torch.float64))
    nearest = (exact[..., None] / scales.double()[..., None] - e4m3_values()).abs().amin(-1)
    torch.testing.assert_close((exact / scales.double() - numbers.double()).abs(), nearest, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NEEDS_GPU])])
def test_a_product_is_that_of_the_rounded_numbers(device: str) -> None:
    if device == "cuda" and float8.why_not_on(torch.device(device)):
        pytest.skip("this GPU has no such products")
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(7, 32, generator=generator) * torch.logspace(-2, 2, 7)[:, None]).bfloat16()
    weight = torch.randn(48, 32, generator=generator).bfloat16()
    (a, a_scales), (b, b_scales) = in_float8(x), in_float8(weight)
    wanted = (a.double() * a_scales.double()) @ (b.double() * b_scales.double()).T
    found = product(in_float8(x.to(device)), in_float8(weight.to(device))).cpu()
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), wanted, rtol=0.01, atol=1e-3)
    exact = x.double() @ weight.double().T
    assert 0.005 < float((found.double() - exact).norm() / exact.norm()) < float8.TOLERANCE


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])  # the second has biases
def test_run_says_what_it_changes_and_trains(
    model_type: str, pico: Callable[..., Path], tmp_path: Path, messages: Any
) -> None:
    base = pico(model_type)
    run = train_run(tmp_path, base, *SETTINGS, name="fp8")
    assert "fp8: forward products of 14 of 14 adapted layers; loss of the first rows" in messages.text
    plain = train_run(tmp_path, base, *SETTINGS[:-1], name="plain")
    assert losses(run) == pytest.approx(losses(plain), rel=0.05)
    assert losses(run) != losses(plain)


def test_a_loss_that_changes_much_is_a_warning(
    pico_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, messages: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(asked, "MUCH", 0)
    train_run(tmp_path, pico_llama, *SETTINGS)
    [line] = [record for record in messages.records if record.getMessage().startswith("fp8: ")]
    assert line.levelname == "WARNING"
    assert line.getMessage().endswith("; that is much: compare eval_loss with a run without train.fp8")


def test_neither_kept_weights_nor_a_stop_change_a_bit(pico_llama: Path, tmp_path: Path) -> None:
    kept = train_run(tmp_path, pico_llama, *SETTINGS, name="kept")
    none = train_run(tmp_path, pico_llama, *SETTINGS, "train.dequantized_cache_gb=0", name="none")
    assert adapter_bytes(kept) == adapter_bytes(none)
    stopped_copy(kept, tmp_path / "stopped")
    assert adapter_bytes(train_run(tmp_path, pico_llama, *SETTINGS, name="stopped")) == adapter_bytes(kept)


def test_where_it_cannot_be_had_a_run_ends_with_one_line(
    pico_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"fp8=true: true needs fast_path: true; set one of them otherwise"):
        train_run(tmp_path, pico_llama, *SETTINGS, "train.fast_path=false", name="plain")
    with pytest.raises(TrainingError, match=r"^train\.fp8: no adapted layer of this model computes in bfloat16"):
        train_run(tmp_path, pico_llama, *SETTINGS, "quantization.bnb_4bit_compute_dtype=float32", name="float32")
    monkeypatch.setattr(asked, "BOUNDS", Bounds(0, 0, 0))
    with pytest.raises(
        TrainingError, match=r"^train\.fp8: it computes something else .*; allowed: 0, 0 and 0; set it to"
    ):
        train_run(tmp_path, pico_llama, *SETTINGS, name="far")
    with monkeypatch.context() as broken:
        broken.setattr(groups, "lora_linears", lambda *_: None)
        with pytest.raises(
            TrainingError, match=r"^train\.fp8: this model is not on the fast path, for the reason above"
        ):
            train_run(tmp_path, pico_llama, *SETTINGS, name="off")

    def fails(*_arguments: Any, **_keywords: Any) -> None:
        raise RuntimeError("torch.scaled_mm is only supported on CUDA devices with compute capability >= 9.0\nstack")

    monkeypatch.setattr(float8, "scaled_mm", fails)
    float8.why_not_on.cache_clear()
    try:
        with pytest.raises(
            TrainingError, match=r"^train\.fp8: cpu does not multiply float8 .* >= 9\.0\); set it to false$"
        ):
            train_run(tmp_path, pico_llama, *SETTINGS, name="old")
    finally:
        float8.why_not_on.cache_clear()
