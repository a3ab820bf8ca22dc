"""A plan is a promise: runs keep what they predicted beside what they measured, and later plans quote it."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))  # scripts import their neighbours

import bench_plan
import torch

from qlora_train.cli.main import main
from qlora_train.config import load_config
from qlora_train.models.hardware import choose_compute_dtype
from qlora_train.planning import promise
from qlora_train.planning.base_config import well_known_models
from qlora_train.planning.cheapest_change import cheapest_change
from qlora_train.planning.plan_device import cpu_name, has_avx512, plan_device
from qlora_train.planning.plan_text import duration, plan_lines
from qlora_train.planning.run_history import earlier_runs, error_bar, predict_seconds
from qlora_train.planning.run_plan import RunPlan, plan_run
from qlora_train.planning.workload import RowSizes
from qlora_train.runs import RunFolder
from qlora_train.utils import memory_meter
from qlora_train.utils.memory_meter import MemoryMeter
from tests.support.runs import train_run

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def finished(pico_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return train_run(tmp_path_factory.mktemp("runs"), pico_llama, "train.max_steps=3", "train.save_steps=2")


def test_run_keeps_its_plan_and_what_it_measured(finished: RunFolder) -> None:
    plan, kept = json.loads(finished.plan_file.read_text()), finished.read_results()["plan"]
    assert sum(plan["parts"].values()) == plan["peak_bytes"] == kept["predicted_peak_bytes"]
    assert (plan["num_steps"], plan["device"], plan["seconds"]) == (3, cpu_name(), None)
    assert kept["measured_peak_bytes"] > 0
    training = finished.read_results()["training"]
    assert 0 < kept["measured_seconds"] == training["step_seconds"] < training["train_seconds"]
    assert plan["disk_bytes"] >= sum(file.stat().st_size for file in finished.adapter.iterdir())


def test_run_without_a_plan_goes_on(
    pico_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_arguments: Any, **_keywords: Any) -> RunPlan:
        raise RuntimeError("a family that nobody has seen")

    monkeypatch.setattr(promise, "plan_run", fails)
    run = train_run(tmp_path, pico_llama, "train.max_steps=1")
    assert run.is_finished()
    assert not run.plan_file.exists()
    assert run.read_results()["plan"]["predicted_peak_bytes"] is None
    assert "plan: none (a family that nobody has seen)" in caplog.messages


def write_run(folder: Path, *, device: str, ratio: float, seconds: float | None) -> None:
    folder.mkdir(parents=True)
    (folder / "plan.json").write_text(json.dumps({"device": device, "operations": 5e9}))
    kept = {"predicted_peak_bytes": 1000, "measured_peak_bytes": round(1000 * ratio), "measured_seconds": seconds}
    (folder / "results.json").write_text(json.dumps({"plan": kept}))


def test_error_bar_and_speed_are_those_of_runs_on_this_device(tmp_path: Path) -> None:
    for name, device, ratio, seconds in (
        ("a", "ours", 0.9, 10.0), ("b", "ours", 1.02, 20.0), ("c", "ours", 0.95, None), ("d", "theirs", 3.0, 1.0),
    ):  # fmt: skip
        write_run(tmp_path / name, device=device, ratio=ratio, seconds=seconds)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "results.json").write_text("{")
    write_run(tmp_path / "not a number", device="ours", ratio=0.95, seconds=float("nan"))
    runs = earlier_runs(tmp_path, "ours", besides=tmp_path / "e")
    assert error_bar(runs) == "median 0.95, at most 1.02 of the plan (4 runs here)"
    assert error_bar([]) == ""
    assert sorted(run.operations / run.seconds for run in runs if run.seconds) == [2.5e8, 5e8]


def plan_of(path: Path, memory: str, *overrides: str) -> RunPlan:
    config = load_config(path, [*overrides])
    base = well_known_models()[config.model.model_name_or_path]
    return plan_run(config, base, plan_device(memory), RowSizes.most(config))


def test_time_is_unknown_without_a_measurement_and_grows_with_tokens(tmp_path: Path) -> None:
    write_run(tmp_path / "a", device="ours", ratio=1.0, seconds=10.0)
    runs = earlier_runs(tmp_path, "ours")
    config = load_config(ROOT / "configs" / "llama7b.yaml")
    base = well_known_models()[config.model.model_name_or_path]
    sizes = [RowSizes(rows, 100 * rows, 200, 200, 3200, 3200, 200, 0, varies=True) for rows in (1600, 3200)]
    plans = [plan_run(config, base, plan_device("24GiB"), each) for each in sizes]
    assert all(predict_seconds(plan, []).seconds is None for plan in plans)
    one, two = (predict_seconds(plan, runs).seconds for plan in plans)
    assert one is not None
    assert two == pytest.approx(2 * one)


@pytest.mark.parametrize(
    ("name", "memory", "changes"),
    [
        ("llama7b", "8GiB", {"train.per_device_train_batch_size": 2, "train.gradient_accumulation_steps": 8}),
        ("qwen3-30b-a3b", "16GiB", {"parallel.strategy": "fsdp", "parallel.processes": 2}),
    ],
)
def test_cheapest_change_fits_and_every_part_of_it_is_needed(name: str, memory: str, changes: dict[str, Any]) -> None:
    path, device = ROOT / "configs" / f"{name}.yaml", plan_device(memory)
    config = load_config(path)
    base = well_known_models()[config.model.model_name_or_path]
    found = cheapest_change(config, lambda tried: plan_run(tried, base, device, RowSizes.most(tried)))
    assert found is not None
    assert found.changes == changes
    assert not plan_of(path, memory).fitted.fits
    assert plan_of(path, memory, *(f"{key}={value}" for key, value in changes.items())).fitted.fits, "as overrides"
    assert found.yaml_lines()[0] == f"{next(iter(changes)).partition('.')[0]}:"
    lines = plan_lines(plan_of(path, memory), "base", "table", ["data", "earlier", "to fit", *found.yaml_lines()])
    assert len(lines) <= 24


def test_nothing_helps_where_the_weights_alone_are_too_large(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(ROOT / "configs" / "llama70b.yaml"), "--memory", "4GiB"]) == 3
    assert "no setting is left; use a smaller model or a larger GPU" in capsys.readouterr().out


def test_dtype_without_torch_is_the_one_that_a_run_chooses() -> None:
    chosen = choose_compute_dtype("auto", torch.device("cpu"))
    assert chosen.itemsize == (2 if has_avx512() else 4)


def test_meter_sees_memory_that_is_gone() -> None:
    meter = MemoryMeter(torch.device("cpu"))
    before = meter.peak_bytes()
    torch.ones(100_000_000 // 4)
    assert meter.peak_bytes() - before == pytest.approx(100e6, rel=0.05)


def test_peak_of_a_real_run_is_the_planned_one() -> None:
    """One of the cases of benchmarks/results/plan-measured.txt, on a model of 40 MB."""
    case = bench_plan.Case("llama", bench_plan.SHORT)
    _, kept = bench_plan.measured(case)
    assert 0.97 <= kept["predicted_peak_bytes"] / kept["measured_peak_bytes"] <= 1.10


def test_a_kernel_that_tells_no_peak_is_measured_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in gVisor, whose status has neither a peak nor one form for every line."""
    status = tmp_path / "status"
    status.write_text("Name:\tpython\nVmRSS:\t4096 kB\nno colon\n")
    monkeypatch.setattr(memory_meter, "STATUS", status)
    meter = MemoryMeter(torch.device("cpu"))
    kept = bytearray(b"x") * (64 << 20)
    assert meter.peak_bytes() >= 0.9 * len(kept)


def test_a_reference_pass_is_half_of_an_epoch_or_half_of_every_step(tmp_path: Path) -> None:
    """A forward pass costs half of a forward and backward pass over frozen weights."""
    write_run(tmp_path / "a", device="ours", ratio=1.0, seconds=10.0)
    runs, sizes = earlier_runs(tmp_path, "ours"), RowSizes(1600, 160_000, 200, 200, 3200, 3200, 200, 0, varies=True)

    def planned(*overrides: str) -> RunPlan:
        config = load_config(ROOT / "configs" / "llama7b.yaml", ["train.num_train_epochs=3", *overrides])
        base = well_known_models()[config.model.model_name_or_path]
        return predict_seconds(plan_run(config, base, plan_device("24GiB"), sizes), runs)

    sft, stored = planned(), planned("train.objective=dpo")
    on_the_fly = planned("train.objective=dpo", "train.precompute_ref_log_probs=false")
    without = planned("train.objective=simpo")
    assert sft.seconds is not None
    assert (sft.reference_seconds, without.reference_seconds, on_the_fly.reference_seconds) == (None, None, None)
    assert stored.seconds == without.seconds == sft.seconds
    assert stored.reference_seconds == pytest.approx(sft.seconds / 3 / 2)
    assert on_the_fly.seconds == pytest.approx(1.5 * sft.seconds)
    kto, without_kl = planned("train.objective=kto"), planned("train.objective=apo_zero_unpaired")
    assert kto.seconds == pytest.approx(2 * sft.seconds), "policy and reference on mismatched sequences"
    assert kto.reference_seconds == without_kl.reference_seconds == pytest.approx(sft.seconds / 3 / 2)
    assert without_kl.seconds == sft.seconds
    all_on_the_fly = planned("train.objective=kto", "train.precompute_ref_log_probs=false")
    assert all_on_the_fly.seconds == pytest.approx(2.5 * sft.seconds)
    text = " ".join(" ".join(plan_lines(stored, "base", "")).split())
    assert f"reference log-probabilities {duration(sft.seconds / 6)} before it" in text
    one_epoch = planned("train.objective=dpo", "train.max_steps=10")
    assert one_epoch.work.reference_tokens == one_epoch.work.num_tokens == 10 * 160_000 // 100
