"""What the benchmarks compute with: operations of a step, tables, files of results, and the search for the longest row."""

import json
import math
import os
import re
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))  # scripts import their neighbours
sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "peers"))

import bench
import bench_levels
import bench_memory
import gpu_wheels
import matmul_rate
import random_model
import timing
from model_flops import model_shape, step_flops

from qlora_train.config import ModelSection, QuantizationSection
from qlora_train.models import load_model
from qlora_train.objectives.label_losses import label_losses
from qlora_train.utils.constants import IGNORE_INDEX
from tests.support.pico import build_config

ROOT = Path(__file__).parents[2]


def counted_flops(config: Any, *, r: int, length: int, num_labels: int) -> int:
    """Return the operations of a real step of two rows on a 16-bit model, as torch counts them."""
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model.enable_input_require_grads()  # the input's gradient is counted in every layer
    model = get_peft_model(model, LoraConfig(r=r, target_modules="all-linear", task_type="CAUSAL_LM"))
    input_ids = torch.arange(2 * length).reshape(2, length) % config.vocab_size
    labels = input_ids.masked_fill(torch.arange(length) < length - num_labels, IGNORE_INDEX)
    with FlopCounterMode(display=False) as counter:
        label_losses(model, input_ids=input_ids, labels=labels).nll.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma2", "phi3"])
@pytest.mark.parametrize(("r", "length", "num_labels"), [(4, 48, 40), (32, 48, 40), (4, 96, 40), (4, 48, 5)])
def test_operations_of_a_step_are_those_that_torch_counts(
    model_type: str, r: int, length: int, num_labels: int
) -> None:
    config = build_config(model_type)
    shape = model_shape(config.to_dict())
    flops = step_flops(shape, r=r, row_lengths=[length, length], num_labels=2 * num_labels)
    # eager attention computes every pair of two tokens; those of a token and a later one need not be
    pairs = sum(min(i, window) for window in shape.windows for i in range(1, length + 1))
    all_pairs = len(shape.windows) * length**2
    expected = flops.total + flops.attention * (all_pairs / pairs - 1)
    counted = counted_flops(config, r=r, length=length, num_labels=num_labels)
    assert counted == pytest.approx(expected, rel=2e-4), "beyond the angles of rotary positions, which are products too"


def test_sliding_window_bounds_what_a_token_sees() -> None:
    shape = model_shape(build_config("gemma2", sliding_window=16).to_dict())
    assert sorted(shape.windows) == [16, math.inf]
    flops = step_flops(shape, r=4, row_lengths=[40], num_labels=0)
    assert flops.attention == 12 * 64 * (40 * 41 / 2 + sum(min(i, 16) for i in range(1, 41)))


def test_packed_rows_attend_within_documents() -> None:
    shape = model_shape(build_config("llama").to_dict())
    one, two = (step_flops(shape, r=4, row_lengths=rows, num_labels=8) for rows in ([64], [32, 32]))
    assert two.attention < 0.52 * one.attention
    assert (two.base, two.adapter, two.head) == (one.base, one.adapter, one.head)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "falcon_mamba", "qwen3_next"])
def test_models_whose_operations_are_not_known_are_refused(model_type: str) -> None:
    with pytest.raises(ValueError, match=r"config\.json"):
        model_shape(build_config(model_type).to_dict())


def test_llama_3_1_8b_costs_what_is_computed_by_hand() -> None:
    config = {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False,
    }  # fmt: skip
    flops = step_flops(model_shape(config), r=16, row_lengths=[2048], num_labels=2048)
    num_weights = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    assert flops.base == 4 * num_weights * 2048
    assert flops.head == 4 * 4096 * 128256 * 2048
    assert flops.adapter == 6 * 41_943_040 * 2048
    assert flops.attention == 32 * 12 * 4096 * 2048 * 2049 / 2


# --- scripts/bench.py -------------------------------------------------------------------------------------------------


def run_of(seconds: float, *, norm: float = 1.0, flops: float = 6e9) -> dict[str, Any]:
    return {
        "tokens": [100, 100], "seconds": [seconds, seconds], "flops": flops, "losses": [2.0, 1.5, 1.0],
        "grad_norms": [norm] * 3, "peak_gb": 1.5, "peak_device_gb": None, "threads": 2,
    }  # fmt: skip


def rate_of(square: float) -> dict[str, Any]:
    return {
        "square": 2048, "square_flops_per_second": square, "tokens": 64, "model_flops_per_second": square / 2, "threads": 2
    }  # fmt: skip


def test_table_says_who_is_faster_what_share_of_the_machine_was_used_and_whose_gradient_is_zero() -> None:
    found = {"ours": [run_of(1.0)] * 2, "other": [run_of(2.0), run_of(4.0)], "fake": [run_of(0.1, norm=0.0)] * 2}
    rates = [[rate_of(10e9), rate_of(12e9)], [rate_of(15e9), rate_of(10e9)]]
    _, ours, other, fake, matmul = bench.table(found, rates)
    # 3 GFLOP/s of 12 and of 15, the best of the rates around each round
    assert "1.00 x     22.5 %" in ours
    # 50 and 25 tokens/s against 100
    assert "3.00 x" in other
    assert "BROKEN" in fake
    assert "BROKEN" not in other
    assert matmul.startswith("matmul: 11 GFLOP/s (10-15), 2048 square; 6 (5-8)")


def test_rate_with_the_layers_of_the_model_counts_where_it_is_the_best() -> None:
    faster = {**rate_of(10e9), "model_flops_per_second": 20e9}
    assert bench.share(run_of(1.0), [rate_of(10e9), faster]) == pytest.approx(3e9 / 20e9)


def test_matmul_rate_is_that_of_its_products() -> None:
    found = matmul_rate.measured(64, [(64, 128), (64, 128), (128, 64)])
    one = torch.randn(1024, 1024, dtype=torch.bfloat16)
    began = time.perf_counter()
    for _ in range(3):
        one @ one
    assert found["square_flops_per_second"] > 0.8 * 3 * 2 * 1024**3 / (time.perf_counter() - began)
    assert 0 < found["model_flops_per_second"] < 4 * found["square_flops_per_second"]


def test_trainer_with_other_threads_than_the_matmul_is_named() -> None:
    lines = bench.table({"ours": [{**run_of(1.0), "threads": 1}]}, [[rate_of(1e9), rate_of(1e9)]])
    assert lines[-1] == "ours computed with 1 threads"


def test_trainer_that_fails_is_named_and_the_rounds_before_it_count() -> None:
    found = {"ours": [run_of(1.0)] * 2, "once": [run_of(2.0)], "never": []}
    failed = {"once": "once: status 1\nTraceback ...", "never": "never: status -9\n"}
    lines = bench.table(found, [[rate_of(1e9)] * 2] * 2, failed)
    assert "2.00 x" in lines[2]
    assert lines[3:5] == ["FAILED once: status 1", "FAILED never: status -9"]
    assert bench.table({"ours": []}, [], {"ours": "ours: status 1\n"}) == ["FAILED ours: status 1"]


def test_process_that_ends_badly_says_how(tmp_path: Path) -> None:
    with pytest.raises(bench.PeerError, match=r"^other: status 2\n.*No such file"):
        bench.answer_of("other", sys.executable, Path("no_such_script.py"), {}, tmp_path)


def test_trainer_that_took_other_batches_is_named() -> None:
    longer = {**run_of(1.0), "tokens": [100, 107]}
    lines = bench.table(
        {"ours": [run_of(1.0)], "close": [{**longer, "tokens": [102, 103]}], "far": [longer]}, [[rate_of(1e9)] * 2]
    )
    assert lines[-1] == "far took 207 tokens where ours took 200: other batches, not to be compared"
    assert len(lines) == 1 + 3 + 1 + 1


def test_peers_are_given_the_lines_of_our_batches_in_their_order(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    turns = [[{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"{n}!"}] for n in range(5)]
    rows.write_text("".join(json.dumps({"messages": turn}) + "\n" for turn in turns))
    files = bench.in_order(rows, [3, 1, 5], tmp_path)
    chosen = [json.loads(line)["messages"] for line in Path(files["conversations"]).read_text().splitlines()]
    pairs = [json.loads(line) for line in Path(files["pairs"]).read_text().splitlines()]
    assert chosen == [turns[2], turns[0], turns[4]]
    assert [pair["prompt"] + pair["completion"] for pair in pairs] == chosen


def test_results_are_named_after_day_and_machine_and_none_is_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "ROOT", tmp_path)
    about = {"gpu": None, "cpu": "Intel(R) Xeon(R) Gold 6148 CPU @ 2.40GHz", "cores": 2}
    first = bench.results_file(about)
    first.parent.mkdir(parents=True)
    first.touch()
    second = bench.results_file(about)
    assert first.name.endswith("-intel-xeon-gold-6148-cpu-2-cores.json")
    assert second.name == f"{first.stem}-2.json"
    assert bench.results_file({**about, "gpu": "NVIDIA H100 80GB"}).name.endswith("-nvidia-h100-80gb.json")


def test_rows_of_a_batch_are_found_padded_and_packed() -> None:
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    assert timing.row_lengths({"attention_mask": mask, "position_ids": torch.zeros(2, 4)}) == [3, 2]
    assert timing.row_lengths({"position_ids": torch.tensor([[0, 1, 2, 0, 1, 0]])}) == [3, 2, 1]
    shared = {"position_ids": torch.tensor([[0, 1, 2, 3, 2, 3, 0, 1]]), "row": torch.tensor([5, 1])}
    assert timing.row_lengths(shared) == [4, 4], "the second begins with two tokens of the first; the rest is padding"


# --- scripts/random_model.py ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nf4", [False, True])
@pytest.mark.parametrize("name", ["pico", "qwen3-8b"])
def test_random_model_has_the_shape_and_trains_as_a_checkpoint_does(tmp_path: Path, name: str, nf4: bool) -> None:
    narrow = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16, "vocab_size": 600}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    shape = random_model.SHAPES[name] | narrow | heads
    random_model.write_model(tmp_path, shape, nf4=nf4, seed=1)
    loaded = load_model(ModelSection(model_name_or_path=str(tmp_path)), QuantizationSection())
    assert loaded.quantization_summary.quantized_share == 1.0
    assert len(loaded.tokenizer) == loaded.model.get_input_embeddings().num_embeddings == 600
    # as many tensors as layers, and no more in memory at once
    assert len(list(tmp_path.glob("*.safetensors"))) == 2 + 3
    tokens = loaded.tokenizer("grüß", return_tensors="pt").input_ids
    assert tokens.shape == (1, 6), "a token a byte"
    with torch.no_grad():
        loss = loaded.model(input_ids=tokens, labels=tokens).loss
    assert 0.9 * math.log(600) < float(loss) < 1.2 * math.log(600)


def test_random_weights_are_the_same_in_4_bits_and_in_16(tmp_path: Path) -> None:
    weights = []
    for nf4 in (False, True):
        folder = tmp_path / str(nf4)
        random_model.write_model(folder, random_model.SHAPES["pico"], nf4=nf4, seed=1)
        loaded = load_model(ModelSection(model_name_or_path=str(folder)), QuantizationSection())
        packed = loaded.model.model.layers[1].mlp.down_proj.weight
        weights.append(dequantize_4bit(packed, packed.quant_state).float())
    assert torch.equal(*weights)
    assert 0.018 < float(weights[0].std()) < 0.022


@pytest.mark.parametrize(
    ("name", "num_parameters"),
    [
        ("llama-2-7b", 6_738_415_616), ("llama-3.1-8b", 8_030_261_248), ("llama-3.1-70b", 70_553_706_496),
        ("mistral-7b", 7_248_023_552), ("qwen2.5-7b", 7_615_616_512), ("qwen3-8b", 8_190_735_360),
    ],
)  # fmt: skip
def test_shapes_have_as_many_parameters_as_the_releases(name: str, num_parameters: int) -> None:
    with torch.device("meta"):
        config = AutoConfig.for_model(**random_model.COMMON, **random_model.SHAPES[name])
        model = AutoModelForCausalLM.from_config(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == num_parameters


def test_rows_have_the_lengths_that_are_asked_for(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    command = ["--rows", "300", "--median", "200", "--sigma", "0.8", "--longest", "700"]
    subprocess.run([sys.executable, ROOT / "scripts" / "bench_rows.py", file, *command], check=True)
    rows = [json.loads(line)["messages"] for line in file.read_text().splitlines()]
    lengths = sorted(sum(len(turn["content"]) for turn in row) for row in rows)
    assert len(rows) == 300
    assert 150 < lengths[150] < 250
    tokenizer = random_model.build_tokenizer(300)
    longest = max(rows, key=lambda row: sum(len(turn["content"]) for turn in row))
    assert 600 < len(tokenizer.apply_chat_template(longest)["input_ids"]) <= 700


# --- scripts/bench_memory.py ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [0, 15, 16, 17, 100, 4095, 4096, 50_000, 99_999, 100_000, 10**9])
@pytest.mark.parametrize("start", [16, 4096, 10**6])
def test_search_finds_the_longest_row_that_fits(limit: int, start: int) -> None:
    tried: list[int] = []

    def fits(length: int) -> bool:
        tried.append(length)
        return length <= limit

    found = bench_memory.longest_that_fits(fits, {}, start=start, longest=100_000, precision=0.03)
    reachable = min(limit, 100_000) if limit >= bench_memory.SHORTEST else 0
    assert found <= reachable <= max(1.03 * found, found + 1)
    assert len(set(tried)) == len(tried) <= 25
    assert all(bench_memory.SHORTEST <= length <= 100_000 for length in tried)


def test_search_goes_on_from_trials_that_are_known() -> None:
    def fits(length: int) -> bool:
        assert 2000 < length < 2500, "everything else is known"
        return length <= 2200

    known = {1000: True, 2000: True, 2500: False, 4000: False}
    found = bench_memory.longest_that_fits(fits, known, start=16, longest=9999, precision=0.03)
    assert 2130 <= found <= 2200


def test_memory_table_has_a_line_a_cap() -> None:
    trials = [
        {"cap_gib": 8.0, "num_tokens": 1000, "fits": True, "seconds": 1.0, "peak_bytes": 7 << 30},
        {"cap_gib": 8.0, "num_tokens": 1500, "fits": True, "seconds": 1.0, "peak_bytes": 15 << 29},
        {"cap_gib": 8.0, "num_tokens": 1600, "fits": False, "seconds": 1.0},
        {"cap_gib": 8.0, "num_tokens": 3000, "fits": False, "seconds": 1.0},
        {"cap_gib": 4.0, "num_tokens": 16, "fits": False, "seconds": 1.0},
        {"cap_gib": 80.0, "num_tokens": 9000, "fits": True, "seconds": 1.0, "peak_bytes": 1 << 30},
        {"cap_gib": 80.0, "num_tokens": 20000, "fits": False, "seconds": 900, "timed_out": True},
    ]
    assert bench_memory.table(trials)[2:] == [
        "| 4 GiB | none | 16 |  |",
        "| 8 GiB | 1,500 tokens | 1,600 | 7.50 GiB |",
        "| 80 GiB | 9,000 tokens | 20,000 (took over 900 s) | 1.00 GiB |",
    ]


@pytest.mark.slow
def test_a_row_fits_under_a_cap_above_its_peak_and_not_below(tmp_path: Path) -> None:
    model, trials = tmp_path / "model", tmp_path / "trials.jsonl"
    random_model.write_model(model, random_model.SHAPES["pico"], nf4=True, seed=0)
    command = [sys.executable, ROOT / "scripts" / "bench_memory.py", model, "--trials", trials, "--longest", "16"]
    subprocess.run([*command, "--caps", "0.01", "8"], check=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    lines = bench_memory.read_trials(trials)
    peak = lines[-1]["peak_bytes"]
    found = [(line["cap_gib"], line["num_tokens"], line["fits"]) for line in lines]
    assert found == [(0.01, 16, False), (8.0, 16, True)]
    assert 1 << 28 < peak < 4 << 30, "python with torch, a pico model and one row"


# --- scripts/prove_gpu.sh ---------------------------------------------------------------------------------------------


def prove_gpu(folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    places = {"BUILD": str(folder / "build"), "RESULTS": str(folder / "results"), "PYTHON": sys.executable}
    command = ["bash", str(ROOT / "scripts" / "prove_gpu.sh"), *words]
    settings = {"WHEELS": str(folder / "wheels"), "DRY_RUN": "1", **places, **environment}
    return subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("words", "seconds", "num_parts"), [((), 590, 8), (("again",), 200, 4)])
def test_limits_of_the_gpu_parts_are_within_one_call(
    tmp_path: Path, words: tuple[str, ...], seconds: int, num_parts: int
) -> None:
    groups = [line.split() for line in prove_gpu(tmp_path, "list", *words).stdout.splitlines()]
    limits = [[int(part.partition("=")[2]) for part in group] for group in groups]  # a group runs side by side
    assert sum(map(max, limits)) <= seconds
    assert sum(map(len, limits)) == num_parts
    assert not list(tmp_path.iterdir()), "a list leaves nothing"


def test_unknown_word_prints_the_usage(tmp_path: Path) -> None:
    ended = prove_gpu(tmp_path, "speed")
    assert ended.returncode == 2
    assert "  scripts/prove_gpu.sh again " in ended.stdout


FAKE_PYTHON = """#!/bin/sh
case "$*" in
*"-m pytest"*) echo begins; sleep 30 ;;
*prove_command*) trap '' INT; echo deaf; sleep 30; sleep 30 ;;
*bench_run*) echo broken; exit 3 ;;
*bench_levels*) while [ "$1" != --output ]; do shift; done; printf '{\n"levels": 1}\n' >"$2" ;;
*) echo done ;;
esac
"""


def test_gpu_parts_that_fail_or_overrun_do_not_stop_the_others(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)
    began = time.monotonic()
    ended = prove_gpu(tmp_path, PYTHON=str(python), LIMITS="tests=7 command=7")
    assert time.monotonic() - began < 60
    assert ended.returncode == 1
    summary = (tmp_path / "results" / "summary.txt").read_text()
    found = dict(line[3:].partition(",")[0].split(": ") for line in summary.splitlines() if line.startswith("## "))
    assert found == {
        "install": "ok", "model": "ok", "tests": "TIMED OUT", "command": "TIMED OUT", "main": "FAILED", "levels": "ok",
        "trl": "ok", "kernels": "ok",
    }  # fmt: skip
    assert "## main: FAILED, status 3, " in summary
    log = (tmp_path / "results" / "log.txt").read_text().splitlines()
    assert {"tests| begins", "command| deaf", "main| broken", "kernels| done"} <= set(log)
    results = (tmp_path / "results" / "results.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in results] == [{"part": "levels", "result": {"levels": 1}}]


CHEAP_PARTS = ("install", "model", "main", "levels")
PARTS = (*CHEAP_PARTS, "tests", "command", "trl", "kernels")


@pytest.mark.slow
def test_dry_run_of_the_gpu_parts_passes(tmp_path: Path) -> None:
    """QLORA_PROVE=long runs every part, for minutes."""
    parts = PARTS if os.environ.get("QLORA_PROVE") == "long" else CHEAP_PARTS
    write_wheel(tmp_path / "wheels", "measured_package", {"measured_package.py": "VERSION = 1\n"})
    limits = " ".join(f"{name}=500" for name in parts)  # other programs may use the CPUs
    ended = prove_gpu(tmp_path, PARTS=" ".join(parts), LIMITS=limits)
    log = (tmp_path / "results" / "log.txt").read_text()
    assert ended.returncode == 0, ended.stdout + log[-5000:]
    assert (tmp_path / "build" / "site" / "measured_package.py").is_file()
    summary = (tmp_path / "results" / "summary.txt").read_text()
    assert summary.count(": ok, ") == len(parts)
    assert "FAIL" not in summary
    for check in ("killed before its end", "went on from a checkpoint", "the loss falls", "fused kernels passed"):
        assert f"ok   {check}" in summary
    results = (tmp_path / "results" / "results.jsonl").read_text().splitlines()
    found = {line["part"]: line["result"] for line in map(json.loads, results)}
    assert found.keys() == {"main", "levels", "trl"} & set(parts)
    assert found["levels"]["levels"].keys() == {"full", "mlp", "none", bench_levels.FLOOR}
    assert len(list((tmp_path / "results").iterdir())) == 3


# --- scripts/bench_levels.py, scripts/gpu_wheels.py -------------------------------------------------------------------


def test_level_that_runs_out_of_memory_is_a_line_of_the_table() -> None:
    levels = {
        "full": {"tokens_per_second": [50.0, 60.0], "peak_bytes": 10**9},
        "none": {"failed": "CUDA out of memory"},
        bench_levels.FLOOR: {"tokens_per_second": [100.0, 100.0], "peak_bytes": 2 * 10**9},
    }
    result = {"levels": levels, "flops": [0, 6e9, 6e9], "num_tokens": [7, 100, 100], "matmul": [rate_of(10e9)]}
    _, layer, none, floor, matmul = bench_levels.table(result)
    # 12 GFLOP in 2 + 100 / 60 seconds, of 10 GFLOP/s
    assert "55    0.55 x     32.7 %" in layer
    assert layer.endswith("1.00")
    assert none.endswith("CUDA out of memory")
    assert "1.00 x     60.0 %" in floor
    assert matmul.startswith("matmul: 0.01 TFLOP/s")


def write_wheel(folder: Path, name: str, files: dict[str, str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    wheel, about = folder / f"{name}-1.0-py3-none-any.whl", f"{name}-1.0.dist-info"
    files = files | {
        f"{about}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
        f"{about}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, content in files.items():
            archive.writestr(path, content)
        archive.writestr(f"{about}/RECORD", "".join(f"{path},,\n" for path in files) + f"{about}/RECORD,,\n")
    return wheel


def test_stripped_wheel_installs_with_the_libraries_of_one_cuda_version(tmp_path: Path) -> None:
    backends = ("cpu", "cuda124", "cuda130", "rocm71")
    libraries = {f"bitsandbytes/libbitsandbytes_{backend}.so": backend for backend in backends}
    wheel = write_wheel(tmp_path, "bitsandbytes", libraries | {"bitsandbytes/__init__.py": ""})
    gpu_wheels.strip_libraries(wheel, keep=("cpu", "cuda130"))
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-index",
        "--no-deps",
        "--target",
        tmp_path / "site",
    ]
    subprocess.run([*install, wheel], check=True)
    installed = {path.name for path in (tmp_path / "site" / "bitsandbytes").iterdir() if path.is_file()}
    assert installed == {"__init__.py", "libbitsandbytes_cpu.so", "libbitsandbytes_cuda130.so"}
    with pytest.raises(SystemExit, match="no library for cuda140"):
        gpu_wheels.strip_libraries(wheel, keep=("cpu", "cuda140"))


def test_packages_for_the_gpu_machine_are_pinned_by_the_lock_file() -> None:
    requirements = gpu_wheels.pinned((ROOT / "requirements.lock").read_text())
    assert len(requirements) == len(gpu_wheels.PACKAGES)
    assert all(re.fullmatch(r"[\w-]+==[\d.]+", requirement) for requirement in requirements)
