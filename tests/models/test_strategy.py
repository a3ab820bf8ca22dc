"""A whole base per process where it fits with its training state on every device, a part of it where it does not."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qlora_train.models import load_model, resolve_base
from qlora_train.models.strategy import (
    DeviceNeeds,
    Strategy,
    choose_strategy,
    device_needs,
    strategy_of_run,
    unsupported_by_fsdp,
)
from tests.support.runs import make_config

GB = 10**9
LLAMA_70B = {"base_bytes": 39.5 * GB, "state_bytes": 3.3 * GB}


@pytest.mark.parametrize(
    ("device_bytes", "expected"),
    [(24 * GB, "fsdp"), (48 * GB, "fsdp"), (61 * GB, "fsdp"), (62 * GB, "ddp"), (80 * GB, "ddp")],
)
def test_auto_holds_a_whole_base_where_it_leaves_room(device_bytes: float, expected: Strategy) -> None:
    assert choose_strategy("auto", 2, DeviceNeeds(**LLAMA_70B, device_bytes=device_bytes)) == expected


def test_one_process_and_set_strategies_are_kept() -> None:
    small, large = (DeviceNeeds(**LLAMA_70B, device_bytes=size * GB) for size in (24, 80))
    assert choose_strategy("auto", 1, small) == choose_strategy("fsdp", 1, small) == "none"
    assert choose_strategy("ddp", 2, small) == "ddp"
    assert choose_strategy("fsdp", 2, large) == "fsdp"


@pytest.mark.parametrize(("size", "expected"), [(24, "fsdp"), (48, "ddp"), (80, "ddp")])
def test_auto_does_not_choose_what_fsdp_refuses_while_the_base_fits(size: int, expected: Strategy) -> None:
    needs = DeviceNeeds(**LLAMA_70B, device_bytes=size * GB)
    assert choose_strategy("auto", 2, needs, can_shard=False) == expected


@pytest.mark.parametrize("refused", ["quantization.load_in_4bit=false", "lora.use_dora=true"])
def test_fsdp_supports_the_defaults_only(refused: str, pico_llama: Path, tmp_path: Path) -> None:
    configs = [make_config(tmp_path, pico_llama, *overrides) for overrides in ((), (refused,))]
    default, other = (unsupported_by_fsdp(config, resolve_base(config.model)) for config in configs)
    assert not default
    assert other == refused.replace("=", ": ")


def test_auto_knows_which_torch_fsdp_needs(pico_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(tmp_path, pico_llama)
    monkeypatch.setattr(torch, "__version__", "2.11.1")
    assert unsupported_by_fsdp(config, resolve_base(config.model)) == "torch 2.11.1"


@pytest.mark.parametrize("setting", ["ddp", "fsdp"])
def test_a_strategy_that_one_process_cannot_follow_is_a_warning(
    setting: str, pico_llama: Path, tmp_path: Path, messages: pytest.LogCaptureFixture
) -> None:
    config = make_config(tmp_path, pico_llama, f"parallel.strategy={setting}")
    assert strategy_of_run(config, resolve_base(config.model), torch.device("cpu")) == "none"
    (record,) = [record for record in messages.records if record.levelname == "WARNING"]
    assert record.getMessage().startswith(f"parallel.strategy: {setting} has no effect (one process")


def test_a_base_that_trains_in_parts_may_fit_whole_without_training() -> None:
    assert not DeviceNeeds(**LLAMA_70B, device_bytes=24 * GB).base_fits
    needs = DeviceNeeds(**LLAMA_70B, device_bytes=48 * GB)
    assert needs.base_fits
    assert not needs.fits


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "mixtral"])
@pytest.mark.parametrize("double_quant", [True, False])
def test_estimated_bytes_are_those_of_a_loaded_base(
    model_type: str, double_quant: bool, pico: Callable[..., Path], tmp_path: Path
) -> None:
    base = pico(model_type, hidden_size=256, intermediate_size=512)
    settings = (
        f"quantization.bnb_4bit_use_double_quant={double_quant}",
        "quantization.bnb_4bit_compute_dtype=bfloat16",
    )
    config = make_config(tmp_path, base, *settings)
    summary = load_model(config.model, config.quantization).quantization_summary
    needs = device_needs(config, resolve_base(config.model), 1.0)
    assert needs.base_bytes == pytest.approx(summary.total_bytes - summary.table_bytes, rel=0.03)
