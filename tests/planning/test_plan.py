"""`qlora-train plan`: what it prints, and its memory beside bytes counted on fake tensors."""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))  # scripts import their neighbours

import count_memory
import plan_table

from qlora_train.cli.main import main
from qlora_train.config import LoraSection, load_config
from qlora_train.planning.activations import MicroBatch
from qlora_train.planning.base_config import well_known_models
from qlora_train.planning.compiled_kernels import KERNEL_BYTES, expert_kernels_bytes
from qlora_train.planning.family_shapes import family_shapes
from qlora_train.planning.held_memory import CUDA_CONTEXT_BYTES
from qlora_train.planning.memory import plan_memory, step_settings
from qlora_train.planning.plan_device import PlanDevice, parse_size, plan_device
from qlora_train.planning.plan_text import PART_LABELS, plan_lines
from qlora_train.planning.run_plan import RunPlan, plan_run
from qlora_train.planning.workload import RowSizes
from qlora_train.utils.errors import ConfigError
from tests.config.test_shipped_yaml import MODELS
from tests.support.pico import build_config

ROOT = Path(__file__).parents[2]
COUNTED = [
    line
    for name in ("memory-counted", "memory-counted-experts")
    for line in json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))
]
SHIPPED = [
    path
    for path in sorted([*ROOT.glob("configs/*.yaml"), *ROOT.glob("recipes/*.yaml")])
    if load_config(path).model.model_name_or_path in well_known_models()
]


def planned(path: Path, memory: str, *overrides: str) -> RunPlan:
    config = load_config(path, overrides)
    base = well_known_models()[config.model.model_name_or_path]
    return plan_run(config, base, plan_device(memory), RowSizes.most(config), is_local=False)


# --- memory beside fake tensors ---------------------------------------------------------------------------------------


def counted_phases() -> Iterator[tuple[dict[str, Any], str]]:
    """Yield the phases that a run has: it compares 4 rows with the reference."""
    for line in COUNTED:
        for phase in line["peak_gb"]:
            if phase.startswith(("parity check, 4 ", "evaluation", "memory probe")):
                yield line, phase


def planned_phase(line: dict[str, Any], phase: str) -> float:
    """Return the planned bytes of a counted phase, without the CUDA context."""
    model = family_shapes(count_memory.MODELS[line["model"]], LoraSection(r=line["rank"]))
    assert model is not None
    tokens = line["tokens"]
    settings = step_settings(
        model, r=line["rank"], num_tokens=tokens, fused_kernels="reference" not in phase,
        accumulates=phase.endswith("accumulation 2"),
    )  # fmt: skip
    if phase.startswith("parity"):
        num_rows = int(phase.split(", ")[1].split(" x", maxsplit=1)[0])
        settings = replace(settings, batch=MicroBatch(128, 128, 128), rows=num_rows)
    plan = plan_memory(model, replace(settings, eval_batch=MicroBatch(tokens, tokens, tokens)))
    names = {"parity": "parity check", "evaluation": "evaluation", "memory": "training step"}
    name = next(moment for start, moment in names.items() if phase.startswith(start))
    peak = max((moment for moment in plan.moments if moment.name == name), key=lambda moment: moment.total_bytes)
    uncounted = CUDA_CONTEXT_BYTES + (peak.parts["optimizer"] if name == "evaluation" else 0)
    return peak.total_bytes - uncounted


@pytest.mark.parametrize(("line", "phase"), counted_phases(), ids=lambda value: str(value)[:60])
def test_plan_is_within_five_percent_of_fake_tensors_and_not_below(line: dict[str, Any], phase: str) -> None:
    ratio = planned_phase(line, phase) / 1e9 / line["peak_gb"][phase]
    assert 0.99 <= ratio <= 1.05


def test_mixture_keeps_few_kernels_on_a_cpu_and_none_on_a_gpu() -> None:
    model = family_shapes(count_memory.MODELS["qwen3-30b-a3b, 2 layers"], LoraSection())
    assert model is not None
    # 2 matrices, 8 products of each, 128 * 8 / 128 = 8 tokens on average: all are padded to 32
    assert expert_kernels_bytes(model, [128]) == 2 * 8 * KERNEL_BYTES
    # 2048 tokens, 128 on average: 64, 96, ... 256
    assert expert_kernels_bytes(model, [2048]) == 7 * 2 * 8 * KERNEL_BYTES
    settings = step_settings(model, r=16, num_tokens=2048)
    on_gpu, on_cpu = (
        next(moment for moment in plan_memory(model, replace(settings, on_gpu=on_gpu)).moments if "step" in moment.name)
        for on_gpu in (True, False)
    )
    assert "compiled kernels" not in on_gpu.parts
    assert on_cpu.parts["compiled kernels"] == expert_kernels_bytes(model, [2048, 128])


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
@pytest.mark.parametrize("memory", ["8GiB", "24GiB"])
def test_every_shipped_config_is_planned_on_one_screen(path: Path, memory: str) -> None:
    plan = planned(path, memory)
    lines = plan_lines(plan, load_config(path).model.model_name_or_path, "shipped table", ["data      not read"])
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80
    assert plan.fitted.fits == (plan.fitted.least_bytes <= plan.device.usable_bytes)
    assert sum(plan.to_json()["parts"].values()) == plan.to_json()["peak_bytes"]


def test_less_recomputation_takes_the_memory_that_is_spare() -> None:
    path = ROOT / "configs" / "llama7b.yaml"
    peaks = [planned(path, memory).fitted for memory in ("12GiB", "24GiB", "80GiB")]
    assert all(
        fitted.plan.needed_bytes <= size * 2**30 * 0.95 for fitted, size in zip(peaks, (12, 24, 80), strict=True)
    )
    assert [set(fitted.plan.levels) for fitted in peaks][-1] == {"none"}
    full = planned(path, "80GiB", "train.gradient_checkpointing=full").fitted
    assert full.plan.needed_bytes < peaks[1].plan.needed_bytes < peaks[2].plan.needed_bytes


def test_only_an_objective_with_a_reference_keeps_the_adapter_that_training_starts_from() -> None:
    path, start = ROOT / "recipes" / "dpo.yaml", "lora.adapter_path=sft"

    def adapter_bytes(*overrides: str) -> int:
        moments = planned(path, "24GiB", *overrides).fitted.plan.moments
        return next(moment.parts["adapter"] for moment in moments if moment.name == "training step")

    alone = adapter_bytes()
    assert adapter_bytes(start) == 2 * alone
    assert adapter_bytes(start, "train.objective=simpo") == adapter_bytes(start, "train.objective=orpo") == alone


def test_two_gpus_of_24_gb_hold_a_70b_model_in_parts_only() -> None:
    path = ROOT / "configs" / "llama70b-2x24gb.yaml"
    sharded = planned(path, "24GiB")
    whole = planned(path, "24GiB", "parallel.strategy=ddp")
    assert (sharded.num_ranks, sharded.is_sharded) == (2, True)
    assert not whole.fitted.fits
    assert sharded.fitted.least_bytes < 0.65 * whole.fitted.least_bytes


def test_plan_of_a_known_family_imports_no_torch() -> None:
    code = (
        "import sys; from qlora_train.cli.main import main; "
        "assert main(['plan', 'configs/llama7b.yaml', '--memory', '24GiB']) == 0; "
        "print([name for name in ('torch', 'transformers', 'numpy', 'huggingface_hub') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_json_has_the_same_numbers_as_the_text(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", str(ROOT / "configs" / "qwen3-8b.yaml"), "--memory", "24GiB", "--no-data"]
    assert main([*command, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert main(command) == 0
    text = capsys.readouterr().out
    assert f"{plan['peak_bytes'] / 1e9:8.2f}" in text
    assert f"{plan['num_weights'] / 1e9:.2f} B weights" in text
    assert plan["fits"] is True


def test_local_data_decides_steps_and_micro_batches(
    pico_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from qlora_train.config.writer import to_yaml
    from tests.support.runs import make_config

    file = tmp_path / "run.yaml"
    overrides = ("train.max_steps=null", "train.num_train_epochs=2", "train.save_steps=null", "train.eval_steps=null")
    file.write_text(to_yaml(make_config(tmp_path, pico_llama, *overrides, name="made")), encoding="utf-8")
    assert main(["plan", str(file), "--json"]) == 0
    with_data = json.loads(capsys.readouterr().out)
    assert main(["plan", str(file), "--json", "--no-data"]) == 0
    without = json.loads(capsys.readouterr().out)
    rows = int(with_data["data"].split()[0])
    assert with_data["num_steps"] == 2 * -(-rows // 4)
    assert with_data["num_tokens"] > 0
    assert with_data["micro_batch_tokens"] < without["micro_batch_tokens"] == 2 * 128
    assert without["num_steps"] is None


@pytest.mark.parametrize(("text", "size"), [("24GiB", 24 * 2**30), ("6 GB", 6 * 10**9), ("1.5tb", 15 * 10**11)])
def test_sizes_have_units(text: str, size: int) -> None:
    assert parse_size(text, "--memory") == size


def test_plan_that_is_known_to_be_loose_says_so() -> None:
    path, device = ROOT / "configs" / "llama7b.yaml", PlanDevice("a CPU", False, 64 * 2**30)
    config = load_config(path)
    plan = plan_run(config, build_config("gpt_oss").to_dict(), device, RowSizes.most(config))
    reason = "layers of gpt_oss are not described: tensors may be left out"
    assert f"loose     {reason}" in plan_lines(plan, "base", "table")
    assert plan.to_json()["caveats"] == [reason]
    assert planned(path, "24GiB").caveats == planned(ROOT / "configs" / "qwen3-30b-a3b.yaml", "24GiB").caveats == ()


def test_large_base_on_a_cpu_is_said_to_be_slow_until_a_time_is_known() -> None:
    config = load_config(ROOT / "configs" / "llama7b.yaml")
    base = well_known_models()[config.model.model_name_or_path]
    on_cpu = plan_run(config, base, PlanDevice("a CPU", False, 64 * 2**30), RowSizes.most(config))
    slow = "slow      on a CPU, training may take days: no GPU was found"
    assert slow in plan_lines(on_cpu, "base", "table")
    assert slow not in plan_lines(replace(on_cpu, seconds=3600.0), "base", "table")
    assert slow not in plan_lines(planned(ROOT / "configs" / "llama7b.yaml", "24GiB"), "base", "table")
    small = replace(on_cpu, model=replace(on_cpu.model, layers=on_cpu.model.layers[:2]))
    assert small.model.numel < 10**9
    assert slow not in plan_lines(small, "base", "table")


@pytest.mark.parametrize("device", [PlanDevice("a CPU", False, 64 * 2**30), PlanDevice("a GPU", True, 24 * 2**30)])
def test_parts_have_one_name_in_text_json_and_documentation(device: PlanDevice) -> None:
    short = ["train.per_device_train_batch_size=1", "data.max_length=512"]  # more is allocated outside the heap
    config = load_config(ROOT / "configs" / "llama7b.yaml", short)
    base = well_known_models()[config.model.model_name_or_path]
    plan = plan_run(config, base, device, RowSizes.most(config)).fitted.plan
    names = {name for moment in plan.moments for name, size in moment.parts.items() if size}
    page = (ROOT / "docs" / "plan.md").read_text(encoding="utf-8")
    assert "quantization constants" in names
    for name in names & {"quantization constants", "adapter in the compute dtype", "heap fragmentation"}:
        assert PART_LABELS[name] == name
        assert name in page
    assert names <= PART_LABELS.keys(), "every part has a line in the text"


def test_plan_without_steps_promises_no_disk() -> None:
    plan = planned(ROOT / "configs" / "llama7b.yaml", "24GiB")
    assert plan.to_json()["num_steps"] is plan.to_json()["disk_bytes"] is None


def test_long_notes_are_wrapped_and_whole() -> None:
    note = "data      cannot be used (\\x1b[31m" + " ".join(f"word{number}" for number in range(40)) + ")"
    lines = plan_lines(
        planned(ROOT / "configs" / "llama7b.yaml", "24GiB"), "base", "table", [note.replace("\\x1b", "\x1b")]
    )
    assert max(map(len, lines)) <= 80
    assert " ".join(" ".join(lines).split()).endswith(" ".join(note.split()))


@pytest.mark.parametrize(
    "text",
    ["24", "0GiB", "many", "-1GB", "24GiBs", "", "0.0000001GB", "9" * 400 + "GB", "1e3GB"],
    ids=lambda text: text[:20],
)
def test_what_is_not_a_size_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^--memory: '.*' is not a size of memory; allowed: .*24GiB") as caught:
        parse_size(text, "--memory")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", 0), ("num_hidden_layers", 10**12), ("num_hidden_layers", "two"), ("hidden_size", -64),
        ("vocab_size", 1.5), ("vocab_size", True), ("num_attention_heads", 0), ("num_attention_heads", [1]),
        ("num_key_value_heads", "x"), ("model_type", [1]), ("model_type", "none"),
    ],
)  # fmt: skip
def test_config_json_that_describes_no_model_is_one_line(
    key: str, value: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = {
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(base | {key: value}))
    file = tmp_path / "run.yaml"
    file.write_text(f"model: {{model_name_or_path: {tmp_path}}}\ndata: {{train: rows.jsonl}}\n")
    assert main(["plan", str(file), "--no-data"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert key in line or "config.json" in line
    assert len(line) < 500


@pytest.mark.parametrize(("memory", "status"), [("24GiB", 0), ("4GiB", 3)])
@pytest.mark.parametrize("output", [[], ["--json"]])
def test_exit_status_says_whether_a_run_fits(memory: str, status: int, output: list[str]) -> None:
    command = ["plan", str(ROOT / "configs" / "qwen3-8b.yaml"), "--memory", memory, "--no-data"]
    assert main([*command, *output]) == status


def test_data_that_a_run_refuses_is_an_error_after_the_plan(
    pico_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rows.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}]}\n' * 3)
    file = tmp_path / "run.yaml"
    file.write_text(
        f"model: {{model_name_or_path: {pico_llama}}}\ndata: {{train: {tmp_path}/rows.jsonl, max_length: 64}}\n"
    )
    assert main(["plan", str(file), "--memory", "24GiB"]) == 2
    printed = capsys.readouterr()
    assert "peak" in printed.out
    assert "3 of 3 rows cannot be used, data.max_dropped" in printed.err


@pytest.mark.parametrize("name", ["Qwen/Qwen3-8B", "meta-llama/Llama-3.1-8B", "model.gguf"])
def test_plan_of_a_model_names_the_command_that_plans_it(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", name]) == 2
    assert capsys.readouterr().err.endswith(f"qlora-train new {name} -o my.yaml\n")


def test_a_model_outside_the_shipped_table_is_told_the_nearest_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    file = tmp_path / "run.yaml"
    file.write_text("model: {model_name_or_path: someone/Qwen3-8B-copy}\ndata: {train: rows.jsonl}\n")
    assert main(["plan", str(file), "--no-data", "--offline"]) == 2
    assert "model.model_name_or_path=Qwen/Qwen3-8B" in capsys.readouterr().err


def test_shipped_table_has_the_published_values_and_every_shipped_base() -> None:
    table = well_known_models()
    assert MODELS.keys() <= table.keys(), "add a new base to planning/well_known_models.json"
    for name, published in MODELS.items():
        assert table[name].items() <= published.items()
        assert family_shapes(table[name], LoraSection()) == family_shapes(published, LoraSection())


def test_table_of_the_page_is_the_planners_and_keeps_the_mission() -> None:
    assert plan_table.page() == plan_table.PAGE.read_text(encoding="utf-8"), "run scripts/plan_table.py"
    peaks = {cells[1].strip(): float(cells[-2]) for cells in (line.split("|") for line in list(plan_table.table())[2:])}
    assert peaks["meta-llama/Llama-2-7b-hf"] < 6
    assert peaks["meta-llama/Llama-2-70b-hf"] < 40
